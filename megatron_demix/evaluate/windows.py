"""The fixed token windows every proxy, reference and final model is scored on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_demix.errors import CorruptInput, IncompatibleInputs
from megatron_demix.indexed.reader import IndexedReader


@dataclass(frozen=True)
class Windows:
    """tokens: int64 [num_windows, seq_length + 1]; target b of row a is tokens[a, b + 1].

    target_bytes: UTF-8 bytes that all targets together stand for, the denominator of bits per byte.
    """

    name: str
    tokens: np.ndarray
    target_bytes: int

    @property
    def num_targets(self) -> int:
        return self.tokens.shape[0] * (self.tokens.shape[1] - 1)


def read_windows(
    name: str, prefixes: Sequence[Path], *, seq_length: int, num_tokens: int, token_bytes: np.ndarray, vocab_size: int
) -> Windows:
    """Whole windows with about num_tokens targets in all (at least one window), spread evenly over a domain's documents.

    The documents are laid end to end; the windows begin at equal distances, so that few tokens still see the whole split.
    Where the split holds no more than num_tokens, no token is scored twice, and fewer than seq_length are left out between the
    windows. Raises CorruptInput if it holds less than one window, IncompatibleInputs if an id exceeds the vocabulary.
    """
    stream = _Stream([IndexedReader(prefix) for prefix in prefixes])
    num_windows = min(max(1, num_tokens // seq_length), (stream.num_tokens - 1) // seq_length)
    if num_windows < 1:
        raise CorruptInput(
            f"domain {name!r}: {', '.join(map(str, prefixes))} holds {stream.num_tokens} tokens, but one evaluation window "
            f"needs {seq_length + 1}. Give it more documents, or give the split a larger share."
        )
    last = stream.num_tokens - seq_length - 1
    starts = [last * w // max(1, num_windows - 1) for w in range(num_windows)]
    tokens = np.stack([stream.read(start, seq_length + 1) for start in starts])
    if (top := int(tokens.max())) >= vocab_size:
        raise IncompatibleInputs(
            f"domain {name!r}: token id {top} in {prefixes[0]}, but the tokenizer has {vocab_size} ids. "
            "The data was made with another tokenizer: prepare it again."
        )
    num_bytes = int(token_bytes[tokens[:, 1:]].sum(dtype=np.int64))
    return Windows(name, tokens, num_bytes)


class _Stream:
    """The sequences of several indexed data sets, end to end, read by token position."""

    def __init__(self, readers: Sequence[IndexedReader]) -> None:
        self._readers = readers
        # _begins[r][s]: position of sequence s of reader r; one entry more, where the next reader begins.
        self._begins, begin = [], 0
        for reader in readers:
            begins = begin + np.concatenate([[0], np.cumsum(reader.index.lengths, dtype=np.int64)])
            self._begins.append(begins)
            begin = int(begins[-1])
        self.num_tokens = begin

    def read(self, start: int, count: int) -> np.ndarray:
        """int64 [count] token ids from position `start` on; the caller keeps within num_tokens."""
        pieces = []
        for reader, begins in zip(self._readers, self._begins, strict=True):
            sequence = int(np.searchsorted(begins, start, side="right")) - 1
            while count and begins[0] <= start < begins[-1]:
                piece = reader.sequence(sequence)[start - begins[sequence] :][:count]
                pieces.append(piece.astype(np.int64))
                start, count, sequence = start + len(piece), count - len(piece), sequence + 1
            reader.check_still_there()
        return np.concatenate(pieces)
