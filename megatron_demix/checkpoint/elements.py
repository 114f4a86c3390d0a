"""Elements of a checkpoint's tensors as arrays, whatever the chunks they are stored in."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from megatron_demix.checkpoint.dtypes import ARRAY_DTYPES
from megatron_demix.checkpoint.grid import Grid
from megatron_demix.checkpoint.metadata import Chunk, Shape, TensorInfo
from megatron_demix.checkpoint.reader import Checkpoint
from megatron_demix.errors import CorruptInput, IncompatibleInputs
from megatron_demix.native import crc32


class ElementReader:
    """Reads boxes of a checkpoint's tensors. Each chunk's checksum is compared when the first of its elements is read."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._sound: set[tuple[str, Shape]] = set()
        self._grids: dict[str, Grid] = {}

    def read(self, info: TensorInfo, offset: Sequence[int], shape: Sequence[int]) -> np.ndarray:
        """The box of `shape` at `offset` of a tensor, as ARRAY_DTYPES[info.dtype].

        Raises IncompatibleInputs for other types, CorruptInput for damaged chunks and for elements that no chunk holds.
        """
        if info.dtype not in ARRAY_DTYPES:
            raise IncompatibleInputs(
                f"{self._checkpoint.location.path}: {info.key!r} is {info.dtype}, expected one of {', '.join(ARRAY_DTYPES)}."
            )
        box = np.empty(tuple(shape), ARRAY_DTYPES[info.dtype])
        found = 0
        if info.key not in self._grids:
            self._grids[info.key] = Grid(info)
        end = [o + n for o, n in zip(offset, shape, strict=True)]
        for index in np.flatnonzero(self._grids[info.key].touching(offset, end)):
            chunk = info.chunks[index]
            lo = [max(o, c) for o, c in zip(offset, chunk.offset, strict=True)]
            hi = [min(e, c + m) for e, c, m in zip(end, chunk.offset, chunk.shape, strict=True)]
            there = tuple(slice(a - o, b - o) for a, b, o in zip(lo, hi, offset, strict=True))
            here = tuple(slice(a - c, b - c) for a, b, c in zip(lo, hi, chunk.offset, strict=True))
            box[there] = self._chunk(info, chunk)[here]
            found += math.prod(b - a for a, b in zip(lo, hi, strict=True))
        if found != box.size:
            raise CorruptInput(
                f"{self._checkpoint.location.path}: {box.size - found} of {box.size} elements of {info.key!r} at "
                f"{tuple(offset)} are in no chunk. The checkpoint was not saved by all ranks."
            )
        return box

    def _chunk(self, info: TensorInfo, chunk: Chunk) -> np.ndarray:
        payload = self._checkpoint.payload(info, chunk)
        if (info.key, chunk.offset) not in self._sound:
            if crc32(payload.record) != payload.crc:
                raise CorruptInput(
                    f"{self._checkpoint.location.path / chunk.location.file} ({info.key!r} at {chunk.offset}): its bytes "
                    "differ from their checksum. Copy or save the checkpoint again."
                )
            self._sound.add((info.key, chunk.offset))
        dtype = ARRAY_DTYPES[info.dtype]
        strides = [s * dtype.itemsize for s in payload.strides]
        return np.ndarray(chunk.shape, dtype, payload.record.data, payload.offset_bytes, strides)
