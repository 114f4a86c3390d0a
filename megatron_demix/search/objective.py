"""What the search minimises: one number a mixture, made of the predicted scores."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

import numpy as np

from megatron_demix.errors import IncompatibleInputs, MixtureError
from megatron_demix.search.sample import sample_mixtures
from megatron_demix.search.space import SearchSpace
from megatron_demix.search.surrogate import Surrogate
from megatron_demix.study.choices import MIN_PROXIES, Aim

_RANKED = 4096


def usable_objective(objective: Mapping[str, float], constant: Mapping[str, float]) -> dict[str, float]:
    """The objective without the scores that are the same for every proxy, which prefer no mixture. constant: their values.

    Raises IncompatibleInputs if no other has a weight.
    """
    usable = {name: weight for name, weight in objective.items() if name not in constant}
    seen = ", ".join(f"{name} is {value:g}" for name, value in constant.items() if objective.get(name))
    if seen and not any(usable.values()):
        raise IncompatibleInputs(
            f"objective: {seen} for every proxy, so that no mixture can be preferred. Give weight to a finer score (a loss, or "
            "a task's bits_per_byte); what was measured is kept."
        )
    return usable


class Objective:
    """The lower, the better; scores in higher_is_better are negated first.

    mean: the weighted mean of the scores, in their unit. worst: the worst score, each in standard deviations above its mean
    over the proxies (weights must be equal: they only say which scores count). percentile_rank: the weighted mean of each
    score's rank, 0 best to 1, among what random feasible mixtures would measure, as the paper averages its categories, and on a
    straight line beyond these; for scores whose units do not compare. Measured, and not predicted: a score of which nothing is
    known but noise would else rank mixtures by it as firmly as any other. Errors of different scores go together as they do
    out of fold.
    surrogates: of every score that is to be predicted; those of weight 0, or none, have no part in the objective. seed: of what
    percentile_rank draws, and of every search for this objective's optimum.
    Raises MixtureError: a score that was not measured, weights that are not usable.
    """

    def __init__(
        self,
        space: SearchSpace,
        surrogates: Mapping[str, Surrogate],
        weights: Mapping[str, float],
        *,
        aim: Aim = "mean",
        higher_is_better: Collection[str] = (),
        seed: int = 0,
    ) -> None:
        if aim not in get_args(Aim):
            raise MixtureError(f"objective: aim {aim!r} is unknown; expected one of {', '.join(get_args(Aim))}.")
        self.space, self.surrogates, self.aim, self.seed = space, surrogates, aim, seed
        self.higher_is_better = frozenset(higher_is_better)
        self.weights = normalised(weights, surrogates)
        if unknown := sorted(self.higher_is_better - set(surrogates)):
            raise MixtureError(
                f"higher_is_better: score {unknown[0]!r} was not measured; the scores are {', '.join(surrogates)}."
            )
        if aim == "worst" and len(set(self.weights.values())) > 1:
            raise MixtureError(
                f"objective: aim 'worst' compares scores as equals, but their weights are {dict(weights)}. Make "
                "them equal, or 0."
            )
        self._signs = {name: -1.0 if name in self.higher_is_better else 1.0 for name in self.weights}
        self._ranked: dict[str, _Ranks] = {}
        if aim == "percentile_rank":
            pool_MD = space.shares(sample_mixtures(space, _RANKED, seed, landmarks=False))
            noise_M = np.random.default_rng(seed).standard_normal(_RANKED)
            for name, sign in self._signs.items():
                mean_M, std_M = surrogates[name].predict(pool_MD)
                self._ranked[name] = _Ranks(np.sort(sign * (mean_M + std_M * noise_M)))

    @property
    def aimed(self) -> dict[str, Surrogate]:
        """The surrogates that have a part in it, in their order."""
        return {name: surrogate for name, surrogate in self.surrogates.items() if name in self.weights}

    def refit(self, rows: np.ndarray) -> Objective:
        """The same objective with each of its surrogates fitted on other rows of its proxies (Surrogate.refit)."""
        again = Objective.__new__(Objective)
        again.__dict__.update(self.__dict__)
        again.surrogates = {name: surrogate.refit(rows) for name, surrogate in self.aimed.items()}
        return again

    def means(self, shares_MD: np.ndarray) -> np.ndarray:
        """value_M at actual shares, without uncertainty: for many mixtures."""
        return self._combined([self._term(name, self.surrogates[name].mean(shares_MD)) for name in self.weights])

    def measured(self) -> np.ndarray:
        """value_M of the proxies that the surrogates were fitted on, from their measured scores; NaN where one is missing."""
        return self._combined([self._term(name, self.surrogates[name].scores_M) for name in self.weights])

    def _combined(self, terms: list[np.ndarray]) -> np.ndarray:
        return np.max(terms, axis=0) if self.aim == "worst" else np.sum(terms, axis=0)

    def predict(self, shares_MD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """value_M and standard deviation_M at actual shares."""
        terms, stds = [], []
        for name in self.weights:
            mean_M, std_M = self.surrogates[name].predict(shares_MD)
            terms.append(self._term(name, mean_M))
            stds.append((self._term(name, mean_M + std_M) - self._term(name, mean_M - std_M)) / 2)
        stds_SM = np.stack(stds)
        if self.aim == "worst":
            worst_M = np.argmax(terms, axis=0)[None]
            return np.take_along_axis(np.stack(terms), worst_M, 0)[0], np.abs(np.take_along_axis(stds_SM, worst_M, 0)[0])
        return np.sum(terms, axis=0), np.sqrt(np.einsum("sm,st,tm->m", stds_SM, self._correlations_SS, stds_SM))

    @cached_property
    def _correlations_SS(self) -> np.ndarray:
        """Of the scores' errors out of fold: one proxy errs in many at once. Independent where too few proxies have all."""
        if len(self.weights) == 1:
            return np.ones((1, 1))
        errors_MS = np.stack([self.surrogates[name].errors_M for name in self.weights], axis=1)
        errors_MS = errors_MS[np.isfinite(errors_MS).all(axis=1)]
        if len(errors_MS) < MIN_PROXIES or not (errors_MS.std(axis=0) > 0).all():
            return np.eye(len(self.weights))
        return np.corrcoef(errors_MS, rowvar=False)

    def _term(self, name: str, score_M: np.ndarray) -> np.ndarray:
        if self.aim == "mean":
            return self.weights[name] * self._signs[name] * score_M
        if self.aim == "worst":
            measured_M = self.surrogates[name].scores_M
            return self._signs[name] * (score_M - np.nanmean(measured_M)) / np.nanstd(measured_M)
        return self.weights[name] * self._ranked[name].of(self._signs[name] * score_M)


