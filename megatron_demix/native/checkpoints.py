"""Reading checkpoints: checksums, a look at pickles before they are read."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_demix.native.core import core


def crc32(buffer: Any) -> int:
    """The CRC-32 of zip files, of any contiguous buffer (bytes, memoryview, array)."""
    return core.crc32(np.frombuffer(buffer, np.uint8) if memoryview(buffer).nbytes else b"")


def scan_pickle(data: bytes) -> int:
    """The offset of the first thing that no honest pickle holds (csrc/pickle_scan.hpp), or -1."""
    return core.pickle_scan(data)
