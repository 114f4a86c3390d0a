"""Which bytes of which component make which bytes of which target: the intersections of the components' chunks.

A target is a box of a global tensor: a chunk of an output, or a parameter of a live model. Components may be cut differently
(other tensor, pipeline or expert parallelism): the cuts of all of them together divide the target into regions in which each
component is one strided view.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_demix.checkpoint.dtypes import ITEM_BYTES
from megatron_demix.checkpoint.grid import Grid
from megatron_demix.checkpoint.metadata import Chunk, Shape, TensorInfo
from megatron_demix.errors import CorruptInput
from megatron_demix.merge.components import Components
from megatron_demix.merge.logical_tensors import Cut, Part, Partition
from megatron_demix.native import MergePlan, crc32, default_threads

# An element that is NaN or infinite has all bits of the exponent.
_EXPONENTS: dict[str, tuple[np.dtype, Any]] = {
    "float32": (np.dtype("<u4"), np.uint32(0x7F800000)),
    "bfloat16": (np.dtype("<u2"), np.uint16(0x7F80)),
    "float16": (np.dtype("<u2"), np.uint16(0x7C00)),
}
_LOOKED_AT_ONCE = 1 << 22
"""Elements: what is made of them takes memory, and tensors may be of any size."""


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
    part: int = 0
    index: int = 0
    index_strides: Shape = ()

    @property
    def views(self) -> list[Shape]:
        """All strides that its elements are followed by."""
        return [*self.strides, self.index_strides] if self.index_strides else self.strides


class BytePlan:
    """A native plan over components, and what its records are called in messages."""

    def __init__(self, components: Components, partition: Partition | None = None) -> None:
        """partition: the logical tensors that regions must not cross; the weights and rules of part s are set s then.

        `parts`: those that some target has elements of.
        """
        self.components = components
        self.partition = partition
        self.native = MergePlan(len(components.checkpoints))
        self.boxes: list[Box] = []
        self.parts: set[int] = set()
        self._records: dict[tuple[int, str, int], int] = {}
        self._chunks: list[tuple[int, str, Chunk]] = []
        self._crcs: list[int] = []

    def add(self, box: Box) -> None:
        """Plan one more target. Raises CorruptInput if a component has no elements for a part of it."""
        infos = self.components.infos(box.key)
        self.boxes.append(box)
        num_elements = math.prod(box.shape)
        regions: list[_Region] = []
        if num_elements:
            grids = self.components.grids(box.key)
            for cut in self._cuts(box):
                self.parts.add(cut.part)
                for lo, hi in _cells(cut.lo, cut.hi, grids):
                    region = self._region(infos, grids, lo, hi, box.offset)
                    steps = zip(lo, cut.lo, cut.index_strides, strict=True) if cut.index_strides else ()
                    region.part, region.index = cut.part, cut.index + sum((a - b) * s for a, b, s in steps)
                    region.index_strides = cut.index_strides
                    regions.append(region)
        if len(regions) == 1 and all(_is_contiguous(box.shape, strides) for strides in regions[0].views):
            # One run: the native side can then cut it anywhere, so that tiles of a file stay aligned.
            target = self.native.add_target([num_elements], _dtypes(infos), box.dtype)
            one = regions[0]
            regions = [
                _Region([0], [num_elements], one.records, one.byte_offsets, [(1,)] * len(infos), one.part, one.index,
                        (1,) if one.index_strides else ())
            ]  # fmt: skip
        else:
            target = self.native.add_target(box.shape or (1,), _dtypes(infos), box.dtype)
        self._add_regions(target, regions)

    def add_part(self, part: Part) -> int:
        """Plan a whole logical tensor as a target to be read: its rows come in its own order. Returns its index."""
        infos = self.components.infos(part.key)
        shape = (*(1 for _ in part.stack), *part.shape)
        target = self.native.add_target(shape or (1,), _dtypes(infos), infos[0].dtype)
        if not math.prod(shape):
            return target
        grids = self.components.grids(part.key)
        for offset, size, first_row in part.boxes():
            hi = tuple(o + n for o, n in zip(offset, size, strict=True))
            shift = list(offset)
            if part.shape:
                shift[len(part.stack)] -= first_row
            regions = [self._region(infos, grids, a, b, tuple(shift)) for a, b in _cells(offset, hi, grids)]
            for r in regions if not shape else ():
                r.lo, r.hi, r.strides = [0], [1], [(1,)] * len(infos)
            self._add_regions(target, regions)
        return target

    def _cuts(self, box: Box) -> list[Cut]:
        if self.partition is None:
            return [Cut(0, box.offset, tuple(o + n for o, n in zip(box.offset, box.shape, strict=True)), 0, ())]
        return self.partition.cut(box.key, box.offset, box.shape)

    def _add_regions(self, target: int, regions: Sequence[_Region]) -> None:
        for r in regions:
            self.native.add_region(
                target, r.lo, r.hi, r.records, r.byte_offsets, r.strides,
                weight_set=r.part, index=r.index, index_strides=r.index_strides,
            )  # fmt: skip

    def damaged(self, threads: int | None = None) -> str | None:
        """The first record whose bytes differ from their checksum, by name, or None. Reads every record that is used, whole."""
        with ThreadPoolExecutor(threads or default_threads()) as pool:
            for index, crc in enumerate(pool.map(crc32, self.native.records)):
                if crc != self._crcs[index]:
                    return self.record_name(index)
        return None

    def record_name(self, index: int) -> str:
        """The file, tensor and chunk a record was read from."""
        k, key, chunk = self._chunks[index]
        return f"{self.components.checkpoints[k].location.path}/{chunk.location.file} ({key!r} at {chunk.offset})"

    def warn_not_finite(self, targets: Sequence[int], used: Sequence[int]) -> None:
        """Say why results hold NaN or infinity: which component of those used does, or that the sum left its type's range."""
        found: dict[int | None, list[str]] = {}
        for key in dict.fromkeys(self.boxes[index].key for index in targets):
            holders = [k for k in used if self._holds_not_finite(k, key)]
            for k in holders or (None,):
                found.setdefault(k, []).append(key)
        for holder, keys in found.items():
            where = f"{keys[0]!r}" + (f" and {len(keys) - 1} more tensors" if len(keys) > 1 else "")
            said = f"NaN or infinity in what was merged, {where}, but in no component: a sum is too large for its type."
            if holder is not None:
                said = (
                    f"component {self.components.names[holder]!r}: NaN or infinity in {where}, and so in what was merged. A "
                    "component that has diverged is of no use: take an earlier iteration of it."
                )
            warnings.warn(said, stacklevel=2)

    def _holds_not_finite(self, k: int, key: str) -> bool:
        info = self.components.infos(key)[k]
        bits, exponent = _EXPONENTS[info.dtype]
        for index in range(len(info.chunks)):
            record = self.components.payload(k, info, index).record
            elements = record[: record.nbytes // bits.itemsize * bits.itemsize].view(bits)
            for begin in range(0, len(elements), _LOOKED_AT_ONCE):
                if ((elements[begin : begin + _LOOKED_AT_ONCE] & exponent) == exponent).any():
                    return True
        return False

    def _region(self, infos: Sequence[TensorInfo], grids: Sequence[Grid], lo: Shape, hi: Shape, shift: Shape) -> _Region:
        """The region [lo, hi) of the tensor; target coordinates are the tensor's less `shift`."""
        region = _Region([a - o for a, o in zip(lo, shift, strict=True)], [b - o for b, o in zip(hi, shift, strict=True)])
        for k, (info, grid) in enumerate(zip(infos, grids, strict=True)):
            index = grid.holding(lo, hi)
            if index is None:
                raise CorruptInput(
                    f"{self.components.checkpoints[k].location.path}: no chunk of {info.key!r} holds elements {lo} to {hi}. "
                    "The checkpoint was not saved by all ranks."
                )
            record, offset, strides = self._source(k, info, index, lo)
            region.records.append(record)
            region.byte_offsets.append(offset)
            region.strides.append(strides)
        return region

    def _source(self, k: int, info: TensorInfo, index: int, lo: Shape) -> tuple[int, int, Shape]:
        chunk, payload = info.chunks[index], self.components.payload(k, info, index)
        at = (k, chunk.location.file, chunk.location.position)
        if at not in self._records:
            self._records[at] = self.native.add_record(payload.record, payload.crc)
            self._crcs.append(payload.crc)
            self._chunks.append((k, info.key, chunk))
        inside = sum((a - o) * s for a, o, s in zip(lo, chunk.offset, payload.strides, strict=True))
        return self._records[at], payload.offset_bytes + inside * ITEM_BYTES[info.dtype], payload.strides


def _dtypes(infos: Sequence[TensorInfo]) -> list[str]:
    return [info.dtype for info in infos]


def _cells(lo: Shape, hi: Shape, grids: Sequence[Grid]) -> list[tuple[Shape, Shape]]:
    """A box of a tensor cut wherever a chunk of any component ends: (lo, hi) in the tensor's coordinates, in order."""
    if all(grid.holding(lo, hi) is not None for grid in grids):
        return [(lo, hi)]
    touching = [grid.touching(lo, hi) for grid in grids]
    spans = []
    for axis in range(len(lo)):
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
