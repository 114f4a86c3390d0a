"""Settings of every test, and training small enough for tests: real text as byte tokens, and jobs of a few iterations on it."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest

# A deadline for each example would measure how busy the machine is, and a slow import would fail the first one.
hypothesis.settings.register_profile("demix", deadline=None)
hypothesis.settings.load_profile("demix")

BYTE_VOCAB, EOD = 257, 256


@pytest.fixture(scope="session")
def byte_corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Prefixes of two indexed data sets, "a" and "b": Python's own sources, one token a byte, a document a file."""
    from megatron_demix.indexed.writer import IndexedWriter

    folder = tmp_path_factory.mktemp("bytes")
    sources = sorted(p for p in Path(sysconfig.get_paths()["stdlib"]).glob("*.py") if p.stat().st_size > 2000)
    prefixes = {}
    for name, files in (("a", sources[:12]), ("b", sources[12:24])):
        prefixes[name] = folder / name
        with IndexedWriter(prefixes[name], np.dtype(np.uint16)) as writer:
            for file in files:
                tokens = np.append(np.frombuffer(file.read_bytes()[:8000], np.uint8).astype(np.uint16), EOD)
                writer.add(tokens, np.array([len(tokens)]))
    return prefixes


@pytest.fixture(scope="session")
def make_train_job(byte_corpus: dict[str, Path]) -> Callable[..., Any]:
    """make_train_job(folder, model={...}, train={...}, parallel={...}, **fields) -> TrainJob, tiny unless told otherwise."""
    from megatron_demix.train.job import TrainJob

    def make(
        folder: Path,
        *,
        model: dict[str, Any] | None = None,
        train: dict[str, Any] | None = None,
        parallel: dict[str, Any] | None = None,
        **fields: Any,
    ) -> TrainJob:
        return TrainJob.model_validate(
            {
                "name": "tiny",
                "seed": 5,
                "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2} | (model or {}),
                "train": {
                    "seq_length": 32,
                    "micro_batch_size": 2,
                    "global_batch_size": 8,
                    "lr": 3e-3,
                    "precision": "fp32",
                    "save_interval": 3,
                    "log_interval": 2,
                    "timeout": 60,
                }
                | (train or {}),
                "parallel": parallel or {},
                "train_iters": 6,
                "vocab_size": BYTE_VOCAB,
                "eod_id": EOD,
                "blend": [(byte_corpus["a"], 0.75), (byte_corpus["b"], 0.25)],
                "work": folder / "work",
                "index_cache": folder / "index",
            }
            | fields
        )

    return make
