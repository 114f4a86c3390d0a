"""Which bytes a source holds: a hash of all of its .bin, taken at the speed of memory once, and noted."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_demix import native
from megatron_demix.artifact import fingerprint, hash_file, write_json
from megatron_demix.errors import CorruptInput, DemixError
from megatron_demix.indexed.format import bin_path, idx_path
from megatron_demix.indexed.reader import Index
from megatron_demix.progress import Advance, progress_bar

_PART = 256 << 20
# A file changed this recently could change again within one tick of the file system's clock: its hash is not remembered.
_SETTLED_NS = 2_000_000_000


def fingerprint_sources(
    indexes: Sequence[Index],
    *,
    threads: int = 1,
    progress: bool = False,
    beside: bool = False,
    notes: Path | None = None,
) -> list[dict[str, Any]]:
    """What identifies each source: its counts and size, the BLAKE2b digest of its .idx, and the 64-bit hash of all of its .bin
    (csrc/content_hash.hpp: it finds damage and exchanged files, not forgery).

    A hash that an earlier call noted is believed as long as the .bin has the size and the modification time noted there.
    beside: notes lie beside each .bin, in `.<name>.bin.hash.json`. notes: a folder for those that do not, or cannot.
    Raises CorruptInput.
    """
    places = [_places(index, beside, notes) for index in indexes]
    known = [_recall(index, own) for index, own in zip(indexes, places, strict=True)]
    unknown = sum(i.bin_bytes for i, found in zip(indexes, known, strict=True) if found is None)
    facts = []
    with progress_bar("hashing sources", unknown, unit="bytes", enabled=progress and unknown > 0) as advance:
        for index, found, own in zip(indexes, known, places, strict=True):
            hashed = found
            if hashed is None:
                hashed, mtime_ns = hash_bin(bin_path(index.prefix), index.bin_bytes, threads=threads, advance=advance)
                _remember(index, own, hashed, mtime_ns)
            facts.append(
                {
                    "documents": index.num_sequences,
                    "tokens": index.num_tokens,
                    "bin_bytes": index.bin_bytes,
                    "idx_blake2b": _hash_idx(index),
                    "bin_hash64": hashed,
                }
            )
    return facts


def _places(index: Index, beside: bool, notes: Path | None) -> list[Path]:
    """Where a note may lie, the best place first."""
    path = bin_path(index.prefix)
    places = [path.with_name(f".{path.name}.hash.json")] if beside else []
    return places + ([notes / f"{path.name}-{fingerprint(os.path.realpath(path))}.json"] if notes else [])


def _recall(index: Index, places: Sequence[Path]) -> str | None:
    for place in places:
        with suppress(OSError, ValueError, KeyError, TypeError):
            noted = json.loads(place.read_text())
            stat = bin_path(index.prefix).stat()
            if (noted["bytes"], noted["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns) and stat.st_size == index.bin_bytes:
                return str(noted["hash64"])
    return None


def hash_bin(
    path: Path, size: int, *, threads: int = 1, advance: Advance = lambda units=1, *, info=None: None
) -> tuple[str, int]:
    """The 64-bit hash of a .bin of this size, as hex, and its modification time. Raises CorruptInput if it becomes another."""
    try:
        with open(path, "rb") as file:
            before = os.fstat(file.fileno())
            hashed = hash_span(file.fileno(), 0, size, threads=threads, advance=advance)
            after = os.fstat(file.fileno())
    except OSError as e:
        raise CorruptInput(f"{path} cannot be read as {size} bytes: {e.strerror}.") from e
    if (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, after.st_size) or after.st_size != size:
        raise CorruptInput(f"{path} changed while it was read. Wait until it is finished, then run again.")
    return hashed, after.st_mtime_ns


def hash_span(descriptor: int, base: int, size: int, *, threads: int, advance: Advance) -> str:
    """The hash that a .bin of these `size` bytes would have, which lie in an open file from byte `base` on. Raises OSError."""
    total = 0
    for begin in range(base, base + size, _PART):
        end = min(begin + _PART, base + size)
        total += native.hash_file(descriptor, begin, end, base=base, threads=threads)
        advance(end - begin)
    return f"{total % 2**64:016x}"


def _remember(index: Index, places: Sequence[Path], hashed: str, mtime_ns: int) -> None:
    if time.time_ns() - mtime_ns <= _SETTLED_NS:
        return
    for place in places:
        with suppress(OSError, DemixError):  # a folder that cannot be written
            place.parent.mkdir(exist_ok=True)
            write_json(place, {"bytes": index.bin_bytes, "mtime_ns": mtime_ns, "hash64": hashed})
            return


def _hash_idx(index: Index) -> str:
    path = idx_path(index.prefix)
    try:
        return hash_file(path)
    except OSError as e:
        raise CorruptInput(f"{path} cannot be read: {e.strerror}.") from e
