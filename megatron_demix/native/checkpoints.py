"""Reading checkpoints: maps of files that may be cut short, checksums, a look at pickles before they are read."""

from __future__ import annotations

import mmap
import weakref
from typing import Any

import numpy as np

from megatron_demix.native.core import core


class WatchedMap:
    """A mapped file. If it is cut short, or its disk fails, while it is read: zeros from there on, and `lost`, not the end of
    the process (csrc/mapped_file.hpp). It is watched until it is unmapped."""

    def __init__(self, mapped: mmap.mmap) -> None:
        view = np.frombuffer(mapped, np.uint8)
        self._map: int = core.watch_map(view.ctypes.data, view.nbytes)
        weakref.finalize(mapped, core.unwatch_map, self._map)

    @property
    def lost(self) -> bool:
        return core.is_lost(self._map)


def crc32(buffer: Any) -> int:
    """The CRC-32 of zip files, of any contiguous buffer (bytes, memoryview, array)."""
    return core.crc32(np.frombuffer(buffer, np.uint8) if memoryview(buffer).nbytes else b"")


def scan_pickle(data: bytes) -> int:
    """The offset of the first thing that no honest pickle holds (csrc/pickle_scan.hpp), or -1."""
    return core.pickle_scan(data)
