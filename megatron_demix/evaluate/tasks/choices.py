"""From the likelihoods of a task's answers to its scores: the same arithmetic for a model and for an ensemble of models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

_Nats = TypeVar("_Nats", float, np.ndarray)


def bits_per_byte(nats: _Nats, num_bytes: int) -> _Nats:
    """From -log p of a text of so many bytes; of one model, or [M] of several."""
    return nats / math.log(2) / num_bytes


@dataclass(frozen=True)
class Choices:
    """R answers to I questions: each question's options side by side, or its gold answer alone.

    num_options_I: answers of each question. gold_I: which of them is right. answer_chars_R: characters of each answer's text,
    by which acc_norm divides, as in lm-evaluation-harness. gold_bytes: UTF-8 bytes of all gold continuations together.
    """

    num_options_I: np.ndarray
    gold_I: np.ndarray
    answer_chars_R: np.ndarray
    gold_bytes: int

    def scores(self, nats_R: np.ndarray) -> dict[str, float]:
        """nats_R: float64, -log p of each answer. acc and acc_norm mean nothing where gold answers stand alone."""
        first_I = np.concatenate([[0], np.cumsum(self.num_options_I)[:-1]])
        gold_nats = nats_R[first_I + self.gold_I].sum()
        return {
            "acc": self._share_right(nats_R, first_I),
            "acc_norm": self._share_right(nats_R / self.answer_chars_R, first_I),
            "bits_per_byte": bits_per_byte(float(gold_nats), self.gold_bytes),
        }

    def _share_right(self, cost_R: np.ndarray, first_I: np.ndarray) -> float:
        """Of questions whose cheapest answer, the first of equals, is the gold one."""
        if np.isnan(cost_R).any():
            return math.nan
        cheapest_I = np.minimum.reduceat(cost_R, first_I)
        is_cheapest_R = cost_R == np.repeat(cheapest_I, self.num_options_I)
        place_R = np.where(is_cheapest_R, np.arange(len(cost_R)), len(cost_R))
        chosen_I = np.minimum.reduceat(place_R, first_I) - first_I
        return float((chosen_I == self.gold_I).mean())