@dataclass(frozen=True, eq=False)
class _Ranks:
    """Among the sorted values_R: 0 is the first's, 1 the last's. Beyond them ranks go on as they do, on average, over the
    outermost twentieth, so that a search can tell mixtures apart that are all better than every one of these."""

    values_R: np.ndarray

    def of(self, values_M: np.ndarray) -> np.ndarray:
        first, last = self.values_R[[0, -1]]
        inside_M = np.interp(values_M, self.values_R, np.linspace(0, 1, len(self.values_R)))
        below_M, above_M = np.minimum(values_M - first, 0), np.maximum(values_M - last, 0)
        return inside_M + self._slope(self.values_R - first) * below_M + self._slope(last - self.values_R[::-1]) * above_M

    def _slope(self, distances_R: np.ndarray) -> float:
        """Rank by distance from an end; of the whole range, where the twentieth has one value."""
        for part in (len(distances_R) // 20, len(distances_R) - 1):
            if distances_R[part] > 0:
                return part / (len(distances_R) - 1) / float(distances_R[part])
        return 0.0


def normalised(weights: Mapping[str, float], scores: Collection[str]) -> dict[str, float]:
    """An objective's weights above 0, divided by their sum. Raises MixtureError on a score that is not among those measured, on
    a weight that is no number >= 0, and where all are 0."""
    for name, weight in weights.items():
        if name not in scores:
            raise MixtureError(f"objective: score {name!r} was not measured; the scores are {', '.join(scores)}.")
        if not np.isfinite(weight) or weight < 0:
            raise MixtureError(
                f"objective: weight of {name!r} is {weight}, expected >= 0. List it in higher_is_better to maximise it."
            )
    if not (total := sum(weights.values())) > 0:
        raise MixtureError("objective: all weights are 0, expected at least one above 0.")
    return {name: weight / total for name, weight in weights.items() if weight > 0}
