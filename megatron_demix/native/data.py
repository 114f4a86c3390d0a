"""Indexed data sets and blends: checking, ordering, copying, hashing, tokens and lines of text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_demix.native.core import core


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
    tokens: int
    end_to_end: bool


def _address(array: np.ndarray, dtype: type | None = None) -> int:
    if not array.flags.c_contiguous or (dtype is not None and array.dtype != dtype):
        raise TypeError(f"expected a contiguous {np.dtype(dtype)} array, got {array.dtype}, strides {array.strides}")
    return array.__array_interface__["data"][0]


def check_index(data: np.ndarray, bin_bytes: int) -> IndexCheck:
    """Check the bytes of an .idx (uint8) whose pointers lead into a .bin of bin_bytes."""
    return IndexCheck(*core.check_index(_address(data, np.uint8), data.size, bin_bytes))


class DocumentStream:
    """A domain's documents without end: all of them once in a seeded order, then all again in another, and so on.

    sources: (lengths int32[n], pointers int64[n], base, end_to_end) of each indexed data set; base is where its .bin begins in
    the pool, in bytes; end_to_end: bytes of a token where every document begins where the one before ends, which makes reading
    faster, else 0. Takes no memory per document; keeps the arrays alive.
    """

    def __init__(self, sources: Sequence[tuple[np.ndarray, np.ndarray, int, int]], seed: int) -> None:
        self._sources = list(sources)
        table = []
        for lengths, pointers, base, end_to_end in self._sources:
            if len(lengths) != len(pointers):
                raise ValueError(f"{len(lengths)} lengths but {len(pointers)} pointers")
            item_shift = end_to_end.bit_length() - 1
            table.append((_address(lengths, np.int32), _address(pointers, np.int64), len(lengths), base, item_shift))
        self.native = core.Stream(table, seed)
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


class Interleaver:
    """The parts' documents, given piece by piece in an order that is even at every scale; see csrc/interleave.hpp."""

    def __init__(self, parts: Sequence[StreamPart]) -> None:
        if len(parts) > 65536:
            raise ValueError(f"{len(parts)} parts; at most 65536 fit a uint16")
        self._parts = list(parts)
        self._native = core.Interleaver([(p.stream.native, p.begin, p.documents, p.tokens) for p in parts])

    def next(self, lengths: np.ndarray, pointers: np.ndarray, part_of: np.ndarray, *, threads: int = 1) -> None:
        """Fill the arrays (int32, int64, uint16, of one size) with the next documents: length, pool pointer, part."""
        if not len(lengths) == len(pointers) == len(part_of) <= self._native.left:
            sizes = f"{len(lengths)}, {len(pointers)} and {len(part_of)}"
            raise ValueError(f"arrays of {sizes} documents for the {self._native.left} that are left")
        addresses = _address(lengths, np.int32), _address(pointers, np.int64), _address(part_of, np.uint16)
        self._native.next(len(lengths), *addresses, threads)

    @property
    def drift(self) -> list[tuple[int, int]]:
        """For each part: how many tokens any prefix so far is ahead of and behind its share, at most."""
        return [(self._native.ahead(d), self._native.behind(d)) for d in range(len(self._parts))]


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
) -> int:
    """Copy documents [begin, end) of an index over the pool to an open file, one after another, from byte `offset` on.

    Returns their content digest: the sum of hash_documents of document i with seed i, modulo 2^64.
    pool: (bytes of a .bin as uint8, its base), in order of base, end to end. The pointers must have been checked. OSError.
    """
    if not 0 <= begin <= end <= len(lengths) == len(pointers):
        raise ValueError(f"documents [{begin}, {end}) of {len(lengths)}")
    spans = [(_address(data, np.uint8), base) for data, base in pool]
    code, content = core.gather(
        _address(lengths, np.int32), _address(pointers, np.int64), begin, end, item_bytes, spans, descriptor, offset, threads
    )
    if code:
        raise OSError(code, os.strerror(code))
    return content


