"""A Megatron distributed checkpoint becomes a Hugging Face folder that transformers loads."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_demix.artifact import remove_leftovers, rename_new, sync_path, temporary_beside
from megatron_demix.checkpoint.dtypes import ARRAY_DTYPES
from megatron_demix.checkpoint.elements import ElementReader
from megatron_demix.checkpoint.layers import with_keys
from megatron_demix.checkpoint.model_function import DESCRIBING, EMBEDDING
from megatron_demix.checkpoint.output import resolved
from megatron_demix.checkpoint.reader import Checkpoint
from megatron_demix.checkpoint.run_config import saved_arguments
from megatron_demix.errors import ConfigError, IncompatibleInputs, OutputExists, storage_errors
from megatron_demix.huggingface.config import (
    ModelArguments,
    check_expressible,
    from_huggingface,
    from_megatron,
    read_config,
    to_huggingface,
)
from megatron_demix.huggingface.folder import COMPANIONS, copy_companions, write_weights
from megatron_demix.huggingface.names import Parameter, parameters, part_shapes, split, stack_shape
from megatron_demix.progress import progress_bar

_SHARD_BYTES = 4 << 30


def export_checkpoint(
    checkpoint: Path,
    output: Path,
    *,
    reference: Path | None = None,
    vocab_size: int | None = None,
    shard_bytes: int = _SHARD_BYTES,
    progress: bool = True,
) -> None:
    """Write the model of a checkpoint to `output` as safetensors with config.json and, where known, its tokenizer.

    checkpoint: a run's root, an iter_* or release folder; a merged one too. Optimizer and random state stay behind.
    reference: a Hugging Face folder whose configuration and tokenizer are taken; default: the huggingface/ folder that an
    import left beside the checkpoint, if it is there. Without one, config.json follows the arguments saved in the checkpoint,
    and vocab_size (default: all rows, padding included, and a warning) says how many rows of the embedding are kept.

    At most `shard_bytes` are in memory. Raises ConfigError, IncompatibleInputs, CorruptInput, OutputExists, StorageError;
    nothing is then at `output`.
    """
    output = resolved(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputExists(f"{output} exists. Nothing is overwritten: move it away or choose another output.")
    opened = Checkpoint(Path(checkpoint))
    where = str(opened.location.path)
    beside = opened.location.root / COMPANIONS
    reference = reference or (beside if (beside / "config.json").is_file() else None)
    saved = saved_arguments(opened)
    model = _model(opened, saved, reference, vocab_size)
    source = _Source(opened, model, where)
    if reference is None and vocab_size is None:
        print(f"warning: {where}: {_without_reference(saved, model.vocab_size)}", file=sys.stderr)
    config = read_config(reference) if reference else to_huggingface(model, source.dtype)
    if reference:
        config |= {key: source.dtype for key in ("dtype", "torch_dtype") if key in config}
    sizes = source.sizes()
    temporary = temporary_beside(output)
    try:
        with storage_errors(f"writing {output}"):
            output.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(output.parent)
            temporary.mkdir()
            if reference:
                copy_companions(reference, temporary)
            (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            with progress_bar(f"exporting {output.name}", sum(sizes.values()), unit="bytes", enabled=progress) as advance:
                write_weights(temporary, sizes, source.tensors(advance), shard_bytes)
            for path in (*temporary.iterdir(), temporary):
                sync_path(path)
            rename_new(temporary, output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _model(checkpoint: Checkpoint, saved: dict[str, Any], reference: Path | None, vocab_size: int | None) -> ModelArguments:
    where = str(checkpoint.location.path)
    embedding = checkpoint.model_tensors.get(EMBEDDING)
    if embedding is None:
        raise IncompatibleInputs(f"{where}: has no {EMBEDDING!r}; only GPT models are exported.")
    rows = embedding.shape[0]
    if vocab_size is not None and not 1 <= vocab_size <= rows:
        raise ConfigError(f"--vocab-size is {vocab_size}, expected 1 to {rows}: the rows of the embedding of {where}.")
    if reference is None:
        return from_megatron(saved, vocab_size or rows, where)
    if vocab_size is not None:
        raise ConfigError("--vocab-size and --reference both say how large the vocabulary is. Give one of them.")
    check_expressible(saved, where)
    model = from_huggingface(read_config(reference), str(reference))
    if saved.keys() >= DESCRIBING:
        # Shapes are compared later; this finds what shapes do not show.
        trained = from_megatron(saved, model.vocab_size, where)
        free = {"vocab_size", "max_position_embeddings", "moe_aux_loss_coeff"}
        if model.num_experts is None:
            free |= {"moe_router_topk", "moe_router_pre_softmax", "moe_ffn_hidden_size"}
        if not model.use_rope_scaling and not trained.use_rope_scaling:
            free.add("rope_scaling_factor")
        for name, value in vars(trained).items():
            if name not in free and value != getattr(model, name):
                raise IncompatibleInputs(
                    f"{where} was trained with {name} {value}, but {reference / 'config.json'} means "
                    f"{getattr(model, name)}. Give a reference of the same architecture, or none."
                )
    return model


def _without_reference(saved: dict[str, Any], rows: int) -> str:
    known = saved.get("vocab_size")
    if isinstance(known, int) and 0 < known <= rows:
        padding = f"{rows - known} of them padding (trained with vocab_size {known})"
    else:
        padding = "with what they were padded by, which its saved arguments do not say"
    return (
        f"no import left a Hugging Face configuration beside it. All {rows} rows of the vocabulary are written, {padding}, and "
        "neither tokenizer nor generation_config.json. Give --reference HF_DIR for the model's own, or --vocab-size N."
    )


class _Source:
    """The checkpoint's tensors under their Hugging Face names, checked against the model."""

    def __init__(self, checkpoint: Checkpoint, model: ModelArguments, where: str) -> None:
        self._reader, self._model = ElementReader(checkpoint), model
        self._table = parameters(model)
        keys = [parameter.key for parameter in self._table]
        self._stored = with_keys(checkpoint.model_tensors, keys)
        for parameter in self._table:
            self._check(parameter, where)
        if unused := sorted(self._stored.keys() - set(keys)):
            raise IncompatibleInputs(
                f"{where}: has {len(unused)} tensors that a {model.family.model_type} model has not, such as {unused[0]!r}. "
                "Exporting without them would give another model."
            )

    def _check(self, parameter: Parameter, where: str) -> None:
        info = self._stored.get(parameter.key)
        if info is None:
            raise IncompatibleInputs(f"{where}: has no {parameter.key!r}, which a {self._model.family.model_type} model needs.")
        expected = (*stack_shape(parameter, self._model), *parameter.shape)
        fits = info.shape == expected
        if parameter.vocabulary:
            fits = info.shape[1:] == expected[1:] and info.shape[0] >= expected[0]
        if not fits:
            raise IncompatibleInputs(
                f"{where}: {info.key!r} has shape {list(info.shape)}, expected {list(expected)}"
                f"{' or more rows' if parameter.vocabulary else ''}."
            )

    @property
    def dtype(self) -> str:
        return self._stored[EMBEDDING].dtype

    def sizes(self) -> dict[str, int]:
        """Bytes of every Hugging Face tensor, in the order of tensors()."""
        return {
            name: math.prod(shape) * ARRAY_DTYPES[self._stored[parameter.key].dtype].itemsize
            for parameter in self._table
            for at in self._positions(parameter)
            for name, shape in zip(parameter.names(at), part_shapes(parameter, self._model), strict=True)
        }

    def tensors(self, advance: Any) -> Iterator[tuple[str, str, np.ndarray]]:
        """(name, dtype, array) of every Hugging Face tensor."""
        for parameter in self._table:
            info = self._stored[parameter.key]
            for at in self._positions(parameter):
                offset = (*at, *(0 for _ in parameter.shape))
                box = self._reader.read(info, offset, (*(1 for _ in at), *parameter.shape)).reshape(parameter.shape)
                for name, part in zip(parameter.names(at), split(parameter, box, self._model), strict=True):
                    yield name, info.dtype, part
                    advance(part.nbytes)

    def _positions(self, parameter: Parameter) -> Iterator[tuple[int, ...]]:
        return iter(np.ndindex(*stack_shape(parameter, self._model)))
