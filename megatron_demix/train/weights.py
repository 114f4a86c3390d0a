"""The weights of a checkpoint, saved at any layout, into a model that has the same tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.models.gpt import GPTModel
from torch.distributed.checkpoint.api import CheckpointException

from megatron_demix.checkpoint.common_state import check_loadable
from megatron_demix.checkpoint.layers import known_as
from megatron_demix.checkpoint.model_function import EMBEDDING, differing, model_function, model_sizes
from megatron_demix.checkpoint.reader import Checkpoint
from megatron_demix.checkpoint.run_config import saved_arguments
from megatron_demix.errors import CorruptInput, DemixError, IncompatibleInputs
from megatron_demix.study.training import ModelSpec
from megatron_demix.train.torch_dist import first_line, read


def load_weights(
    model: GPTModel, folder: Path, *, vocab_size: int | None = None, arguments: Mapping[str, Any] | None = None
) -> None:
    """Load the weights of a checkpoint, saved at any layout, into this rank's GPTModel (without wrappers).

    All ranks call it together. Replicas share the reading of one checkpoint, or each reads one of its own.
    folder: anything checkpoint.layout.find_checkpoint accepts. The checkpoint has to hold this model's tensors, no more and no
    fewer; the norm before experts may have the name that it has with, or without, Transformer Engine. vocab_size: where given,
    an embedding that was padded otherwise is accepted if it has that many rows. arguments: the model's
    (derived.model_arguments); where given, saved arguments that make another function of the weights are refused.
    Raises IncompatibleInputs naming the first tensor that does not fit, or every such argument, CorruptInput for metadata that
    is damaged or unsafe, for a file that is missing, and for a tensor whose bytes differ from their checksum, at which torch
    does not look.
    """
    stored = Checkpoint(folder)  # reads .metadata without running it, which megatron.core's reader would
    check_loadable(stored)
    path = stored.location.path
    # Extra states carry nothing for these layer specs, and whoever converts checkpoints leaves them out. Transformer Engine's
    # experts have one each: _extra_state, _extra_state1, ...
    wanted = {k: v for k, v in model.sharded_state_dict().items() if "_extra_state" not in k}
    shapes = {key: info.shape for key, info in stored.model_tensors.items()}
    tensors = [tensor for tensor in nested_values(wanted) if isinstance(tensor, ShardedTensor)]
    keys = {tensor.key for tensor in tensors}
    for tensor in tensors:
        tensor.key = known_as(tensor.key, keys, shapes)
    if misfit := _misfit(_global_shapes(wanted), shapes, vocab_size):
        sizes = arguments and _unlike(arguments, stored, model_sizes)
        said = f" It was saved with {sizes}." if sizes else ""
        raise IncompatibleInputs(f"checkpoint {path} does not fit the model: {misfit}.{said}")
    if arguments is not None and (unlike := _unlike(arguments, stored, model_function)):
        raise IncompatibleInputs(
            f"checkpoint {path} fits the model, which would make another function of its weights: it was saved with {unlike}."
        )
    _check_bytes(stored)
    try:
        loaded = read({"model": wanted}, path)["model"]
    except (CheckpointException, CheckpointingException) as e:
        raise CorruptInput(f"checkpoint {path}: cannot be loaded: {first_line(e)}.") from e
    model.load_state_dict(loaded, strict=False)  # not strict for the extra states; all else has been compared


def _check_bytes(stored: Checkpoint) -> None:
    """Compare the model's tensors with their checksums, shared out among the ranks that load this checkpoint. Where one finds
    something wrong all raise it."""
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    folders: list[Any] = [None] * num_ranks
    torch.distributed.all_gather_object(folders, str(stored.location.path))
    together = [r for r in range(num_ranks) if folders[r] == folders[rank]]
    items = {(chunk.location, info.key) for info in stored.model_tensors.values() for chunk in info.chunks}
    mine = sorted(items, key=lambda item: (item[0].file, item[0].position))[together.index(rank) :: len(together)]
    error = None
    try:
        for location, key in mine:
            stored.sound_blob(location, key)
        stored.check_still_there()
    except DemixError as e:
        error = e
    errors: list[Any] = [None] * num_ranks
    torch.distributed.all_gather_object(errors, error)
    for found in errors:
        if found:
            raise found


def _unlike(arguments: Mapping[str, Any], stored: Checkpoint, about: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> str:
    """In which flags what `about` says of a model's arguments differs from what it says of the saved ones, in words. What one
    of them does not say is not compared; empty if nothing differs."""
    given, saved = about(arguments), about(saved_arguments(stored))
    return ", ".join(
        f"--{name.replace('_', '-')} {value} (given: {given[name]})"
        if name in ModelSpec.model_fields
        else f"{name} {value} (always {given[name]} here)"
        for name, value in differing(given, saved).items()
    )


def _global_shapes(wanted: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the whole model's tensors, of all pipeline stages, by checkpoint key."""
    built = dict(wanted)
    apply_factories(built)
    mine = {t.key: tuple(t.global_shape) for t in nested_values(built) if isinstance(t, ShardedTensor)}
    stages: list[Any] = [None] * parallel_state.get_pipeline_model_parallel_world_size()
    torch.distributed.all_gather_object(stages, mine, group=parallel_state.get_pipeline_model_parallel_group())
    return {key: shape for stage in stages for key, shape in stage.items()}


_ROWS_ARE_VOCABULARY = (EMBEDDING, "output_layer.weight", "output_layer.bias")
_MOST_PADDING = 128 * 64
"""Rows that Megatron-LM pads a vocabulary with at most, up to 64-way tensor parallelism."""


def _misfit(wanted: dict[str, tuple[int, ...]], stored: dict[str, tuple[int, ...]], vocab_size: int | None) -> str | None:
    """The first tensor that one side lacks or that has another shape, in words."""
    for key, shape in wanted.items():
        found = stored.get(key)
        if found is None:
            return f"it has no {key}, expected shape {list(shape)}"
        padded = (
            vocab_size is not None
            and key in _ROWS_ARE_VOCABULARY
            and found[1:] == shape[1:]
            and vocab_size <= found[0] < vocab_size + _MOST_PADDING
        )
        if found != shape and not padded:
            return f"{key} has shape {list(found)}, expected {list(shape)}"
    unused = sorted(set(stored) - set(wanted))
    return f"it also has {unused[0]}, which the model has not" if unused else None
