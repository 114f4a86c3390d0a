"""What turns text into token ids: one function per tokenizer library, all with flat arrays in and out.

An engine maps a TextBatch to (ids uint32 [N], offsets int64 [D + 1]). It lets go of the interpreter lock and uses the calling
thread only, so that several batches can be encoded side by side. Text is text: a special token spelled out in a document is
encoded as the characters it consists of, never as the token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megatron_demix.data.text import TextBatch

Engine = Callable[[TextBatch], tuple[np.ndarray, np.ndarray]]

# Where tokenizers differ when they differ: blanks, digits, contractions, scripts, emoji, controls, composed and decomposed.
PROBE = (
    "",
    " ",
    "Hello world",
    "  two  spaces, a tab\tand\r\n\n\nnew lines  ",
    "def f(x):\n    return {'a': [1, 22, 333, 4444, 55555]}  # it's, don't, we'LL\n",
    "naïve café, nai\u0308ve cafe\u0301, Straße, İstanbul, ﬁne ½ ²",
    "Привет, мир. Γειά σου κόσμε. 你好，世界！ こんにちは 안녕하세요 नमस्ते مرحبا שלום",
    "🙂👩‍👩‍👧‍👦🇨🇭 \u200b\ufeff\u00a0\u3000 \x00\x01\x7f",
    "<|endoftext|></s><unk><s>[INST]<0x0A>",
    "https://example.org/a?b=c&d=%20#e  1e-10 0x1F 3.14159 $\\frac{1}{2}$",
    "a" * 300 + " " * 300 + "\n" * 50 + "=" * 120,
)


def probe(added_tokens: Sequence[str]) -> list[str]:
    """PROBE, and the tokens that a tokenizer finds in text by their spelling: within words, between blanks, end to end."""
    around = [f"a{token}b{token}, {token}s {token} {token}\n\t{token}" for token in added_tokens]
    return [*PROBE, *around, "".join(added_tokens), "".join(reversed(added_tokens))]


def flatten(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(r) for r in rows], out=offsets[1:])
    ids = np.empty(int(offsets[-1]), np.uint32)
    for row, start in zip(rows, offsets.tolist(), strict=False):
        ids[start : start + len(row)] = row
    return ids, offsets


def byte_engine(batch: TextBatch) -> tuple[np.ndarray, np.ndarray]:
    """Token ids are the bytes."""
    return batch.content.astype(np.uint32), batch.offsets


def huggingface_engine(tokenizer: Any) -> Engine:
    """tokenizer: a tokenizers.Tokenizer."""
    tokenizer.encode_special_tokens = True

    def encode(batch: TextBatch) -> tuple[np.ndarray, np.ndarray]:
        return flatten([e.ids for e in tokenizer.encode_batch_fast(batch.strings(), add_special_tokens=False)])

    return encode


def sentencepiece_engine(processor: Any) -> Engine:
    """processor: a sentencepiece.SentencePieceProcessor."""

    def encode(batch: TextBatch) -> tuple[np.ndarray, np.ndarray]:
        return flatten(processor.encode(batch.strings(), num_threads=1) if len(batch) else [])

    return encode


def tiktoken_engine(encoding: Any) -> Engine:
    """encoding: a tiktoken.Encoding."""

    def encode(batch: TextBatch) -> tuple[np.ndarray, np.ndarray]:
        return flatten([encoding.encode_ordinary(text) for text in batch.strings()])

    return encode


def gigatoken_engine(load: Callable[[], Any]) -> Engine:
    """load: makes a gigatoken.Tokenizer. One encodes one batch at a time, so there are as many as callers side by side."""
    idle = [load()]

    def encode(batch: TextBatch) -> tuple[np.ndarray, np.ndarray]:
        if len(batch) == 0:
            return np.empty(0, np.uint32), np.zeros(1, np.int64)
        try:
            tokenizer = idle.pop()
        except IndexError:
            tokenizer = load()
        layout = tokenizer.encode_batch(batch.awkward(), parallel=False).layout
        idle.append(tokenizer)
        offsets = np.asarray(layout.offsets, np.int64)
        return np.ascontiguousarray(layout.content.data, np.uint32), np.ascontiguousarray(offsets)

    return encode


def without_special_tokens(tokenizer_json: str) -> str:
    """A tokenizer.json whose special tokens are no longer recognised in text. Ids do not change."""
    data = json.loads(tokenizer_json)
    data["added_tokens"] = [t for t in data.get("added_tokens") or [] if not t.get("special")]
    data["post_processor"] = None
    return json.dumps(data, ensure_ascii=False)


def agrees(fast: Engine, reference: Engine, batch: TextBatch) -> bool:
    """Whether both give the same ids for every document of a batch; a fast engine that fails does not."""
    try:
        ids, offsets = fast(batch)
    except Exception:
        return False
    expected_ids, expected_offsets = reference(batch)
    return np.array_equal(offsets, expected_offsets) and np.array_equal(ids, expected_ids)
