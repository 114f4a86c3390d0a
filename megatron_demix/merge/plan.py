"""Which bytes of which component make which bytes of which target: the intersections of the components' chunks.

A target is a box of a global tensor: a chunk of an output, or a parameter of a live model. Components may be cut differently
(other tensor, pipeline or expert parallelism): the cuts of all of them together divide the target into regions in which each
component is one strided view.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from megatron_demix.checkpoint.dtypes import ITEM_BYTES
from megatron_demix.checkpoint.metadata import Shape, TensorInfo
from megatron_demix.errors import CorruptInput
from megatron_demix.merge.components import Components
from megatron_demix.native import MergePlan, crc32, default_threads


@dataclass(frozen=True, slots=True)
class Box:
    """A target: where it lies in a global tensor, and the type its elements are written in."""

    key: str
    offset: Shape
    shape: Shape
    dtype: str


@dataclass(slots=True)
class _Region:
    """A part of a target, in its own coordinates, and where each component's elements for it begin and how they are spaced."""

    lo: list[int]
    hi: list[int]
    records: list[int] = field(default_factory=list)
    byte_offsets: list[int] = field(default_factory=list)
    strides: list[Shape] = field(default_factory=list)


class BytePlan:
    """A native plan over components, and what its records are called in messages."""

    def __init__(self, components: Components) -> None:
        self.components = components
        self.native = MergePlan(len(components.checkpoints))
        self.boxes: list[Box] = []
        self._records: dict[tuple[int, str, Shape], int] = {}
        self._names: list[str] = []
        self._crcs: list[int] = []

    def add(self, box: Box) -> None:
        """Plan one more target. Raises CorruptInput if a component has no elements for a part of it."""
        infos = self.components.infos(box.key)
        self.boxes.append(box)
        num_elements = math.prod(box.shape)
        regions = []
        if num_elements:
            grids = [_Grid(info) for info in infos]
            regions = [self._region(box, infos, grids, lo, hi) for lo, hi in _cells(box, grids)]
        if len(regions) == 1 and all(_is_contiguous(box.shape, strides) for strides in regions[0].strides):
            # One run: the native side can then cut it anywhere, so that tiles of a file stay aligned.
            target = self.native.add_target([num_elements], infos[0].dtype, box.dtype)
            one = regions[0]
            self.native.add_region(target, [0], [num_elements], one.records, one.byte_offsets, [(1,)] * len(infos))
            return
        target = self.native.add_target(box.shape or (1,), infos[0].dtype, box.dtype)
        for region in regions:
            self.native.add_region(target, region.lo, region.hi, region.records, region.byte_offsets, region.strides)

    def damaged(self, threads: int | None = None) -> str | None:
        """The first record whose bytes differ from their checksum, by name, or None. Reads every record that is used, whole."""
        with ThreadPoolExecutor(threads or default_threads()) as pool:
            for index, crc in enumerate(pool.map(crc32, self.native.records)):
                if crc != self._crcs[index]:
                    return self._names[index]
        return None

    def record_name(self, index: int) -> str:
        """The file, tensor and chunk a record was read from."""
        return self._names[index]

    def _region(self, box: Box, infos: Sequence[TensorInfo], grids: Sequence[_Grid], lo: Shape, hi: Shape) -> _Region:
        region = _Region(
            [a - o for a, o in zip(lo, box.offset, strict=True)], [b - o for b, o in zip(hi, box.offset, strict=True)]
        )
        for k, (info, grid) in enumerate(zip(infos, grids, strict=True)):
            index = grid.holding(lo, hi)
            if index is None:
                raise CorruptInput(
                    f"{self.components.checkpoints[k].location.path}: no chunk of {box.key!r} holds elements {lo} to {hi}. "
                    "The checkpoint was not saved by all ranks."
                )
            record, offset, strides = self._source(k, info, index, lo)
            region.records.append(record)
            region.byte_offsets.append(offset)
            region.strides.append(strides)
        return region

    def _source(self, k: int, info: TensorInfo, index: int, lo: Shape) -> tuple[int, int, Shape]:
        chunk, payload = info.chunks[index], self.components.payload(k, info, index)
        at = (k, info.key, chunk.offset)
        if at not in self._records:
            self._records[at] = self.native.add_record(payload.record, payload.crc)
            self._crcs.append(payload.crc)
            folder = self.components.checkpoints[k].location.path
            self._names.append(f"{folder / chunk.location.file} ({info.key!r} at {chunk.offset})")
        inside = sum((a - o) * s for a, o, s in zip(lo, chunk.offset, payload.strides, strict=True))
        return self._records[at], payload.offset_bytes + inside * ITEM_BYTES[info.dtype], payload.strides


class _Grid:
    """A tensor's chunks, for finding the one that holds a box."""

    def __init__(self, info: TensorInfo) -> None:
        dims = len(info.shape)
        self.lo = np.array([c.offset for c in info.chunks], np.int64).reshape(len(info.chunks), dims)
        self.hi = self.lo + np.array([c.shape for c in info.chunks], np.int64).reshape(len(info.chunks), dims)

    def holding(self, lo: Shape, hi: Shape) -> int | None:
        inside = ((self.lo <= np.array(lo, np.int64)) & (self.hi >= np.array(hi, np.int64))).all(axis=1)
        found = np.flatnonzero(inside)
        return int(found[0]) if found.size else None

    def cuts(self, axis: int, lo: int, hi: int, touching: np.ndarray) -> set[int]:
        edges = np.concatenate([self.lo[touching, axis], self.hi[touching, axis]])
        return set(edges[(edges > lo) & (edges < hi)].tolist())

    def touching(self, lo: Sequence[int], hi: Sequence[int]) -> np.ndarray:
        return np.asarray(((self.lo < np.array(hi, np.int64)) & (self.hi > np.array(lo, np.int64))).all(axis=1))


def _cells(box: Box, grids: Sequence[_Grid]) -> list[tuple[Shape, Shape]]:
    """The box cut wherever a chunk of any component ends: (lo, hi) in global coordinates, in order."""
    lo = box.offset
    hi = tuple(o + n for o, n in zip(box.offset, box.shape, strict=True))
    touching = [grid.touching(lo, hi) for grid in grids]
    spans = []
    for axis in range(len(box.shape)):
        cuts = set().union(*(g.cuts(axis, lo[axis], hi[axis], t) for g, t in zip(grids, touching, strict=True)))
        edges = [lo[axis], *sorted(cuts), hi[axis]]
        spans.append(list(itertools.pairwise(edges)))
    return [(tuple(a for a, _ in cell), tuple(b for _, b in cell)) for cell in itertools.product(*spans)]


def _is_contiguous(shape: Shape, strides: Shape) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
