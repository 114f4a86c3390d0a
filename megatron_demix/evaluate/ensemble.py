"""The probability ensemble of components: what each token cost each of them, kept once; the rest is arithmetic.

Where models are mixed by their probabilities and not by their weights, p(token) = sum_k w_k p_k(token). With -log p_k of every
scored token on disk, the scores of any number of such mixtures cost no forward pass (Belenki et al., 2025, mix domain models in
this way to predict mixtures).

    tokens/<model>.npy    float32 [tokens], -log p of each scored token: domain by domain, then task by task
    tokens/texts.json     whose tokens these are
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_demix.artifact import is_temporary, read_json, sync_path, temporary_beside, write_json
from megatron_demix.errors import CorruptInput, storage_errors
from megatron_demix.evaluate.tasks.choices import Choices, bits_per_byte

FOLDER, TEXTS = "tokens", "texts.json"
_AT_ONCE = 1 << 22
"""Probabilities of mixtures in memory, at 8 bytes each and a few copies."""


@dataclass(frozen=True)
class DomainText:
    """num_windows of window_tokens targets each, which stand for so many bytes together."""

    num_windows: int
    window_tokens: int
    target_bytes: int

    def lengths(self) -> np.ndarray:
        return np.full(self.num_windows, self.window_tokens)


@dataclass(frozen=True)
class TaskText:
    """tokens_R: of each answer. scores: the table's name of each score that likelihoods decide, by the format's name."""

    tokens_R: np.ndarray
    choices: Choices
    scores: Mapping[str, str]


@dataclass(frozen=True)
class Texts:
    """What was scored, in the order of the token files."""

    domains: Mapping[str, DomainText]
    tasks: Mapping[str, TaskText]

    def write(self, path: Path) -> None:
        tasks = {
            name: {
                "tokens": task.tokens_R.tolist(),
                "num_options": task.choices.num_options_I.tolist(),
                "gold": task.choices.gold_I.tolist(),
                "answer_chars": task.choices.answer_chars_R.tolist(),
                "gold_bytes": task.choices.gold_bytes,
                "scores": dict(task.scores),
            }
            for name, task in self.tasks.items()
        }
        write_json(path, {"domains": {name: asdict(text) for name, text in self.domains.items()}, "tasks": tasks})

    @classmethod
    def read(cls, path: Path) -> Texts:
        data = read_json(path)
        try:
            return cls(
                {n: DomainText(**t) for n, t in data["domains"].items()}, {n: _task(t) for n, t in data["tasks"].items()}
            )
        except (KeyError, TypeError, AttributeError) as e:
            raise CorruptInput(f"{path}: does not say which texts were scored ({e!r}).") from e


def _task(data: Mapping[str, Any]) -> TaskText:
    num_options_I, gold_I, answer_chars_R = (np.array(data[key]) for key in ("num_options", "gold", "answer_chars"))
    choices = Choices(num_options_I, gold_I, answer_chars_R, data["gold_bytes"])
    return TaskText(np.array(data["tokens"]), choices, data["scores"])


def keep(folder: Path, model: str, texts: Texts, token_nats: Sequence[np.ndarray]) -> None:
    """Write a model's file, and texts.json. token_nats: float32, of each text in order. A file is there whole or not at all."""
    folder.mkdir(exist_ok=True)
    texts.write(folder / TEXTS)
    target = folder / f"{model}.npy"
    temporary = temporary_beside(target)
    with storage_errors(f"writing {target}"):
        with open(temporary, "wb") as file:
            np.save(file, np.concatenate(token_nats).astype(np.float32, copy=False))
        sync_path(temporary)
        temporary.rename(target)


def remove_unfinished(folder: Path) -> None:
    """What killed writers have left, on whatever machine: called when no writer is left."""
    for path in folder.glob(".*"):
        if is_temporary(path):
            path.unlink()


class Ensemble:
    """K components, whose token files stay on disk. Memory grows with the texts' longest piece and the mixtures, not with K
    times all tokens."""

    def __init__(self, folder: Path, components: Sequence[str]) -> None:
        """components: names of the files. Raises CorruptInput where one is absent, or is not of these texts."""
        self.texts = Texts.read(folder / TEXTS)
        self._files = []
        domains, tasks = self.texts.domains.values(), self.texts.tasks.values()
        wanted = sum(int(lengths_R.sum()) for lengths_R in (*(t.lengths() for t in domains), *(t.tokens_R for t in tasks)))
        for name in components:
            path = folder / f"{name}.npy"
            try:
                tokens = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as e:
                raise CorruptInput(f"{path}: cannot be read ({e}). Delete the stage's folder to have it scored again.") from e
            if tokens.shape != (wanted,) or tokens.dtype != np.float32:
                raise CorruptInput(
                    f"{path}: {tokens.dtype} {list(tokens.shape)}, expected float32 [{wanted}] of {folder / TEXTS}."
                )
            self._files.append(tokens)

    def scores(self, weights_MK: np.ndarray) -> dict[str, np.ndarray]:
        """By name, each score that likelihoods decide, of M mixtures: losses of domains, and likelihoods of tasks' answers."""
        found: dict[str, np.ndarray] = {}
        begin = 0
        for domain, text in self.texts.domains.items():
            nats_MR = self._nats(weights_MK, begin, text.lengths())
            found[domain] = bits_per_byte(nats_MR.sum(axis=1), text.target_bytes)
            begin += text.num_windows * text.window_tokens
        for task in self.texts.tasks.values():
            nats_MR = self._nats(weights_MK, begin, task.tokens_R)
            rows = [task.choices.scores(nats_R) for nats_R in nats_MR]
            found |= {name: np.array([row[score] for row in rows]) for score, name in task.scores.items()}
            begin += int(task.tokens_R.sum())
        return found

    def _nats(self, weights_MK: np.ndarray, begin: int, lengths_R: np.ndarray) -> np.ndarray:
        """float64 [M, R] -log p of R successive pieces of text, of so many tokens each, from position `begin` on."""
        most = max(1, _AT_ONCE // len(weights_MK))
        return np.hstack([self._of_pieces(weights_MK, begin + at, lengths) for at, lengths in _groups(lengths_R, most)])

    def _of_pieces(self, weights_MK: np.ndarray, begin: int, lengths_R: np.ndarray) -> np.ndarray:
        ends_R = np.cumsum(lengths_R)
        nats_KT = np.stack([tokens[begin : begin + ends_R[-1]] for tokens in self._files]).astype(np.float64)
        # Relative to the most probable component's, no probability that matters underflows.
        least_T = nats_KT.min(axis=0)
        mixed_MT = weights_MK @ np.exp(least_T - nats_KT)
        np.maximum(mixed_MT, np.finfo(np.float64).tiny, out=mixed_MT)
        return np.add.reduceat(least_T - np.log(mixed_MT), ends_R - lengths_R, axis=1)


def _groups(lengths_R: np.ndarray, most: int) -> Iterator[tuple[int, np.ndarray]]:
    """(tokens before it, lengths) of runs of pieces with at most so many tokens together, one piece at least."""
    first = begin = tokens = 0
    for r, length in enumerate(lengths_R.tolist()):
        if tokens and tokens + length > most:
            yield begin, lengths_R[first:r]
            first, begin, tokens = r, begin + tokens, 0
        tokens += length
    yield begin, lengths_R[first:]
