"""Ranks that wait for others that work. What a model takes to be scored differs from model to model, and may be longer than any
collective should take (train.timeout): such waits are no sign of a lost rank."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from megatron.core import parallel_state

_TIMEOUT = timedelta(days=365)


class Patience:
    """Made by all ranks together, once megatron.core's groups are there. gloo beside NCCL, too: a rank that ends without having
    come ends the wait with an error, and one that works does not, however long it takes."""

    def __init__(self) -> None:
        self._all = self._replica = None
        if torch.distributed.get_world_size() == 1:
            return
        replicas = [0] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(replicas, parallel_state.get_expert_data_parallel_rank())
        groups = [[rank for rank, replica in enumerate(replicas) if replica == n] for n in range(max(replicas) + 1)]
        self._all = torch.distributed.new_group(backend="gloo", timeout=_TIMEOUT)
        self._replica, _ = torch.distributed.new_subgroups_by_enumeration(groups, backend="gloo", timeout=_TIMEOUT)

    def wait_for_all(self) -> None:
        if self._all is not None:
            torch.distributed.barrier(group=self._all)

    def of_first(self, value: Any) -> Any:
        """Rank 0's value, on all ranks: of a file system that machines share, one may see an older state than another."""
        if self._all is None:
            return value
        shared = [value]
        torch.distributed.broadcast_object_list(shared, src=0, group=self._all)
        return shared[0]

    def gathered(self, value: Any) -> list[Any]:
        """All ranks' values in their order, on rank 0; nothing on the others. They wait for each other."""
        if self._all is None:
            return [value]
        first = torch.distributed.get_rank() == 0
        values: list[Any] | None = [None] * torch.distributed.get_world_size() if first else None
        torch.distributed.gather_object(value, values, dst=0, group=self._all)
        return values or []

    def wait_for_replica(self) -> None:
        """For the ranks that have the same model, each a part, experts included."""
        if self._replica is not None:
            torch.distributed.barrier(group=self._replica)
