"""From surrogates to mixtures: the next round's proxies, and the mixture the search ends with."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from megatron_demix.errors import MixtureError
from megatron_demix.mixture import Mixture
from megatron_demix.search.sample import farthest, sample_mixtures
from megatron_demix.search.space import SearchSpace
from megatron_demix.search.surrogate import Surrogate


@dataclass(frozen=True)
class Choice:
    """The mixture a search ends with: merge weights, the actual shares to build data with, and what is predicted there.

    predicted: score -> (mean, std) at the chosen mixture; natural: the same at the natural mixture. objective: (mean, std), the
    lower the better; expected_gain: (mean, std) of natural's objective minus the chosen one's.
    """

    weights: Mixture
    shares: Mixture
    predicted: dict[str, tuple[float, float]]
    objective: tuple[float, float]
    natural: dict[str, tuple[float, float]]
    expected_gain: tuple[float, float]


def propose(
    space: SearchSpace,
    surrogates: Mapping[str, Surrogate],
    objective: Mapping[str, float],
    *,
    num: int,
    candidates: int = 200_000,
    seed: int = 0,
    higher_is_better: Collection[str] = (),
    best_share: float = 0.01,
) -> np.ndarray:
    """Merge weights_MD of the next round: `num` rows spread over the best predicted `best_share` of the candidates.

    The first row is the best candidate; each further one is the farthest from those before it, so that the round explores the
    whole promising region instead of one point.
    """
    weights_MD = sample_mixtures(space, candidates, seed, landmarks=False)
    values_M = objective_means(space.shares(weights_MD), surrogates, objective, higher_is_better)
    keep = min(candidates, max(round(best_share * candidates), 8 * num))
    return farthest(weights_MD[np.argsort(values_M, kind="stable")[:keep]], num)


def choose_mixture(
    space: SearchSpace,
    surrogates: Mapping[str, Surrogate],
    objective: Mapping[str, float],
    *,
    candidates: int = 200_000,
    top: int = 128,
    seed: int = 0,
    higher_is_better: Collection[str] = (),
) -> Choice:
    """The mean of the `top` best predicted candidates (DeMix, section 3.3), which is feasible because the space is convex."""
    weights_MD = sample_mixtures(space, candidates, seed, landmarks=False)
    values_M = objective_means(space.shares(weights_MD), surrogates, objective, higher_is_better)
    best_MD = weights_MD[np.argsort(values_M, kind="stable")[:top]]
    return describe(space, best_MD.mean(axis=0), surrogates, objective, higher_is_better)


def describe(
    space: SearchSpace,
    weights_D: np.ndarray,
    surrogates: Mapping[str, Surrogate],
    objective: Mapping[str, float],
    higher_is_better: Collection[str] = (),
) -> Choice:
    """The Choice of one row of merge weights, moved onto the exact grid of the space."""
    pair_2D = space.nearest(np.stack([weights_D, space.centre_D]))
    shares_2D = space.shares(pair_2D)
    values_2, stds_2 = objective_values(shares_2D, surrogates, objective, higher_is_better)
    predicted = {name: surrogate.predict(shares_2D) for name, surrogate in surrogates.items()}
    chosen, natural = ({name: (float(m[i]), float(s[i])) for name, (m, s) in predicted.items()} for i in (0, 1))
    return Choice(
        space.mixture(pair_2D[0]),
        space.mixture(pair_2D[0], actual=True),
        chosen,
        (float(values_2[0]), float(stds_2[0])),
        natural,
        (float(values_2[1] - values_2[0]), float(np.hypot(*stds_2))),
    )


def objective_means(
    shares_MD: np.ndarray,
    surrogates: Mapping[str, Surrogate],
    objective: Mapping[str, float],
    higher_is_better: Collection[str] = (),
) -> np.ndarray:
    """The values of objective_values without their standard deviations, for many rows."""
    total = check_objective(surrogates, objective)
    value_M = np.zeros(len(shares_MD))
    for name, weight in objective.items():
        if weight > 0:
            value_M += (-1 if name in higher_is_better else 1) * weight / total * surrogates[name].mean(shares_MD)
    return value_M


def objective_values(
    shares_MD: np.ndarray,
    surrogates: Mapping[str, Surrogate],
    objective: Mapping[str, float],
    higher_is_better: Collection[str] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted mean of the predicted scores at each row and its standard deviation; lower is better.

    Scores in higher_is_better count negatively. Errors of different scores are taken as independent.
    Raises MixtureError where the objective names a score that has no surrogate, or its weights are not usable.
    """
    total = check_objective(surrogates, objective)
    value_M, variance_M = np.zeros(len(shares_MD)), np.zeros(len(shares_MD))
    for name, weight in objective.items():
        if weight == 0:
            continue
        mean_M, std_M = surrogates[name].predict(shares_MD)
        value_M += (-1 if name in higher_is_better else 1) * weight / total * mean_M
        variance_M += np.square(weight / total * std_M)
    return value_M, np.sqrt(variance_M)


def check_objective(surrogates: Mapping[str, Surrogate], objective: Mapping[str, float]) -> float:
    """The sum of the objective's weights. Raises MixtureError."""
    for name, weight in objective.items():
        if name not in surrogates:
            raise MixtureError(f"objective: score {name!r} was not measured; the scores are {', '.join(surrogates)}.")
        if not np.isfinite(weight) or weight < 0:
            raise MixtureError(
                f"objective: weight of {name!r} is {weight}, expected >= 0. List it in higher_is_better to maximise it."
            )
    if not (total := sum(objective.values())) > 0:
        raise MixtureError("objective: all weights are 0, expected at least one above 0.")
    return total
