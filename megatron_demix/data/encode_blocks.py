"""How a block of text becomes tokens, and many blocks side by side: the order and the bytes do not depend on the workers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_demix import native
from megatron_demix.data.inputs import BadDocuments, Block, parse
from megatron_demix.data.text import TextBatch
from megatron_demix.data.tokenizer import Tokenizer
from megatron_demix.indexed.format import token_dtype

SentenceSplitter = Callable[[str], list[str]]
FORMAT = 3
"""Raised when the same inputs and settings come to give other bytes or other blocks: what an earlier version made of them, or
began to make, is not taken for the same."""


@dataclass(frozen=True)
class Tokens:
    """Some documents of one output: tokens [N] of the output's dtype, lengths int32 [S] of its sequences, groups int32 [D]
    sequences of each document (None: one each), and the bytes of text they stand for."""

    tokens: np.ndarray
    lengths: np.ndarray
    groups: np.ndarray | None
    text_bytes: int

    @property
    def documents(self) -> int:
        return len(self.lengths if self.groups is None else self.groups)


@dataclass(frozen=True)
class Tokenized:
    """One block, by output."""

    block: Block
    outputs: list[Tokens]
    rejected: list[tuple[str, str]]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the bytes of the output. split: share of the documents for each output."""

    tokenizer: Tokenizer
    json_key: str = "text"
    append_eod: bool = True
    on_bad_document: BadDocuments = "error"
    split: tuple[float, ...] = (1.0,)
    seed: int = 0
    sentences: SentenceSplitter | None = None

    @property
    def dtype(self) -> np.dtype:
        return token_dtype(self.tokenizer.vocab_size)

    def describe(self) -> dict[str, Any]:
        """Its settings, as JSON."""
        return {
            "format": FORMAT,
            "tokenizer": self.tokenizer.fingerprint,
            "json_key": self.json_key,
            "append_eod": self.append_eod,
            "on_bad_document": self.on_bad_document,
            "split": list(self.split),
            "seed": self.seed,
            "sentences": self.sentences is not None,
            **({"keep_newlines": True} if getattr(self.sentences, "keep_newlines", False) else {}),
        }

    def __call__(self, block: Block) -> Tokenized:
        documents = parse(block, json_key=self.json_key, on_bad_document=self.on_bad_document)
        if self.sentences is not None:
            return Tokenized(block, [self._by_sentence(documents.text, self.sentences)], documents.rejected)
        route = self.route(documents.text)
        ids, offsets = self.tokenizer.encode_batch(documents.text)
        sizes = documents.text.lengths()
        outputs = []
        for n in range(len(self.split)):
            tokens, lengths = native.pack_tokens(ids, offsets, self.dtype, self._eod, route, n)
            outputs.append(Tokens(tokens, lengths, None, int(sizes[route == n].sum())))
        return Tokenized(block, outputs, documents.rejected)

    @property
    def _eod(self) -> int | None:
        return self.tokenizer.eod_id if self.append_eod else None

    def route(self, text: TextBatch) -> np.ndarray:
        """uint8 [D]: the output of each document, from a seeded hash of its text: neither its place in the corpus nor the
        tokenizer counts, and equal documents go the same way."""
        if len(self.split) == 1:
            return np.zeros(len(text), np.uint8)
        # 53 bits, so that the comparison with the shares is exact.
        hashes = native.hash_documents(text.content, text.offsets, self.seed)
        uniform = (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53
        edges = np.cumsum(self.split)[:-1] / sum(self.split)
        return np.searchsorted(edges, uniform, side="right").astype(np.uint8)

    def _by_sentence(self, text: TextBatch, splitter: SentenceSplitter) -> Tokens:
        # A document of blanks is one empty sentence: it has an end, too.
        split = [[s for s in splitter(document) if s] or [""] for document in text.strings()]
        ids, offsets = self.tokenizer.encode_batch(TextBatch.of(s for sentences in split for s in sentences))
        last = np.cumsum([len(sentences) for sentences in split], dtype=np.int64)
        tokens, _ = native.pack_tokens(ids, np.concatenate([[0], offsets[last]]), self.dtype, self._eod)
        lengths = np.diff(offsets).astype(np.int32)
        groups = np.diff(last, prepend=0).astype(np.int32)
        if self.append_eod:
            lengths[last - 1] += 1
        return Tokens(tokens, lengths, groups, int(text.offsets[-1]))


def tokenize(blocks: Iterable[Block], recipe: Recipe, workers: int) -> Iterator[Tokenized]:
    """Blocks through the recipe in `workers` threads, in their order; at most workers + 2 blocks are held in memory.

    Encoding lets go of the interpreter, so threads are enough, and nothing is pickled.
    """
    if workers <= 1:
        yield from map(recipe, blocks)
        return
    pending: deque[Future[Tokenized]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="tokenize") as pool:
        try:
            for block in blocks:
                pending.append(pool.submit(recipe, block))
                if len(pending) > workers + 1:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
