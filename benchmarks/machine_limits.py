"""What a machine can do at best with files, memory and multiply-adds: what others are measured against."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np


def drop_from_cache(files: Sequence[Path]) -> None:
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_files(paths: list[Path], threads: int) -> None:
    """Every byte of the files into a small buffer, by the cheaper of the ordinary ways."""

    def one(path: Path) -> None:
        buffer = bytearray(1 << 20)
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, paths))


def write_files(folder: Path, num_bytes: int, threads: int) -> None:
    """As many bytes as a merge writes, from one buffer, past the page cache where the file system can."""
    folder.mkdir(parents=True, exist_ok=True)
    block = mmap.mmap(-1, 1 << 20)
    share = num_bytes // threads // len(block) * len(block)

    def one(n: int) -> None:
        path = folder / f"{n}"
        flags = os.O_WRONLY | os.O_CREAT
        try:
            descriptor = os.open(path, flags | os.O_DIRECT)
        except OSError:
            descriptor = os.open(path, flags)
        os.posix_fallocate(descriptor, 0, share)
        for at in range(0, share, len(block)):
            os.pwrite(descriptor, block, at)
        os.fsync(descriptor)
        os.close(descriptor)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, range(threads)))


def read_memory(arrays: list[np.ndarray], threads: int) -> None:
    """Load every word once: what reading memory costs without arithmetic."""

    def one(array: np.ndarray) -> None:
        words = array[: array.size // 8 * 8]
        if words.ctypes.data % 8 == 0:
            np.bitwise_or.reduce(words.view(np.uint64))
        else:
            at = -words.ctypes.data % 8
            np.bitwise_or.reduce(words[at : at + (words.size - at) // 8 * 8].view(np.uint64))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, arrays))


def multiply_adds_a_second() -> float:
    """Of one thread, in float32: those of a large matrix product."""
    from threadpoolctl import threadpool_limits

    n, best = 1024, float("inf")
    a, b = np.ones((n, n), np.float32), np.ones((n, n), np.float32)
    with threadpool_limits(1):
        for _ in range(10):
            started = time.perf_counter()
            a @ b
            best = min(best, time.perf_counter() - started)
    return n**3 / best
