"""Log-likelihoods of continuations, at the cost of the tokens that differ: what texts begin with is run once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from megatron_demix.evaluate.live import Cache, LiveModel


_BATCH_COSTS = 64
"""Starting a batch is taken to cost as much as this part of a full one."""


@dataclass(frozen=True)
class Request:
    """Score `continuation` behind `context`: one id or more each, together at most one more than the model's max_tokens."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.context or not self.continuation:
            raise ValueError("a request needs one token or more of context and of continuation")

    @classmethod
    def cut(cls, context: Sequence[int], continuation: Sequence[int], max_tokens: int) -> Request:
        """What does not fit is left out at the beginning, so that the last token is still predicted."""
        continuation = tuple(continuation)[-max_tokens:]
        return cls(tuple(context)[-(max_tokens + 1 - len(continuation)) :], continuation)


@dataclass(frozen=True, eq=False)
class Likelihood:
    """token_nats: float32, -log p of each token of the continuation. greedy: every one was the most probable one."""

    token_nats: np.ndarray
    greedy: bool

    @property
    def nats(self) -> float:
        """-log p of the whole continuation."""
        return float(self.token_nats.sum(dtype=np.float64))


def likelihoods(model: LiveModel, requests: Sequence[Request], *, batch_tokens: int) -> list[Likelihood]:
    """In the order of the requests, the same on every rank. batch_tokens: how many tokens run at once, about.

    Contexts are sorted by length. What all of them begin with (worked examples) is run once; then, batch by batch, as much of
    each distinct context as the shortest one has, once for all its continuations; then the rest, filled up at the right.
    Losses are float32 as the model computes them.
    """
    ends = np.cumsum([len(request.continuation) for request in requests])
    nats_T = torch.zeros(int(ends[-1]) if requests else 0, dtype=torch.float32, device=model.device)
    greedy_T = torch.zeros(len(nats_T), dtype=torch.uint8, device=model.device)
    if requests:
        by_context: dict[tuple[int, ...], list[int]] = {}
        for i, request in enumerate(requests):
            by_context.setdefault(request.context, []).append(i)
        contexts = sorted(by_context, key=lambda c: (len(c), c))
        start = common_start(model, contexts)
        for batch in _batches(contexts, by_context, requests, batch_tokens):
            _score(model, start, batch, by_context, requests, ends, nats_T, greedy_T)
        model.shared(nats_T)
        model.shared(greedy_T)
    nats, greedy = (np.split(values.cpu().numpy(), ends[:-1]) for values in (nats_T, greedy_T))
    return [Likelihood(n, bool(g.all())) for n, g in zip(nats, greedy, strict=True)] if requests else []


def common_start(model: LiveModel, contexts: Sequence[tuple[int, ...]]) -> Cache:
    """One row that has seen what all contexts begin with, but for the last token of the shortest one, which is the first."""
    # The least and the largest in lexical order differ first where any two do.
    least, largest = min(contexts), max(contexts)
    common = next((i for i, (a, b) in enumerate(zip(least, largest, strict=False)) if a != b), len(least))
    common = min(common, len(contexts[0]) - 1)
    start = model.new_cache(1, max(common, 1))
    if common:
        model.extend(start, np.array([least[:common]]))
    return start


def _batches(
    contexts: Sequence[tuple[int, ...]],
    by_context: dict[tuple[int, ...], list[int]],
    requests: Sequence[Request],
    batch_tokens: int,
) -> Iterator[list[tuple[int, ...]]]:
    """Contexts in order, as many at a time as have batch_tokens in all rows, but one at least; fewer where what the longest
    ones have beyond the shortest, which every continuation runs again, costs more than another batch."""
    batch: list[tuple[int, ...]] = []
    num_rows = longest = 0
    for context in contexts:
        more = by_context[context]
        length = len(context) + max(len(requests[i].continuation) for i in more)
        if batch:
            joined_rows, joined_longest, shortest = num_rows + len(more), max(longest, length), len(batch[0])
            joined = len(context) + joined_rows * (joined_longest - shortest)
            apart = num_rows * (longest - shortest) + len(context) + len(more) * (length - len(context))
            if joined_rows * joined_longest > batch_tokens or joined > apart + batch_tokens // _BATCH_COSTS:
                yield batch
                batch, num_rows, longest = [], 0, 0
        batch.append(context)
        num_rows, longest = num_rows + len(more), max(longest, length)
    if batch:
        yield batch


def _score(
    model: LiveModel,
    start: Cache,
    batch: list[tuple[int, ...]],
    by_context: dict[tuple[int, ...], list[int]],
    requests: Sequence[Request],
    ends: np.ndarray,
    nats_T: torch.Tensor,
    greedy_T: torch.Tensor,
) -> None:
    """Fill in the tokens of the batch's requests, on the last pipeline stage. Those of request i end before ends[i]."""
    rows = [(row, i) for row, context in enumerate(batch) for i in by_context[context]]
    lengths = [len(requests[i].context) + len(requests[i].continuation) - 1 for _, i in rows]
    cache, source = start, torch.zeros(len(rows), dtype=torch.int64)
    shared = len(batch[0]) - 1  # the batch's shortest
    if shared > start.num_tokens and len(rows) > len(batch):
        cache = start.repeated(torch.zeros(len(batch), dtype=torch.int64), shared)
        model.extend(cache, np.array([context[start.num_tokens : shared] for context in batch]))
        source = torch.tensor([row for row, _ in rows])
    seen = cache.num_tokens
    tails = np.zeros((len(rows), max(lengths) - seen), np.int64)
    for n, (_, i) in enumerate(rows):
        tails[n, : lengths[n] - seen] = (requests[i].context + requests[i].continuation)[seen:-1]
    hidden = model.extend(cache.repeated(source, max(lengths)), tails)
    if hidden is None:
        return
    places = [(n, t - seen) for n, (_, i) in enumerate(rows) for t in range(len(requests[i].context) - 1, lengths[n])]
    row_of, position = torch.tensor(places, device=model.device).T
    targets = np.concatenate([requests[i].continuation for _, i in rows])
    nats, greedy = model.judge(hidden[position, row_of], targets)
    spans = [np.arange(ends[i] - len(requests[i].continuation), ends[i]) for _, i in rows]
    at = torch.from_numpy(np.concatenate(spans)).to(model.device)
    nats_T[at] = nats
    greedy_T[at] = greedy.to(greedy_T.dtype)
