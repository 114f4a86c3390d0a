"""The one door to datatrove: all that is used of it, and what to do where it is missing."""

from __future__ import annotations

from megatron_demix.errors import ConfigError

try:
    import orjson
    from datatrove.data import Document
    from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
    from datatrove.pipeline.base import PipelineStep
    from datatrove.pipeline.decont import NGramsDecontConfig, NGramsDecontFilter
    from datatrove.pipeline.dedup import (
        ExactDedupConfig,
        ExactDedupFilter,
        ExactDedupSignature,
        ExactFindDedups,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )
    from datatrove.pipeline.filters.base_filter import BaseFilter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.hashing import HashConfig, create_hash_func
    from datatrove.utils.logging import logger, setup_default_logger
    from datatrove.utils.perplexity import KenlmModel
    from datatrove.utils.text import TextNormConfig, ngrams, simplify_text
    from datatrove.utils.word_tokenizers import WordTokenizer
except ImportError as e:
    raise ConfigError(f"datatrove cannot be imported ({e}): pip install 'megatron-demix[data]'.") from e

__all__ = [
    "BaseFilter",
    "C4QualityFilter",
    "Document",
    "ExactDedupConfig",
    "ExactDedupFilter",
    "ExactDedupSignature",
    "ExactFindDedups",
    "FineWebQualityFilter",
    "GopherQualityFilter",
    "GopherRepetitionFilter",
    "HashConfig",
    "JsonlReader",
    "JsonlWriter",
    "KenlmModel",
    "LocalPipelineExecutor",
    "MinhashConfig",
    "MinhashDedupBuckets",
    "MinhashDedupCluster",
    "MinhashDedupFilter",
    "MinhashDedupSignature",
    "NGramsDecontConfig",
    "NGramsDecontFilter",
    "PipelineStep",
    "SlurmPipelineExecutor",
    "TextNormConfig",
    "WordTokenizer",
    "create_hash_func",
    "logger",
    "ngrams",
    "orjson",
    "setup_default_logger",
    "simplify_text",
]
