"""Components kept in GPU memory: a proxy is then one pass over it; nothing is read from disk or sent over the bus."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_demix.checkpoint.dtypes import ITEM_BYTES
from megatron_demix.checkpoint.live import LiveTensor
from megatron_demix.merge import cuda
from megatron_demix.merge.components import Components
from megatron_demix.merge.plan import Box, BytePlan

if TYPE_CHECKING:
    import torch

# Left to the model's activations when the components move in.
_FREE_SHARE = 0.5
# Bytes that are pinned, or one tensor: each replica on a node has a buffer, and what is pinned counts against a job's memory.
_STAGED = 256 << 20
_ALIGNMENT = 256


class ResidentComponents:
    """For every live tensor, the K components' elements as K device tensors in the components' own type."""

    def __init__(self, components: Components, live: Sequence[LiveTensor], threads: int | None) -> None:
        """Reads each component once, a group of tensors at a time, through one pinned buffer."""
        import torch

        num_components = len(components.checkpoints)
        self._sources: list[list[torch.Tensor]] = [[] for _ in live]
        groups = _groups([t.tensor.numel() * ITEM_BYTES[components.tensors[t.key].dtype] for t in live])
        pin = any(t.tensor.device.type == "cuda" for t in live)
        pinned = torch.empty(max((end for _, end in groups), default=0), dtype=torch.uint8, pin_memory=pin)
        for members, _ in groups:
            plan = BytePlan(components)
            staged = []
            for t, at in members:
                tensor, dtype = live[t], components.tensors[live[t].key].dtype
                plan.add(Box(tensor.key, tuple(tensor.global_offset), tensor.box_shape, dtype))
                size = tensor.tensor.numel() * ITEM_BYTES[dtype]
                staged.append(pinned[at : at + size].view(getattr(torch, dtype)).view(tensor.tensor.shape))
            addresses_TM = np.array([[s.data_ptr()] for s in staged], np.int64).reshape(len(staged), 1)
            for one_hot in np.eye(num_components):
                plan.native.run(one_hot.reshape(1, 1, num_components), addresses_TM=addresses_TM, threads=threads)
                for (t, _), buffer in zip(members, staged, strict=True):
                    self._sources[t].append(buffer.to(live[t].tensor.device, copy=True))

    def merge(self, weights_MK: np.ndarray, models: Sequence[Sequence[torch.Tensor]]) -> None:
        """Write mixture m into models[m]: contiguous tensors like the live ones, on their device. Bits as on the CPU."""
        for sources, *outs in zip(self._sources, *models, strict=True):
            if outs[0].numel():
                cuda.weighted_sum(sources, outs, weights_MK)


def _groups(sizes: Sequence[int]) -> list[tuple[list[tuple[int, int]], int]]:
    """Tensors of these sizes, in order, in groups: of each ([(tensor, where it lies in a buffer)], bytes of the buffer)."""
    groups: list[tuple[list[tuple[int, int]], int]] = []
    for t, size in enumerate(sizes):
        members, end = groups.pop() if groups and groups[-1][1] + size <= _STAGED else ([], 0)
        groups.append(([*members, (t, end)], end + -(-size // _ALIGNMENT) * _ALIGNMENT))
    return groups


def fits_on_device(components: Components, live: Sequence[LiveTensor], device: torch.device) -> bool:
    """Whether the device has room for the components' parts of the live tensors."""
    import torch

    needed = sum(t.tensor.numel() * ITEM_BYTES[components.tensors[t.key].dtype] for t in live) * len(components.checkpoints)
    free, _ = torch.cuda.mem_get_info(device)
    return needed <= free * _FREE_SHARE
