"""A base that is a Hugging Face folder: the study's model has to be the folder's, and the folder becomes a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_demix.artifact import write_json
from megatron_demix.checkpoint.model_function import EMBEDDING
from megatron_demix.checkpoint.reader import Checkpoint
from megatron_demix.errors import ConfigError, IncompatibleInputs
from megatron_demix.huggingface.config import from_huggingface, read_config
from megatron_demix.pipeline.given_checkpoint import check_precision
from megatron_demix.pipeline.inputs import InputDigests
from megatron_demix.pipeline.stage import POINTER, Stage
from megatron_demix.study.study import Study
from megatron_demix.study.training import ModelSpec
from megatron_demix.train.derived import ffn_hidden_size, padded_vocab_size

if TYPE_CHECKING:
    from megatron_demix.huggingface.importing import TransformerImpl

IMPORTED = "imported"
# Of a study's model: what a Hugging Face folder says nothing of.
_FREE = {
    *("max_position_embeddings", "init_method_std", "hidden_dropout", "attention_dropout"),
    *("make_vocab_size_divisible_by", "padded_vocab_size", "transformer_impl"),
}


def with_base(study: Study, root: Path, digests: InputDigests) -> Study:
    """The study with the embedding as large as the folder's, so that base, components and export have the same rows.

    Raises IncompatibleInputs naming every key of `model` in which study and folder differ, ConfigError where
    transformer_impl has to be said, or padded_vocab_size is less than the folder's vocabulary. Where the digests allow that the
    folder is missing, the study stays as it is.
    """
    if study.base.huggingface is None:
        return study
    folder = root / study.base.huggingface
    if digests.absent_ok and not folder.exists():
        return study
    config = digests.answer(str(folder), lambda: read_config(folder), kind="huggingface configs")
    described = from_huggingface(config, str(folder))
    wanted, given = _resolved(ModelSpec(**described.study())), _resolved(study.model)
    said = study.model.model_dump()
    # A study without experts, or scaling, has fewer settings that count.
    if differing := [f"model.{k}: {v} (the study: {said[k]})" for k, v in wanted.items() if given.get(k) != v]:
        raise IncompatibleInputs(
            f"study {study.name!r}: base.huggingface {folder} is another model than the study's. It has "
            f"{', '.join(differing)}. Set these; `tools/convert_hf.py import` prints the whole section."
        )
    stock = study.trainer.backend == "megatron_lm"
    if stock and described.num_experts is not None and study.model.transformer_impl == "auto":
        raise ConfigError(
            f"study {study.name!r}: stock Megatron-LM (trainer.backend) loads a base with experts only under the names of its "
            "own layers. Set model.transformer_impl to transformer_engine if that is installed where it trains, else to local."
        )
    rows = padded_vocab_size(study.model, study.parallel, described.vocab_size)
    return study.model_copy(update={"model": study.model.model_copy(update={"padded_vocab_size": rows})})


def _resolved(model: ModelSpec) -> dict[str, Any]:
    """Every setting that has to agree, defaults spelled out."""
    heads = model.num_attention_heads
    settings = model.model_dump(exclude=_FREE) | {
        "num_query_groups": model.num_query_groups or heads,
        "kv_channels": model.kv_channels or model.hidden_size // heads,
        "ffn_hidden_size": ffn_hidden_size(model),
    }
    if model.num_experts is None:
        settings = {k: v for k, v in settings.items() if not k.startswith("moe_")}
    if not model.use_rope_scaling:
        del settings["rope_scaling_factor"]
    return settings


def imported(study: Study, root: Path, run: Path, digests: InputDigests) -> Stage:
    """The stage whose artifact holds the folder as a checkpoint, cut for the study's parallelism."""
    assert study.base.huggingface is not None
    folder = root / study.base.huggingface
    # Our trainer knows both names of the norm before experts; stock Megatron-LM has to be told whose layers there are.
    layers: TransformerImpl = "local" if study.model.transformer_impl == "local" else "transformer_engine"

    def digest() -> str:
        read_config(folder)  # raises where there is none
        return digests.of(sorted(p for kind in ("config.json", "*.safetensors", "*.safetensors.index.json")
                                 for p in folder.glob(kind)))  # fmt: skip

    settings = {
        "huggingface": digests.answer(str(folder), digest, kind="huggingface weights"),
        "padded_vocab_size": study.model.padded_vocab_size,
        "transformer_impl": layers if study.model.num_experts is not None else None,
    }

    def make(target: Path) -> None:
        from megatron_demix.huggingface.importing import Layout, import_folder

        rows, parallel = study.model.padded_vocab_size, study.parallel
        assert rows is not None
        import_folder(
            folder,
            target / IMPORTED,
            layout=Layout(parallel.tensor, parallel.pipeline, rows // parallel.tensor),
            transformer_impl=layers,
            progress=False,
        )
        embedding = Checkpoint(target / IMPORTED, read_ahead=False).model_tensors[EMBEDDING]
        check_precision(study, str(folder), embedding.dtype)
        write_json(target / POINTER, {"checkpoint": IMPORTED})

    return Stage("base/base", run, settings, (), make)
