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
    """The first whole windows of a domain's documents, laid end to end, until num_tokens targets (at least one window).

    Consecutive windows share one token (the last target is the next window's first input), so every token after the first is
    scored once. Raises CorruptInput if the domain holds less than one window, IncompatibleInputs if an id exceeds the
    vocabulary.
    """
    wanted = max(1, num_tokens // seq_length)
    pieces: list[np.ndarray] = []
    have = 0
    for prefix in prefixes:
        reader = IndexedReader(prefix)
        for document in range(reader.num_documents):
            if have > wanted * seq_length:
                break
            tokens = np.asarray(reader.tokens(document), dtype=np.int64)
            pieces.append(tokens)
            have += len(tokens)
    stream = np.concatenate(pieces) if pieces else np.empty(0, np.int64)
    num_windows = min(wanted, (len(stream) - 1) // seq_length)
    if num_windows < 1:
        raise CorruptInput(
            f"domain {name!r}: {', '.join(map(str, prefixes))} holds {len(stream)} tokens, but one evaluation window needs "
            f"{seq_length + 1}. Give it more documents, or give the split a larger share."
        )
    starts = np.arange(num_windows) * seq_length
    tokens = stream[starts[:, None] + np.arange(seq_length + 1)]
    if (top := int(tokens.max())) >= vocab_size:
        raise IncompatibleInputs(
            f"domain {name!r}: token id {top} in {prefixes[0]}, but the tokenizer has {vocab_size} ids. "
            "The data was made with another tokenizer: prepare it again."
        )
    num_bytes = int(token_bytes[tokens[:, 1:]].sum(dtype=np.int64))
    return Windows(name, tokens, num_bytes)
