"""Reading checkpoints: maps of files that may be cut short, checksums, a look at pickles before they are read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from megatron_demix.native.core import core


class MappedFile:
    """A file's `data`, uint8, mapped for as long as an array of it is there. If it is cut short, or its disk fails, while it is
    read: zeros from there on, and `lost`, not the end of the process (csrc/mapped_file.hpp)."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self._file = core.MappedFile(os.fsencode(path))
        self.data: np.ndarray = np.frombuffer(self._file, np.uint8)

    @property
    def lost(self) -> bool:
        return self._file.lost

    def expect_scattered_reads(self, scattered: bool) -> None:
        """Whether the disk reads only what is touched, or what follows it as well."""
        self._file.expect_scattered_reads(scattered)

    def want(self, begin: int, end: int) -> None:
        """Have bytes read from the disk soon."""
        self._file.want(begin, end - begin)


def crc32(buffer: Any) -> int:
    """The CRC-32 of zip files, of any contiguous buffer (bytes, memoryview, array)."""
    return core.crc32(np.frombuffer(buffer, np.uint8) if memoryview(buffer).nbytes else b"")


def scan_pickle(data: bytes) -> int:
    """The offset of the first thing that no honest pickle holds (csrc/pickle_scan.hpp), or -1."""
    return core.pickle_scan(data)
