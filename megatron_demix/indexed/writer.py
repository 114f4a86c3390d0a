"""Writing indexed data, in batches of whole documents: the same bytes Megatron's own builder writes, without its loop."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import numpy as np

from megatron_demix.errors import IncompatibleInputs, storage_errors
from megatron_demix.indexed.format import HEADER_BYTES, bin_path, header, idx_path

_CHUNK = 1 << 20


def write_index(
    path: Path, dtype: np.dtype, lengths: np.ndarray, *, pointers: np.ndarray | None = None, documents: np.ndarray | None = None
) -> None:
    """Write one .idx file. lengths [S] in tokens; pointers [S] in bytes, default end to end; documents [D + 1], default one
    sequence a document. Extra memory is bounded, whatever S. Raises StorageError."""
    sequences = len(lengths)
    boundaries = sequences + 1 if documents is None else len(documents)
    with storage_errors(f"writing {path}"), open(path, "wb") as file:
        file.write(header(dtype, sequences, boundaries))
        for start in range(0, sequences, _CHUNK):
            file.write(np.ascontiguousarray(lengths[start : start + _CHUNK], "<i4").data)
        byte = 0
        for start in range(0, sequences, _CHUNK):
            if pointers is not None:
                block = np.ascontiguousarray(pointers[start : start + _CHUNK], "<i8")
            else:
                sizes = lengths[start : start + _CHUNK].astype("<i8") * np.dtype(dtype).itemsize
                block = byte + np.cumsum(sizes) - sizes
                byte += int(sizes.sum())
            file.write(block.data)
        for start in range(0, boundaries, _CHUNK):
            stop = min(start + _CHUNK, boundaries)
            block = np.arange(start, stop, dtype="<i8") if documents is None else np.asarray(documents[start:stop], "<i8")
            file.write(np.ascontiguousarray(block).data)


def index_bytes(sequences: int, boundaries: int) -> int:
    """Size of an .idx without modes."""
    return HEADER_BYTES + 12 * sequences + 8 * boundaries


class IndexedWriter:
    """Appends documents to `prefix`.bin; close() writes `prefix`.idx. As a context manager, an error leaves no .idx behind."""

    def __init__(self, prefix: Path | str, dtype: np.dtype) -> None:
        self.prefix, self.dtype = Path(prefix), np.dtype(dtype)
        self._lengths: list[np.ndarray] = []
        self._sequences_a_document: list[np.ndarray] = []
        with storage_errors(f"writing {bin_path(prefix)}"):
            self._file = open(bin_path(prefix), "wb")  # noqa: SIM115

    def add(self, tokens: np.ndarray, lengths: np.ndarray, *, sequences_a_document: np.ndarray | None = None) -> None:
        """Append sequences: tokens [N] ids laid end to end, lengths [S] summing to N.

        sequences_a_document [D], summing to S, groups them into documents (default: each is one). Raises IncompatibleInputs
        if an id does not fit the dtype, StorageError.
        """
        lengths = np.asarray(lengths)
        if int(lengths.sum(dtype=np.int64)) != len(tokens) or (lengths.size and lengths.min() < 0):
            raise ValueError(f"{len(tokens)} tokens, but the lengths sum to {lengths.sum(dtype=np.int64)}")
        if lengths.size and int(lengths.max()) > np.iinfo(np.int32).max:
            raise IncompatibleInputs(f"{self.prefix}: a document of {lengths.max()} tokens; the format holds 2^31 - 1 at most.")
        if len(tokens) and (int(tokens.max()) > np.iinfo(self.dtype).max or int(tokens.min()) < 0):
            raise IncompatibleInputs(
                f"{self.prefix}: token ids {tokens.min()} to {tokens.max()} do not fit {self.dtype}. "
                "Was the writer opened for another vocabulary?"
            )
        with storage_errors(f"writing {bin_path(self.prefix)}"):
            self._file.write(np.ascontiguousarray(tokens, self.dtype).data)
        self._lengths.append(lengths.astype("<i4"))
        groups = np.ones(len(lengths), np.int64) if sequences_a_document is None else np.asarray(sequences_a_document, np.int64)
        if int(groups.sum()) != len(lengths):
            raise ValueError(f"{len(lengths)} sequences, but the documents hold {groups.sum()}")
        self._sequences_a_document.append(groups)

    def close(self) -> None:
        lengths = np.concatenate([np.empty(0, "<i4"), *self._lengths])
        groups = np.concatenate([np.empty(0, np.int64), *self._sequences_a_document])
        with storage_errors(f"writing {bin_path(self.prefix)}"):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        documents = np.concatenate([[0], np.cumsum(groups)])
        write_index(idx_path(self.prefix), self.dtype, lengths, documents=documents)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()
