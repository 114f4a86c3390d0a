"""How a merge cuts a tensor anew: into chunks of a size that suits readers, whatever the components were saved by."""

from __future__ import annotations

import itertools
import math

from megatron_demix.checkpoint.dtypes import ITEM_BYTES
from megatron_demix.checkpoint.metadata import Shape, TensorInfo
from megatron_demix.merge.logical_tensors import num_stacked


def cut_anew(info: TensorInfo, max_bytes: int) -> list[tuple[Shape, Shape]]:
    """(offset, shape) of boxes that tile a tensor, in order: contiguous, of at most max_bytes (or one element).

    Never more than one layer or expert a box: Megatron's loader reads each by itself, and a whole box for any part of it.
    """
    stack = num_stacked(info.key, info.shape)
    wanted = max(1, max_bytes // ITEM_BYTES[info.dtype])
    sizes = [1] * stack
    for axis in range(stack, len(info.shape)):
        below = math.prod(info.shape[axis + 1 :])
        sizes.append(max(1, min(info.shape[axis], wanted // max(1, below))))
    spans = [
        [(at, min(size, total - at)) for at in range(0, total, size)] or [(0, 0)]
        for size, total in zip(sizes, info.shape, strict=True)
    ]
    return [(tuple(a for a, _ in box), tuple(n for _, n in box)) for box in itertools.product(*spans)]
