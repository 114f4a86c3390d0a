"""Greedy generation for many prompts at once, behind one key-value cache: bounded, and the same text on any layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from megatron_demix.evaluate.likelihood import common_start

if TYPE_CHECKING:
    from megatron_demix.evaluate.live import Cache, LiveModel


@dataclass(frozen=True)
class Generated:
    """text: up to what ended it, which is left out. ended: by a stop text or end-of-document, and not by the token limit."""

    text: str
    ended: bool


@dataclass
class _Row:
    """A prompt in the batch, what has been generated for it, and whether it has ended."""

    index: int
    prompt: tuple[int, ...]
    text: bytearray = field(default_factory=bytearray)
    num_new: int = 0
    done: bool = False
    ended: bool = False


def generate(
    model: LiveModel,
    prompts: Sequence[tuple[int, ...]],
    *,
    pieces: Sequence[bytes],
    eod_id: int,
    stops: Sequence[str],
    max_new_tokens: int,
    batch_tokens: int,
) -> list[Generated]:
    """In the order of the prompts, the same on every rank.

    prompts: one id or more each, at most model.max_tokens - max_new_tokens. pieces: the bytes of each id. A text ends before
    any of `stops` (cut at each in turn, as lm-evaluation-harness does), at end-of-document, or after max_new_tokens.

    Prompts are sorted by length; those of one batch are run together as far as the shortest goes, and then token by token, the
    longer ones still reading while the others write. Rows that have ended leave the batch.
    """
    results: dict[int, Generated] = {}
    if prompts:
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i]))
        start = common_start(model, [prompts[i] for i in order])
        endings = [stop.encode() for stop in stops]
        for batch in _batches(order, prompts, max_new_tokens, batch_tokens):
            for row in _run(model, start, batch, pieces, eod_id, endings, max_new_tokens):
                results[row.index] = Generated(row.text.decode("utf-8", errors="replace"), row.ended)
    return [results[i] for i in range(len(prompts))]


def _batches(
    order: Sequence[int], prompts: Sequence[tuple[int, ...]], max_new_tokens: int, batch_tokens: int
) -> Iterator[list[_Row]]:
    batch: list[_Row] = []
    for i in order:
        if batch and (len(batch) + 1) * (len(prompts[i]) + max_new_tokens) > batch_tokens:
            yield batch
            batch = []
        batch.append(_Row(i, prompts[i]))
    if batch:
        yield batch


def _run(
    model: LiveModel,
    start: Cache,
    batch: list[_Row],
    pieces: Sequence[bytes],
    eod_id: int,
    endings: Sequence[bytes],
    max_new_tokens: int,
) -> list[_Row]:
    room = max(len(row.prompt) for row in batch) + max_new_tokens
    cache = start.repeated(torch.zeros(len(batch), dtype=torch.int64), room)
    active, seen = batch, start.num_tokens
    tokens = np.array([row.prompt[seen : len(batch[0].prompt)] for row in batch])
    while True:
        hidden = model.extend(cache, tokens)
        seen = cache.num_tokens
        chosen = model.choose(None if hidden is None else hidden[-1], len(active)).tolist()
        following = [
            row.prompt[seen] if seen < len(row.prompt) else _write(row, token, pieces, eod_id, endings, max_new_tokens)
            for row, token in zip(active, chosen, strict=True)
        ]
        kept = [n for n, row in enumerate(active) if not row.done]
        if not kept:
            return batch
        if len(kept) <= len(active) // 2:
            cache = cache.repeated(torch.tensor(kept), room)
            active, following = [active[n] for n in kept], [following[n] for n in kept]
        tokens = np.array(following)[:, None]


def _write(row: _Row, token: int, pieces: Sequence[bytes], eod_id: int, endings: Sequence[bytes], max_new_tokens: int) -> int:
    """Append a chosen token to a row that has not ended. Returns the token, which is what the row reads next."""
    if row.done:
        return token
    row.num_new += 1
    before = len(row.text)
    row.text += pieces[token]
    row.ended = token == eod_id
    for stop in endings:
        # It may have begun in earlier tokens.
        place = row.text.find(stop, max(0, before - len(stop) + 1))
        if place >= 0:
            del row.text[place:]
            row.ended = True
    row.done = row.ended or row.num_new == max_new_tokens
    return token
