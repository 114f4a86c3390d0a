"""One torch_dist folder, written and read through megatron.core by all ranks: each its part, and the same bytes each time."""

from __future__ import annotations

import pickle
import queue
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy, TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import StorageMeta

from megatron_demix.artifact import write_atomic
from megatron_demix.checkpoint.layout import METADATA

_TORCH_SAVE_FAILED = ("PytorchStreamWriter failed", "unexpected pos", "iostream error")
"""Parts of the messages torch.save has for a disk that takes no more; it does not pass on the errno."""
_CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}


def content() -> dict[str, Any]:
    """What the states of a model and its optimizer are made with: the layout of what is saved."""
    return _CONTENT | {"dp_cp_group": _replicas()}


def _replicas() -> torch.distributed.ProcessGroup:
    """The ranks that hold the same tensors as this one."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def write(state: dict[str, Any], folder: Path) -> None:
    """Save what all ranks hold. Of what replicas share each writes a part, which follows from names and sizes."""
    _seed_results_queue()
    strategy: Any = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    if _replicas().size() > 1:
        strategy = FullyParallelSaveStrategyWrapper(strategy, _replicas())
    with _numpy_product():
        dist_checkpointing.save(state, str(folder), strategy, content_metadata=_CONTENT)
    if torch.distributed.get_rank() == 0:
        _forget_where_and_when(folder / METADATA)


def read(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Load what all ranks ask for. Where all read one folder, each replica reads a part and sends it to the others."""
    strategy: Any = TorchDistLoadShardedStrategy()
    if _replicas().size() > 1:
        folders: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(folders, str(folder))
        if len(set(folders)) == 1:
            strategy = FullyParallelLoadStrategyWrapper(strategy, _replicas())
    with _numpy_product():
        return dist_checkpointing.load(state, str(folder), strategy)


def _numpy_product() -> AbstractContextManager[Any]:
    """megatron.core 0.15 multiplies sizes, to share out the work, with a function that numpy 2 no longer has."""
    return nullcontext() if hasattr(np, "product") else mock.patch.object(np, "product", np.prod, create=True)


def _seed_results_queue() -> None:
    """Spare the first save a spawned manager process, which would import the main script again: megatron.core asks for a
    queue between processes even where, as here, the save is synchronous and a plain one does."""
    if getattr(filesystem_async, "_results_queue", False) is None:
        filesystem_async._results_queue = queue.Queue()


def _forget_where_and_when(path: Path) -> None:
    """Rewrite `.metadata` without the folder it was written to, its random save id, and the save plans that repeat it."""
    metadata = pickle.loads(path.read_bytes())  # written a moment ago by this process
    metadata.storage_meta = StorageMeta()
    if hasattr(metadata, "all_local_plans"):
        del metadata.all_local_plans
    write_atomic(path, pickle.dumps(metadata))


def first_line(error: BaseException) -> str:
    """The innermost message of an error that wraps a rank's traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).rstrip(".")


def is_writing_failed(error: BaseException) -> bool:
    """Whether a disk took no more. DCP raises an error of its own, on every rank, when the writer of one of them failed."""
    return isinstance(error, CheckpointException) or any(said in str(error) for said in _TORCH_SAVE_FAILED)
