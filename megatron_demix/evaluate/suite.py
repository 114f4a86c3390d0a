"""The tasks of a study, ready for any number of models: encoded once, scored in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np

from megatron_demix.errors import ConfigError
from megatron_demix.evaluate.ensemble import TaskText
from megatron_demix.evaluate.generate import generate
from megatron_demix.evaluate.likelihood import Likelihood, Request, likelihoods
from megatron_demix.evaluate.scores import Score
from megatron_demix.evaluate.tasks.answers import Judge
from megatron_demix.evaluate.tasks.choices import Choices
from megatron_demix.evaluate.tasks.formats import Item
from megatron_demix.evaluate.tasks.task import Task
from megatron_demix.study.search import GENERATED

if TYPE_CHECKING:
    from megatron_demix.evaluate.live import LiveModel


class TextCodec(Protocol):
    """What tasks need of a tokenizer (megatron_demix.data.tokenizer.Tokenizer). pieces: the bytes of each id."""

    vocab_size: int
    eod_id: int

    @property
    def pieces(self) -> Sequence[bytes]: ...

    def encode_batch(self, texts: Sequence[str], /) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass
class Scored:
    """One model's scores by name; what should be known about them, by task; and -log p of each scored token, float32: of each
    domain, then of all answers of each task that has likelihoods."""

    scores: dict[str, float] = field(default_factory=dict)
    notes: dict[str, dict[str, int]] = field(default_factory=dict)
    token_nats: list[np.ndarray] = field(default_factory=list)


class Suite:
    """All tasks, encoded for one tokenizer and the length that the model reads."""

    def __init__(self, tasks: Sequence[Task], codec: TextCodec, *, max_tokens: int, workers: int = 1) -> None:
        """workers: answers that are judged side by side. Raises ConfigError where a format needs a package that is missing."""
        self._tasks = [_EncodedTask(task, codec, max_tokens, workers) for task in tasks]

    @property
    def runs_code(self) -> bool:
        """Whether programs that models wrote are run."""
        return any("pass@1" in task.spec.score_names.values() for task in self._tasks)

    @property
    def scores(self) -> list[Score]:
        names = {name: score for task in self._tasks for name, score in task.spec.score_names.items()}
        return [
            Score(name, "bits/byte", "lower") if score == "bits_per_byte" else Score(name, "fraction", "higher")
            for name, score in names.items()
        ]

    @property
    def texts(self) -> dict[str, TaskText]:
        """Of each task that has likelihoods, what they are of."""
        found = {}
        for task in self._tasks:
            if decided := {score: name for name, score in task.spec.score_names.items() if score not in GENERATED}:
                found[task.spec.name] = TaskText(np.array(task.answer_tokens), task.choices, decided)
        return found

    def score(
        self,
        model: LiveModel,
        batch_tokens: int,
        *,
        generate_tokens: int | None = None,
        judges: bool = True,
        wait: Callable[[], None] = lambda: None,
    ) -> Scored:
        """Called by every rank that has a part of the model. batch_tokens: how many run at once, about; generate_tokens: the
        same where answers are written, which need less memory each. judges: whether this rank judges the generated answers; the
        others, which have them too, get no scores of these. wait: for all these ranks, of which one judges."""
        result = Scored()
        for task in self._tasks:
            wanted = set(task.spec.score_names.values())
            notes = {"items": len(task.items), "cut": 0}
            measured: dict[str, float] = {}
            if wanted - GENERATED:
                found = task.likelihoods(model, batch_tokens, notes)
                result.token_nats.append(np.concatenate([m.token_nats for m in found]))
                measured |= task.choices.scores(np.array([m.nats for m in found]))
            if wanted & GENERATED:
                right = task.share_right(model, generate_tokens or batch_tokens, notes, judges=judges)
                wait()
                measured |= dict.fromkeys(GENERATED, right)
            result.scores |= {name: measured[score] for name, score in task.spec.score_names.items()}
            result.notes[task.spec.name] = notes
        return result


class _EncodedTask:
    def __init__(self, task: Task, codec: TextCodec, max_tokens: int, workers: int) -> None:
        self.spec, self.items, self._task, self._codec, self._max_tokens = task.spec, task.items, task, codec, max_tokens
        self._max_new_tokens = task.spec.max_new_tokens or min(512, max_tokens // 2)
        if task.spec.generates:
            self._judge = Judge(task.format.kind, timeout_s=task.spec.timeout, workers=workers)

    @cached_property
    def _requests(self) -> tuple[list[Request], int]:
        pairs = [(self._task.header + context, answer) for item in self.items for context, answer in self._options(item)]
        return encode_pairs(self._codec, pairs, self._max_tokens)

    def _options(self, item: Item) -> Sequence[tuple[str, str]]:
        """What has to be scored: all options where one is chosen, else the gold answer alone."""
        wanted = set(self.spec.score_names.values())
        return item.options if wanted & {"acc", "acc_norm"} else (item.options[item.gold],)

    @cached_property
    def _prompts(self) -> tuple[list[tuple[int, ...]], int]:
        """Of each item, and how many had to be cut, so that an answer fits behind them."""
        encoded = encode(self._codec, [self._task.header + item.options[item.gold][0] for item in self.items])
        room = self._max_tokens - self._max_new_tokens
        prompts = [tuple(ids.tolist()[-room:]) or (self._codec.eod_id,) for ids in encoded]
        return prompts, sum(len(ids) > room for ids in encoded)

    def share_right(self, model: LiveModel, batch_tokens: int, notes: dict[str, int], *, judges: bool) -> float:
        """The share of right answers (NaN without `judges`); adds to the notes how many prompts were cut, how many answers did
        not end by themselves, and how many had to be stopped when they were judged."""
        prompts, num_cut = self._prompts
        answers = generate(
            model,
            prompts,
            pieces=self._codec.pieces,
            eod_id=self._codec.eod_id,
            stops=self._task.format.stops,
            max_new_tokens=self._max_new_tokens,
            batch_tokens=batch_tokens,
        )
        if not judges:
            return math.nan
        judged = self._judge.judge([answer.text for answer in answers], [item.reference for item in self.items])
        notes["cut"] += num_cut
        notes["endless"] = sum(not answer.ended for answer in answers)
        notes["stopped"] = sum(judgement.stopped for judgement in judged)
        return sum(judgement.right for judgement in judged) / len(judged)

    def likelihoods(self, model: LiveModel, batch_tokens: int, notes: dict[str, int]) -> list[Likelihood]:
        """Of all answers. Adds to the notes how many texts are too long for the model; their beginning is left out."""
        notes["cut"] += self._requests[1]
        return likelihoods(model, self._requests[0], batch_tokens=batch_tokens)

    @cached_property
    def choices(self) -> Choices:
        """Of the answers whose likelihoods are taken."""
        options = [self._options(item) for item in self.items]
        gold = [item.gold if len(mine) > 1 else 0 for item, mine in zip(self.items, options, strict=True)]
        answer_chars = [
            max(len(answer), 1) for item, mine in zip(self.items, options, strict=True) for answer in item.answers[: len(mine)]
        ]
        return Choices(
            num_options_I=np.array([len(mine) for mine in options]),
            gold_I=np.array(gold),
            answer_chars_R=np.array(answer_chars),
            gold_bytes=self._gold_bytes((np.cumsum([0, *map(len, options[:-1])], dtype=np.int64) + gold).tolist()),
        )

    def _gold_bytes(self, rows: Sequence[int]) -> int:
        """What the tokens that are scored stand for: less than the answer where that is too long for the model, more where
        blanks have moved to it from the context."""
        pieces, requests = self._codec.pieces, self._requests[0]
        return max(1, sum(len(pieces[token]) for row in rows for token in requests[row].continuation))

    @property
    def answer_tokens(self) -> list[int]:
        """[R] tokens of each answer whose likelihood is taken."""
        return [len(request.continuation) for request in self._requests[0]]


def encode_pairs(codec: TextCodec, pairs: Sequence[tuple[str, str]], max_tokens: int) -> tuple[list[Request], int]:
    """(context, continuation) as requests, and how many had to be cut to what the model reads.

    As lm-evaluation-harness does it: a pair is encoded as one text, and the continuation is what comes after as many ids as the
    context alone has. Blanks that end a context go to the continuation, where tokenizers have them. An empty context is
    end-of-document.
    """
    moved = [(c.rstrip(), c[len(c.rstrip()) :] + continuation) for c, continuation in pairs]
    alone = encode(codec, [context for context, _ in moved])
    whole = encode(codec, [context + continuation for context, continuation in moved])
    requests, num_cut = [], 0
    for before, both, (_, continuation) in zip(alone, whole, moved, strict=True):
        after = both[len(before) :]
        if not len(after):  # the tokenizer made one token of the end of the context and the whole continuation
            after = encode(codec, [continuation])[0]
        if not len(after):
            raise ConfigError(f"the tokenizer has no token for the answer {continuation!r}, so that it cannot be scored.")
        num_cut += len(before) + len(after) > max_tokens + 1
        requests.append(Request.cut(before.tolist() or [codec.eod_id], after.tolist(), max_tokens))
    return requests, num_cut


def encode(codec: TextCodec, texts: Sequence[str]) -> list[np.ndarray]:
    """The ids of each text."""
    ids, offsets = codec.encode_batch(texts)
    return np.split(ids, offsets[1:-1]) if len(texts) else []