def hash_documents(content: np.ndarray, offsets: np.ndarray, seed: int, *, step: int = 0) -> np.ndarray:
    """uint64[n]: a hash of each document content[offsets[i]:offsets[i + 1]] (uint8; int64[n + 1]), with seed + i * step."""
    if len(offsets) < 1 or offsets[0] < 0 or offsets[-1] > content.size or np.any(np.diff(offsets) < 0):
        raise ValueError("offsets do not lie within the content")
    out = np.empty(len(offsets) - 1, np.uint64)
    core.hash_documents(_address(content, np.uint8), _address(offsets, np.int64), len(out), seed, step, _address(out))
    return out


HASH_BLOCK = core.HASH_BLOCK


def hash_file(descriptor: int, begin: int, end: int, *, base: int = 0, threads: int = 1) -> int:
    """The hash (csrc/content_hash.hpp) of bytes [begin, end) of an open file, as if the file began at byte `base`; begin is a
    multiple of HASH_BLOCK from there. Hashes of parts add up, modulo 2^64, to that of the whole. OSError, with EIO where the
    file ends before."""
    if (begin - base) % HASH_BLOCK or not 0 <= base <= begin <= end:
        raise ValueError(f"bytes [{begin}, {end}) do not begin at a block of {HASH_BLOCK} from byte {base} on")
    code, digest = core.hash_file(descriptor, begin, end, base, threads)
    if code:
        raise OSError(code, os.strerror(code))
    return digest


def pack_tokens(
    ids: np.ndarray, offsets: np.ndarray, dtype: np.dtype, eod: int | None, route: np.ndarray | None = None, which: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The documents ids[offsets[i]:offsets[i + 1]] (uint32; int64[D + 1]) with route[i] == which (uint8[D]; all without one),
    end to end, each followed by eod unless that is None. Returns (tokens of `dtype`, lengths int32). The ids must fit."""
    if dtype not in (np.uint16, np.int32):
        raise TypeError(f"tokens are uint16 or int32, not {dtype}")
    lengths = np.diff(offsets) + (eod is not None)
    if len(lengths) and (offsets[0] < 0 or lengths.min() < 0 or offsets[-1] > ids.size):
        raise ValueError("offsets do not lie within the ids")
    if route is not None:
        if len(route) != len(lengths):
            raise ValueError(f"{len(route)} routes for {len(lengths)} documents")
        lengths = lengths[route == which]
    out = np.empty(int(lengths.sum()), dtype)
    core.pack_tokens(
        _address(ids, np.uint32),
        _address(offsets, np.int64),
        len(offsets) - 1,
        0 if route is None else _address(route, np.uint8),
        which,
        -1 if eod is None else eod,
        out.itemsize,
        _address(out),
    )
    return out, lengths.astype(np.int32)


def count_newlines(data: bytes) -> int:
    """data.count(b"\\n"), several times as fast."""
    return core.count_newlines(_address(np.frombuffer(data, np.uint8)), len(data)) if data else 0


def scan_json_lines(data: bytes, key: str, num_lines: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """The string under `key` of every non-blank line: (content uint8 [N], offsets int64 [D + 1], line numbers from 0 [D]).
    num_lines: line ends in data, where they are known.

    None where a line is not UTF-8, not a JSON object with a string there, or one of the rarities csrc/json_lines.hpp lists:
    the caller must then look at each line itself.
    """
    most = (count_newlines(data) if num_lines is None else num_lines) + 1
    raw = np.frombuffer(data, np.uint8) if data else np.empty(0, np.uint8)
    content, offsets, lines = np.empty(len(data), np.uint8), np.empty(most + 1, np.int64), np.empty(most, np.int64)
    documents, size, plain = core.scan_json_lines(
        _address(raw), len(data), key, _address(content), _address(offsets), _address(lines)
    )
    return (content[:size], offsets[: documents + 1], lines[:documents]) if plain else None
