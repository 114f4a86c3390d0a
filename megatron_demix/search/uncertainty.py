"""How sure the optimum is: the search repeated on resampled proxies, and whether another round is worth its cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from megatron_demix.errors import IncompatibleInputs
from megatron_demix.search.objective import Objective
from megatron_demix.search.optimise import Choice, best_candidates
from megatron_demix.search.processes import results

_BOOTSTRAPS_A_SPLIT = 5
_TOP = 32
"""Candidates whose mean is a sample's optimum."""


@dataclass(frozen=True)
class OptimumDistribution:
    """The optimum of each bootstrap sample of the proxies: actual shares_BD, and what the chosen mixture loses against it.

    regrets_B and gains_H are in the objective's unit: the chosen mixture's value less the sample's best; and the natural
    mixture's value less that of one chosen on half of the proxies, both as the other half predicts them. The proxies that a
    choice was made by praise it, noise alone too, so that others have to judge what it wins.
    """

    domains: tuple[str, ...]
    shares_BD: np.ndarray
    regrets_B: np.ndarray
    gains_H: np.ndarray

    @property
    def shares(self) -> dict[str, tuple[float, float]]:
        """Domain -> (mean, standard deviation) of its share at the optimum."""
        means_D, stds_D = self.shares_BD.mean(axis=0), self.shares_BD.std(axis=0, ddof=1)
        return {name: (float(mean), float(std)) for name, mean, std in zip(self.domains, means_D, stds_D, strict=True)}

    @property
    def expected_regret(self) -> float:
        """What a perfect further search could still win, on average."""
        return float(self.regrets_B.mean())

    @property
    def expected_gain(self) -> float:
        """What a chosen mixture wins over the natural one, on average."""
        return float(self.gains_H.mean())

    @property
    def probability_of_gain(self) -> float:
        """The part of the halves whose choice beats the natural mixture."""
        return float((self.gains_H > 0).mean())

    def enough(self, part: float = 0.05) -> bool:
        """Whether the rounds may stop: the expected regret is below `part` of the expected gain over the natural mixture."""
        return self.expected_regret < part * self.expected_gain


def optimum_distribution(goal: Objective, choice: Choice, *, num: int = 50, candidates: int = 20_000) -> OptimumDistribution:
    """Refit the surrogates on `num` bootstrap samples of the proxies (hyperparameters kept), and optimise each anew, the choice
    among the candidates; and on both halves of a fifth as many random splits. (Hyperparameters found anew on half of few
    proxies often see noise alone, and no gain where there is one.) In processes where that pays.

    All of its surrogates must know the same proxies, which are resampled together: IncompatibleInputs otherwise. Proxies that
    lack the same scores are resampled, and split, among themselves, so that a score that few have is not lost in a sample.
    """
    space, aimed = goal.space, goal.aimed
    sizes = {name: len(surrogate.scores_M) for name, surrogate in aimed.items()}
    if len(set(sizes.values())) > 1:
        raise IncompatibleInputs(
            f"surrogates were fitted on different numbers of proxies ({sizes}); fit all of them on the same ones."
        )
    chosen_1D = np.array([[choice.weights[name] for name in space.domains]])
    rng = np.random.default_rng(goal.seed)
    alike = _alike(np.stack([np.isfinite(aimed[name].scores_M) for name in goal.weights], axis=1))
    searches: list[Callable[[], tuple[np.ndarray, float]]] = []
    for b in range(num):
        rows = np.concatenate([rows[rng.integers(len(rows), size=len(rows))] for rows in alike])
        searches.append(partial(_optimum, goal, rows, chosen_1D, candidates, goal.seed + b))
    splits: list[Callable[[], list[float]]] = []
    for split in range(max(1, num // _BOOTSTRAPS_A_SPLIT)):
        order = np.concatenate([rng.permutation(rows) for rows in alike])
        splits.append(partial(_judged_gains, goal, order, candidates, goal.seed + split))
    optima, regrets = zip(*results(searches), strict=True)
    gains = [gain for both in results(splits) for gain in both]
    return OptimumDistribution(space.domains, np.array(optima), np.array(regrets), np.array(gains))


def _optimum(goal: Objective, rows: np.ndarray, chosen_1D: np.ndarray, candidates: int, seed: int) -> tuple[np.ndarray, float]:
    """shares_D of the optimum by these proxies alone, and what the chosen merge weights lose against it."""
    again, space = goal.refit(rows), goal.space
    weights_MD, values_M = best_candidates(again, candidates, seed, known_MD=chosen_1D)
    best = np.argsort(values_M, kind="stable")[:_TOP]
    regret = max(again.means(space.shares(chosen_1D))[0] - values_M[best[0]], 0.0)
    return space.shares(weights_MD[best].mean(axis=0)), float(regret)


def _judged_gains(goal: Objective, order: np.ndarray, candidates: int, seed: int) -> list[float]:
    """Of what is chosen on one half of the proxies, in this order, over the natural mixture, as the other half predicts it."""
    space, halves = goal.space, [goal.refit(order[start::2]) for start in (0, 1)]
    gains = []
    for by, judge in (halves, halves[::-1]):
        weights_MD, values_M = best_candidates(by, candidates, seed)
        best_1D = weights_MD[np.argsort(values_M, kind="stable")[:_TOP]].mean(axis=0, keepdims=True)
        chosen, natural = judge.means(space.shares(np.concatenate([best_1D, space.centre_D[None]])))
        gains.append(float(natural - chosen))
    return gains


def _alike(measured_MS: np.ndarray) -> list[np.ndarray]:
    """The rows of each pattern of measured scores."""
    _, pattern_M = np.unique(measured_MS, axis=0, return_inverse=True)
    return [np.flatnonzero(pattern_M == p) for p in range(pattern_M.max() + 1)]
