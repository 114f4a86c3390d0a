"""Reading indexed data: everything in the .idx is checked before any of it is believed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_demix import native
from megatron_demix.errors import CorruptInput
from megatron_demix.indexed.format import DTYPES, HEADER_BYTES, bin_path, idx_path

_SHORTER = "{} became shorter, or its disk failed, while it was read. Copy it again from its source, and leave it alone."


@dataclass(frozen=True)
class Index:
    """A checked .idx, mapped into memory.

    lengths: int32 [S] tokens; pointers: int64 [S] bytes into the .bin; documents: int64 [D + 1] first sequences. The arrays
    are views of the file, read-only and not aligned.
    """

    prefix: Path
    dtype: np.dtype
    lengths: np.ndarray
    pointers: np.ndarray
    documents: np.ndarray
    num_tokens: int
    bin_bytes: int
    is_view: bool
    """True where pointers repeat, permute or leave gaps: tools that rebuild pointers from lengths would corrupt it."""
    file: native.MappedFile | None = None
    """What the arrays are views of. It keeps no descriptor, so that thousands can be open at once."""

    def check_still_there(self) -> None:
        """Raises CorruptInput if zeros have been read in the place of what was there."""
        if self.file is not None and self.file.lost:
            raise CorruptInput(_SHORTER.format(idx_path(self.prefix)))

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def num_documents(self) -> int:
        return len(self.documents) - 1

    @property
    def has_several_sequences(self) -> bool:
        """Whether a document has several sequences, which GPTDataset would shuffle apart. One without any is no harm."""
        return any(
            np.diff(self.documents[start : start + _CHUNK + 1]).max() > 1 for start in range(0, self.num_documents, _CHUNK)
        )


_CHUNK = 1 << 20


def read_index(prefix: Path | str) -> Index:
    """Map and check `prefix`.idx against the size of `prefix`.bin. Raises CorruptInput naming file, place, seen, expected."""
    idx, data = idx_path(prefix), bin_path(prefix)
    for path in (idx, data):
        if not path.is_file():
            hint = f" Did you mean {str(prefix)[:-4]}?" if str(prefix).endswith((".bin", ".idx")) else ""
            raise CorruptInput(f"{path} does not exist. An indexed data set is a prefix with a .bin and an .idx file.{hint}")
    try:
        file = native.MappedFile(idx)
        bin_bytes = data.stat().st_size
    except OSError as e:
        raise CorruptInput(f"{idx} cannot be read: {e.strerror}.") from e
    raw = file.data
    facts = native.check_index(raw, bin_bytes)
    if facts.problem:
        raise CorruptInput(f"{idx}: {_explain(facts, bin_bytes)} Copy it again from its source, or prepare the data again.")
    sequences, boundaries = facts.sequences, facts.boundaries
    lengths = np.frombuffer(raw, "<i4", sequences, HEADER_BYTES)
    pointers = np.frombuffer(raw, "<i8", sequences, HEADER_BYTES + 4 * sequences)
    documents = np.frombuffer(raw, "<i8", boundaries, HEADER_BYTES + 12 * sequences)
    dtype = DTYPES[facts.dtype_code]
    index = Index(Path(prefix), dtype, lengths, pointers, documents, facts.tokens, bin_bytes, not facts.end_to_end, file)
    index.check_still_there()
    return index


def _explain(facts: native.IndexCheck, bin_bytes: int) -> str:
    at, seen, expected = facts.at, facts.seen, facts.expected
    match facts.problem:
        case 1:
            return f"{seen} bytes, shorter than the header of {expected} bytes."
        case 2:
            return "does not begin with Megatron's magic bytes MMIDIDX; it is not an index, or a damaged one."
        case 3:
            return f"version {seen}, expected 1."
        case 4:
            return f"dtype code {seen}, expected 1 to 8."
        case 5:
            asks = "more than it holds" if expected < 0 else f"{expected} bytes"
            return f"{seen} bytes, but its header asks for {asks}: it is truncated, or longer than it should be."
        case 6:
            return f"sequence {at} has length {seen}, expected >= 0."
        case 7:
            return (
                f"sequence {at} begins at byte {seen} of the .bin, but the last byte where it fits is {expected} "
                f"(the .bin has {bin_bytes} bytes: it is truncated, or belongs to another .idx)."
            )
        case 8:
            return f"the first document begins at sequence {seen}, expected 0."
        case 9:
            return f"document boundary {at} is {seen}, before the one it follows ({expected})."
        case 10:
            return f"the last document ends at sequence {seen}, expected {expected}, the number of sequences."
    raise AssertionError(f"unknown index problem {facts.problem}")


class IndexedReader:
    """Token ids of an indexed data set, straight from the mapped .bin. It keeps no descriptor either."""

    def __init__(self, prefix: Path | str) -> None:
        self.index = read_index(prefix)
        try:
            self._file = native.MappedFile(bin_path(prefix)) if self.index.bin_bytes else None
        except OSError as e:
            raise CorruptInput(f"{bin_path(prefix)} cannot be read: {e.strerror}.") from e
        self._bytes = self._file.data if self._file else np.empty(0, np.uint8)
        self.check_still_there()

    def check_still_there(self) -> None:
        """Raises CorruptInput if zeros may have been read in the place of what was there."""
        self.index.check_still_there()
        if self._file and (self._file.lost or self._bytes.size < self.index.bin_bytes):
            raise CorruptInput(_SHORTER.format(bin_path(self.index.prefix)))

    @property
    def num_documents(self) -> int:
        return self.index.num_documents

    def sequence(self, number: int) -> np.ndarray:
        """Token ids of one sequence; a read-only view, not necessarily aligned."""
        if not 0 <= number < self.index.num_sequences:
            raise IndexError(f"sequence {number} of {self.index.num_sequences} in {self.index.prefix}")
        pointer, length = int(self.index.pointers[number]), int(self.index.lengths[number])
        self.check_still_there()
        return np.frombuffer(self._bytes, self.index.dtype, length, pointer)

    def tokens(self, document: int) -> np.ndarray:
        """Token ids of one document."""
        if not 0 <= document < self.index.num_documents:
            raise IndexError(f"document {document} of {self.index.num_documents} in {self.index.prefix}")
        first, last = int(self.index.documents[document]), int(self.index.documents[document + 1])
        self.index.check_still_there()
        if last == first + 1:
            return self.sequence(first)
        return np.concatenate([np.empty(0, self.index.dtype), *(self.sequence(s) for s in range(first, last))])
