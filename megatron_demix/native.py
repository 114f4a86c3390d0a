"""The only importer of the compiled core. Checks what the core takes for granted (dtype, contiguity, bounds), passes addresses.

Everything here is safe to call with any arguments of the annotated types; the core behind it is not.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_demix import _core


def num_threads() -> int:
    """Processors this process may use (its affinity mask, as SLURM and containers set it)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- indexed data and blends (csrc/index_file, csrc/blend_index) -----------------------------------------------------------


@dataclass(frozen=True)
class IndexCheck:
    """What the core found in an .idx. problem 0: sound; else an IndexProblem of csrc/index_file.hpp, at entry `at`."""

    problem: int
    at: int
    seen: int
    expected: int
    dtype_code: int
    sequences: int
    boundaries: int
    modes: bool
    tokens: int


def _address(array: np.ndarray, dtype: type | None = None) -> int:
    if not array.flags.c_contiguous or (dtype is not None and array.dtype != dtype):
        raise TypeError(f"expected a contiguous {np.dtype(dtype)} array, got {array.dtype}, strides {array.strides}")
    return array.__array_interface__["data"][0]


def check_index(data: np.ndarray, bin_bytes: int) -> IndexCheck:
    """Check the bytes of an .idx (uint8) whose pointers lead into a .bin of bin_bytes."""
    return IndexCheck(*_core.check_index(_address(data, np.uint8), data.size, bin_bytes))


class DocumentStream:
    """A domain's documents without end: all of them once in a seeded order, then all again in another, and so on.

    sources: (lengths int32[n], pointers int64[n], base) of each indexed data set; base is where its .bin begins in the pool,
    in bytes. Takes no memory per document; keeps the arrays alive.
    """

    def __init__(self, sources: Sequence[tuple[np.ndarray, np.ndarray, int]], seed: int) -> None:
        self._sources = list(sources)
        table = []
        for lengths, pointers, base in self._sources:
            if len(lengths) != len(pointers):
                raise ValueError(f"{len(lengths)} lengths but {len(pointers)} pointers")
            table.append((_address(lengths, np.int32), _address(pointers, np.int64), len(lengths), base))
        self.native = _core.Stream(table, seed)
        if self.documents < 1:
            raise ValueError("a stream needs at least one document")

    @property
    def documents(self) -> int:
        """Documents of one epoch."""
        return self.native.documents

    def read(self, begin: int, count: int, *, threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Lengths (int32) and pool pointers (int64) of stream positions [begin, begin + count)."""
        if begin < 0 or count < 0:
            raise ValueError(f"stream positions [{begin}, {begin + count}) are not positions")
        lengths, pointers = np.empty(count, np.int32), np.empty(count, np.int64)
        self.native.fill(begin, count, _address(lengths), _address(pointers), threads)
        return lengths, pointers

    def advance(self, begin: int, budget: int, epoch_tokens: int, *, threads: int = 1) -> tuple[int, int, int]:
        """How far `budget` tokens reach from position `begin`: (documents, their tokens, tokens of the next document).

        epoch_tokens: the tokens of all documents together, which the caller knows; it must be true and positive.
        """
        if begin < 0 or budget < 0 or epoch_tokens < 1:
            raise ValueError(f"cannot advance by {budget} tokens from {begin} with {epoch_tokens} tokens an epoch")
        return self.native.advance(begin, budget, epoch_tokens, threads)


@dataclass(frozen=True)
class StreamPart:
    """`documents` documents of a stream from position `begin` on, `tokens` tokens in all."""

    stream: DocumentStream
    begin: int
    documents: int
    tokens: int


def interleave(
    parts: Sequence[StreamPart], lengths: np.ndarray, pointers: np.ndarray, part_of: np.ndarray, *, threads: int = 1
) -> list[tuple[int, int]]:
    """Write the parts' documents in an order that is even at every scale; see csrc/blend_index.hpp.

    lengths int32[n], pointers int64[n], part_of uint16[n], n = all documents. Returns, for each part, how many tokens any
    prefix is ahead of and behind its share, at most.
    """
    total = sum(p.documents for p in parts)
    if not (len(lengths) == len(pointers) == len(part_of) == total):
        raise ValueError(f"{total} documents do not fit arrays of {len(lengths)}, {len(pointers)}, {len(part_of)}")
    if len(parts) > 65536:
        raise ValueError(f"{len(parts)} parts; at most 65536 fit a uint16")
    table = [(p.stream.native, p.begin, p.documents, p.tokens) for p in parts]
    return _core.interleave(
        table, _address(lengths, np.int32), _address(pointers, np.int64), _address(part_of, np.uint16), threads
    )


def gather(
    lengths: np.ndarray,
    pointers: np.ndarray,
    begin: int,
    end: int,
    item_bytes: int,
    pool: Sequence[tuple[np.ndarray, int]],
    descriptor: int,
    offset: int,
    *,
    threads: int = 1,
) -> None:
    """Copy documents [begin, end) of an index over the pool to an open file, one after another, from byte `offset` on.

    pool: (bytes of a .bin as uint8, its base), in order of base, end to end. The pointers must have been checked. OSError.
    """
    if not 0 <= begin <= end <= len(lengths) == len(pointers):
        raise ValueError(f"documents [{begin}, {end}) of {len(lengths)}")
    spans = [(_address(data, np.uint8), base, data.size) for data, base in pool]
    code = _core.gather(
        _address(lengths, np.int32), _address(pointers, np.int64), begin, end, item_bytes, spans, descriptor, offset, threads
    )
    if code:
        raise OSError(code, os.strerror(code))


def hash_documents(content: np.ndarray, offsets: np.ndarray, seed: int) -> np.ndarray:
    """uint64[n]: a seeded hash of each document content[offsets[i]:offsets[i + 1]] (uint8; int64[n + 1])."""
    if len(offsets) < 1 or offsets[0] < 0 or offsets[-1] > content.size or np.any(np.diff(offsets) < 0):
        raise ValueError("offsets do not lie within the content")
    out = np.empty(len(offsets) - 1, np.uint64)
    _core.hash_documents(_address(content, np.uint8), _address(offsets, np.int64), len(out), seed, _address(out))
    return out
