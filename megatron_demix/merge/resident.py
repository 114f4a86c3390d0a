"""Components kept in GPU memory: a proxy is then one pass over it; nothing is read from disk or sent over the bus."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_demix.checkpoint.dtypes import ITEM_BYTES
from megatron_demix.checkpoint.live import LiveTensor
from megatron_demix.errors import VerificationFailed
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

        self._live = [tensor.tensor.data for tensor in live]
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
                self._sources[t].append(buffer.to(self._live[t].device, copy=True))

    def merge(self, coefficients_K: np.ndarray) -> None:
        """Write the sum into the live tensors. Same bits as the merge on the CPU."""
        for sources, target in zip(self._sources, self._live, strict=True):
            if target.numel():
                cuda.weighted_sum(sources, [target], coefficients_K[np.newaxis])

    def check(self, expected: torch.Tensor, index: int) -> None:
        """Compare one live tensor with what the CPU made of it. Raises VerificationFailed."""
        import torch

        found = self._live[index].cpu()
        if not torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)):
            raise VerificationFailed(
                "the CUDA merge and the CPU merge of one tensor differ. Set MEGATRON_DEMIX_CUDA=0 to merge on the CPU, and "
                "report the GPU, driver and CUDA version."
            )


def fits_on_device(components: Components, live: Sequence[LiveTensor]) -> bool:
    """Whether all live tensors are on one GPU that the kernels run on, with room for the components' parts of them."""
    devices = {tensor.tensor.device for tensor in live}
    if len(devices) != 1 or next(iter(devices)).type != "cuda" or len(components.checkpoints) > cuda.MAX_SOURCES:
        return False
    if not all(tensor.tensor.is_contiguous() for tensor in live) or not cuda.available():
        return False
    import torch

    needed = sum(t.tensor.numel() * ITEM_BYTES[components.tensors[t.key].dtype] for t in live) * len(components.checkpoints)
    free, _ = torch.cuda.mem_get_info(next(iter(devices)))
    return needed <= free * _FREE_SHARE
