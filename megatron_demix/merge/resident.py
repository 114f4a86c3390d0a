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


class ResidentComponents:
    """For every live tensor, the K components' elements as K device tensors in the components' own type."""

    def __init__(self, components: Components, live: Sequence[LiveTensor], threads: int | None) -> None:
        """Reads each component once, through one pinned buffer for each tensor."""
        import torch

        plan = BytePlan(components)
        staged = []
        for tensor in live:
            dtype = components.tensors[tensor.key].dtype
            plan.add(Box(tensor.key, tuple(tensor.global_offset), tensor.box_shape, dtype))
            staged.append(torch.empty(tensor.tensor.shape, dtype=getattr(torch, dtype), pin_memory=True))
        addresses_TM = np.array([[s.data_ptr()] for s in staged], np.int64).reshape(len(staged), 1)
        self._sources: list[list[torch.Tensor]] = [[] for _ in live]
        num_components = len(components.checkpoints)
        for k in range(num_components):
            one_hot = np.eye(num_components)[k].reshape(1, 1, num_components)
            plan.native.run(one_hot, addresses_TM=addresses_TM, threads=threads)
            for t, buffer in enumerate(staged):
                self._sources[t].append(buffer.to(live[t].tensor.device, copy=True))

    def merge(self, weights_MK: np.ndarray, models: Sequence[Sequence[torch.Tensor]]) -> None:
        """Write mixture m into models[m]: contiguous tensors like the live ones, on their device. Bits as on the CPU."""
        for sources, *outs in zip(self._sources, *models, strict=True):
            if outs[0].numel():
                cuda.weighted_sum(sources, outs, weights_MK)


def fits_on_device(components: Components, live: Sequence[LiveTensor], device: torch.device) -> bool:
    """Whether the device has room for the components' parts of the live tensors."""
    import torch

    needed = sum(t.tensor.numel() * ITEM_BYTES[components.tensors[t.key].dtype] for t in live) * len(components.checkpoints)
    free, _ = torch.cuda.mem_get_info(device)
    return needed <= free * _FREE_SHARE
