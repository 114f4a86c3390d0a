"""Writing indexed data, in batches of whole documents: the same bytes Megatron's own builder writes, without its loop."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from megatron_demix.errors import IncompatibleInputs, storage_errors
from megatron_demix.indexed.format import bin_path, header, idx_path

_CHUNK = 1 << 20


def write_index(path: Path, dtype: np.dtype, lengths: np.ndarray, *, documents: np.ndarray | None = None) -> None:
    """Write the .idx of sequences that lie end to end. lengths [S] in tokens; documents [D + 1], default one sequence a
    document. Extra memory is bounded, whatever S. Raises StorageError."""
    sequences = len(lengths)
    boundaries = sequences + 1 if documents is None else len(documents)
    with storage_errors(f"writing {path}"), open(path, "wb") as file:
        file.write(header(dtype, sequences, boundaries))
        for start in range(0, sequences, _CHUNK):
            file.write(np.ascontiguousarray(lengths[start : start + _CHUNK], "<i4").data)
        byte = 0
        for start in range(0, sequences, _CHUNK):
            sizes = lengths[start : start + _CHUNK].astype("<i8") * np.dtype(dtype).itemsize
            file.write((byte + np.cumsum(sizes) - sizes).data)
            byte += int(sizes.sum())
        for start in range(0, boundaries, _CHUNK):
            stop = min(start + _CHUNK, boundaries)
            block = np.arange(start, stop, dtype="<i8") if documents is None else np.asarray(documents[start:stop], "<i8")
            file.write(np.ascontiguousarray(block).data)


@dataclass(frozen=True)
class Written:
    """How far a writer has come: all that is needed to go on from there."""

    bin_bytes: int = 0
    sequences: int = 0
    documents: int = 0


class IndexedWriter:
    """Appends documents to `prefix`.bin; close() writes `prefix`.idx.

    Lengths wait in scratch files beside the .bin, so memory does not grow with the data and a killed run can go on: what
    checkpoint() returned and still lies on disk is kept by a writer opened with it as `resume`, what came later is cut off.
    sentences: documents may consist of several sequences. As a context manager, an error leaves no .idx.
    """

    def __init__(self, prefix: Path | str, dtype: np.dtype, *, sentences: bool = False, resume: Written | None = None) -> None:
        self.prefix, self.dtype, self.sentences = Path(prefix), np.dtype(dtype), sentences
        self.written = resume or Written()
        self._bin = self._open(bin_path(prefix), self.written.bin_bytes)
        self._lengths = self._open(self._scratch("lengths"), 4 * self.written.sequences)
        self._groups = self._open(self._scratch("groups"), 4 * self.written.documents) if sentences else None

    def _scratch(self, what: str) -> Path:
        return Path(f"{self.prefix}.{what}")

    def _open(self, path: Path, keep: int) -> BinaryIO:
        with storage_errors(f"writing {path}"):
            file = open(path, "r+b" if keep else "wb")  # noqa: SIM115
            if file.seek(0, os.SEEK_END) < keep:
                raise ValueError(f"{path} has {file.tell()} bytes, expected {keep} from before")
            file.seek(keep)
            if keep:
                file.truncate()
        return file

    def _files(self) -> list[BinaryIO]:
        return [file for file in (self._bin, self._lengths, self._groups) if file is not None]

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
        if (
            tokens.dtype != self.dtype
            and len(tokens)
            and (int(tokens.max()) > np.iinfo(self.dtype).max or int(tokens.min()) < 0)
        ):
            raise IncompatibleInputs(
                f"{self.prefix}: token ids {tokens.min()} to {tokens.max()} do not fit {self.dtype}. "
                "Was the writer opened for another vocabulary?"
            )
        if sequences_a_document is not None and (not self.sentences or int(np.sum(sequences_a_document)) != len(lengths)):
            raise ValueError(f"{len(lengths)} sequences cannot be grouped by {np.sum(sequences_a_document)}")
        groups = np.ones(len(lengths), "<i4") if sequences_a_document is None else np.asarray(sequences_a_document, "<i4")
        with storage_errors(f"writing {bin_path(self.prefix)}"):
            self._bin.write(np.ascontiguousarray(tokens, self.dtype).data)
            self._lengths.write(lengths.astype("<i4").data)
            if self._groups is not None:
                self._groups.write(groups.data)
        before = self.written
        self.written = Written(
            before.bin_bytes + len(tokens) * self.dtype.itemsize,
            before.sequences + len(lengths),
            before.documents + len(groups),
        )

    def append(self, prefix: Path, written: Written) -> None:
        """Append what a writer of the same dtype at `prefix` had checkpointed when it was abandoned. Raises StorageError."""
        sizes = {"bin": written.bin_bytes, "lengths": 4 * written.sequences, "groups": 4 * written.documents}
        with storage_errors(f"writing {bin_path(self.prefix)}"):
            for (what, size), file in zip(sizes.items(), self._files(), strict=False):
                with open(f"{prefix}.{what}", "rb") as source:
                    shutil.copyfileobj(source, file, _CHUNK)
                    if source.tell() != size:
                        raise ValueError(f"{prefix}.{what} has {source.tell()} bytes, expected {size}")
        before = self.written
        self.written = Written(
            before.bin_bytes + written.bin_bytes,
            before.sequences + written.sequences,
            before.documents + written.documents,
        )

    def checkpoint(self) -> Written:
        """Make all that was added last a power cut; what a later writer resumes from."""
        with storage_errors(f"writing {bin_path(self.prefix)}"):
            for file in self._files():
                file.flush()
                os.fsync(file.fileno())
        return self.written

    def close(self) -> None:
        """Write the .idx, make both files last, and remove the scratch."""
        with storage_errors(f"writing {bin_path(self.prefix)}"):
            self._bin.flush()
            os.fsync(self._bin.fileno())
            for file in self._files():
                file.close()
        lengths = _mapped(self._scratch("lengths"))
        documents = np.concatenate([[0], np.cumsum(_mapped(self._scratch("groups")), dtype="<i8")]) if self.sentences else None
        write_index(idx_path(self.prefix), self.dtype, lengths, documents=documents)
        with storage_errors(f"writing {idx_path(self.prefix)}"), open(idx_path(self.prefix), "rb+") as index:
            os.fsync(index.fileno())
        del lengths
        self._scratch("lengths").unlink()
        if self.sentences:
            self._scratch("groups").unlink()

    def abandon(self) -> None:
        """Close the files as they are; a later writer may resume from the last checkpoint."""
        for file in self._files():
            file.close()

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


def _mapped(path: Path) -> np.ndarray:
    return np.memmap(path, "<i4", mode="r") if path.stat().st_size else np.empty(0, "<i4")
