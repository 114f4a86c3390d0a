"""Files: maps of those that may be cut short, space for those that will be written."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_demix.native.core import core


class MappedFile:
    """A file's `data`, uint8, mapped for as long as an array of it is there. If it is cut short, or its disk fails, while it is
    read: zeros from there on, and `lost`, not the end of the process (csrc/mapped_file.hpp)."""

    def __init__(self, path: Path, place: int = 0) -> None:
        """place: files that are read side by side, at the same positions, should have different ones. Raises OSError."""
        self._file = core.MappedFile(os.fsencode(path), place)
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

    def touch(self, positions: Sequence[int]) -> None:
        """Have the pages of these bytes in memory on return. Tens of threads wait for the disk at once."""
        self._file.touch(positions, _WAIT_AT_ONCE)

    @staticmethod
    def leave_pages(files: Sequence[MappedFile], threads: int) -> None:
        """Take the pages of files out of their maps, on several threads; what is read again is mapped again. Ending a map does
        it on one."""
        core.MappedFile.leave_pages([file._file for file in files], threads)


_WAIT_AT_ONCE = 32
"""Reads of a page: enough for the latency of a disk across a network, and few enough for its servers."""


def reserve(descriptor: int, num_bytes: int) -> None:
    """Make a file at least this long and take the space now, so that a full disk is noticed before the work; where its file
    system cannot (NFS 3 and 4.1, Lustre, GPFS), only make it that long. Raises OSError.

    Nothing is written, so several processes may do it to one file, each while others write to it. Not os.posix_fallocate: where
    a file system cannot, it reads a byte of every block and writes it back, over what others wrote in between.
    """
    code = core.fallocate(descriptor, num_bytes)
    if code in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
        if os.fstat(descriptor).st_size < num_bytes:
            os.ftruncate(descriptor, num_bytes)
    elif code:
        raise OSError(code, os.strerror(code))
