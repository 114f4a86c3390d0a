"""A tensor's chunks as boxes: which of them hold a part of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_demix.checkpoint.metadata import Shape, TensorInfo


class Grid:
    """Of one tensor. lo, hi: int64 [chunks, dims], where each begins and ends."""

    def __init__(self, info: TensorInfo) -> None:
        dims = len(info.shape)
        self.lo = np.array([c.offset for c in info.chunks], np.int64).reshape(len(info.chunks), dims)
        self.hi = self.lo + np.array([c.shape for c in info.chunks], np.int64).reshape(len(info.chunks), dims)
        self._exactly = {
            (lo, hi): i
            for i, (lo, hi) in enumerate(zip(map(tuple, self.lo.tolist()), map(tuple, self.hi.tolist()), strict=True))
        }

    def holding(self, lo: Shape, hi: Shape) -> int | None:
        """A chunk that holds the box [lo, hi), if one does."""
        if (found := self._exactly.get((lo, hi))) is not None:
            return found
        inside = ((self.lo <= np.array(lo, np.int64)) & (self.hi >= np.array(hi, np.int64))).all(axis=1)
        holders = np.flatnonzero(inside)
        return int(holders[0]) if holders.size else None

    def cuts(self, axis: int, lo: int, hi: int, touching: np.ndarray) -> set[int]:
        """Where chunks end within (lo, hi) along an axis. touching: which chunks count."""
        edges = np.concatenate([self.lo[touching, axis], self.hi[touching, axis]])
        return set(edges[(edges > lo) & (edges < hi)].tolist())

    def touching(self, lo: Sequence[int], hi: Sequence[int]) -> np.ndarray:
        """bool [chunks]: which of them have elements of the box [lo, hi)."""
        return np.asarray(((self.lo < np.array(hi, np.int64)) & (self.hi > np.array(lo, np.int64))).all(axis=1))
