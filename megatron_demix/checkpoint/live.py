"""A live model's parameters, named as its checkpoint would name them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LiveTensor:
    """One local parameter (a view) of a live model, as a box of a checkpoint's global tensor.

    tensor may have fewer dimensions than global_shape (Megatron stacks layers as [L, ...]): the missing leading ones are 1.
    """

    key: str
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    tensor: torch.Tensor

    @property
    def box_shape(self) -> tuple[int, ...]:
        """The tensor's shape with the leading ones of global_shape."""
        return (1,) * (len(self.global_shape) - self.tensor.dim()) + tuple(self.tensor.shape)
