"""Small indexed data sets and pools for tests."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_demix.data.pool import Pool, Source
from megatron_demix.indexed.format import HEADER_BYTES, token_dtype
from megatron_demix.indexed.writer import IndexedWriter, write_index


def make_indexed(prefix: Path, lengths: Sequence[int], *, seed: int = 0, vocab_size: int = 50000) -> Path:
    """Documents of these lengths, random ids below vocab_size."""
    lengths = np.asarray(lengths, np.int64)
    tokens = np.random.default_rng(seed).integers(0, vocab_size, int(lengths.sum()))
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(prefix, token_dtype(vocab_size)) as writer:
        writer.add(tokens, lengths)
    return prefix


def write_view(path: Path, dtype: np.dtype, lengths: np.ndarray, pointers: np.ndarray) -> None:
    """An .idx whose sequences begin at any bytes of the .bin, which more than one may share."""
    write_index(path, dtype, lengths)
    with open(path, "r+b") as file:
        file.seek(HEADER_BYTES + 4 * len(lengths))
        file.write(np.ascontiguousarray(pointers, "<i8").data)


def make_pool(
    folder: Path, lengths: Mapping[str, Sequence[int] | Sequence[Sequence[int]]], *, max_epochs: float = 4.0, **options
) -> Pool:
    """One domain per entry; nested lists give it several indexed data sets."""
    pool = Pool()
    for number, (name, parts) in enumerate(lengths.items()):
        nested = parts if len(parts) and isinstance(parts[0], list | tuple | np.ndarray) else [parts]
        prefixes = [
            make_indexed(folder / f"{name}_{i}", part, seed=100 * number + i, **options) for i, part in enumerate(nested)
        ]
        pool[name] = Source(tuple(prefixes), max_epochs)
    return pool
