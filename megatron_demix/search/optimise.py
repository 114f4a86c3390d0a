"""From surrogates to mixtures: the next round's proxies, the mixture a search ends with, and the trade-offs between scores.

Everything is a choice among feasible candidates, so any objective and any bounds are handled alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_demix.errors import MixtureError
from megatron_demix.mixture import Mixture
from megatron_demix.search.objective import Objective
from megatron_demix.search.sample import (
    SAME,
    corners,
    distinct,
    farthest,
    farthest_points,
    sample_around,
    sample_candidates,
    sample_mixtures,
)

_ELITE = 64
_FRONT = 64
_STAGES, _CENTRES = 32, 32
_STRENGTH, _NARROWER = (20.0, 2000.0), 1.25
"""How concentrated draws of the first stage are around the best, and by what factor more so those of each further one."""


@dataclass(frozen=True)
class Choice:
    """The mixture a search ends with: merge weights, the actual shares to build data with, and what is predicted there.

    predicted: score -> (mean, std) at the chosen mixture; natural: the same at the feasible mixture closest to the natural one.
    objective: (mean, std), the lower the better; expected_gain: (mean, std) of natural's objective less the chosen one's.
    """

    weights: Mixture
    shares: Mixture
    predicted: dict[str, tuple[float, float]]
    objective: tuple[float, float]
    natural: dict[str, tuple[float, float]]
    expected_gain: tuple[float, float]


@dataclass(frozen=True)
class ParetoFront:
    """Mixtures of which none is predicted better in every score than another: merge weights_MD, actual shares_MD, and
    predicted_MT for `scores`, sorted by the first."""

    scores: tuple[str, ...]
    weights_MD: np.ndarray
    shares_MD: np.ndarray
    predicted_MT: np.ndarray


def propose(goal: Objective, *, num: int, candidates: int = 200_000) -> np.ndarray:
    """Merge weights_MD of the next round: `num` rows spread over the candidates that may well be the best.

    Those are predicted within a standard deviation of the best one (at least 8 x num distinct ones). The first row is the best
    candidate; each further one is the farthest from those before it, so that the round explores the whole promising region
    instead of one point, and that region shrinks as the surrogates grow sure. What was measured is not proposed again, unless
    the bounds leave nothing else.
    """
    space = goal.space
    weights_MD, values_M = best_candidates(goal, candidates, goal.seed)
    order = np.argsort(values_M, kind="stable")
    _, std_1 = goal.predict(space.shares(weights_MD[order[:1]]))
    good_MD = distinct(weights_MD[order[: int((values_M <= values_M[order[0]] + std_1[0]).sum())]])
    good_MD = _not_measured(good_MD, goal)
    if len(good_MD) < 8 * num:
        good_MD = _not_measured(distinct(weights_MD[order]), goal)[: 8 * num]
    rows_MD = farthest(good_MD, num)
    if len(rows_MD) < num:
        more_MD = _not_measured(distinct(sample_mixtures(space, 2 * num, goal.seed), rows_MD), goal)
        rows_MD = np.concatenate([rows_MD, more_MD])
    if len(rows_MD) == 0:
        rows_MD = weights_MD[order[:1]]
    return rows_MD[np.arange(num) % len(rows_MD)]


def _not_measured(weights_MD: np.ndarray, goal: Objective) -> np.ndarray:
    """Those whose actual shares are those of no proxy: a surrogate knows all, also where its score is missing."""
    from scipy.spatial import cKDTree

    measured_MD = next(iter(goal.surrogates.values())).shares_MD
    shares_MD = np.zeros((len(weights_MD), measured_MD.shape[1]))  # none of a domain that was dropped
    shares_MD[:, : len(goal.space.domains)] = goal.space.shares(weights_MD)
    gaps_M, _ = cKDTree(measured_MD).query(shares_MD, p=np.inf, distance_upper_bound=2 * SAME)
    return weights_MD[gaps_M > SAME]


def choose_mixture(goal: Objective, *, candidates: int = 200_000, top: int = 128) -> Choice:
    """The mean of the `top` best predicted candidates (DeMix, section 3.3), which is feasible because the space is convex."""
    space = goal.space
    weights_MD, values_M = best_candidates(goal, candidates, goal.seed)
    best_MD = weights_MD[np.argsort(values_M, kind="stable")[:top]]
    pair_2D = space.nearest(np.stack([best_MD.mean(axis=0), space.centre_D]))
    values_2, stds_2 = goal.predict(space.shares(pair_2D))
    predicted = {name: surrogate.predict(space.shares(pair_2D)) for name, surrogate in goal.surrogates.items()}
    chosen, natural = ({name: (float(m[i]), float(s[i])) for name, (m, s) in predicted.items()} for i in (0, 1))
    return Choice(
        space.mixture(pair_2D[0]),
        space.mixture(pair_2D[0], actual=True),
        chosen,
        (float(values_2[0]), float(stds_2[0])),
        natural,
        (float(values_2[1] - values_2[0]), float(np.hypot(*stds_2))),
    )


def best_candidates(
    goal: Objective, num: int, seed: int, *, known_MD: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`num` candidate merge weights_MD and their objective's means_M: half over the whole space, half around the best, in
    stages that draw closer and closer. known_MD: further candidates, with which the search begins.

    A stage draws around the best so far and around midpoints between them: in many dimensions each of these has come near the
    optimum in some directions by chance and not in others, and midpoints even that out.
    """
    space, rng = goal.space, np.random.default_rng(seed)
    each = num // 2 // _STAGES
    wide_MD = sample_candidates(space, num - _STAGES * each, seed)
    if known_MD is not None:
        wide_MD = np.concatenate([known_MD, wide_MD])
    drawn = [(wide_MD, goal.means(space.shares(wide_MD)))]
    best_MD, best_M = drawn[0]
    for stage in range(_STAGES):
        first = np.argsort(best_M, kind="stable")[:_CENTRES]
        best_MD, best_M = best_MD[first], best_M[first]
        centres_MD = np.concatenate([best_MD, (best_MD + rng.permutation(best_MD)) / 2])
        strength = (_STRENGTH[0] * _NARROWER**stage, _STRENGTH[1] * _NARROWER**stage)
        near_MD = sample_around(space, centres_MD, each, seed + 1 + stage, strength=strength)
        drawn.append((near_MD, goal.means(space.shares(near_MD))))
        best_MD, best_M = np.concatenate([best_MD, near_MD]), np.concatenate([best_M, drawn[-1][1]])
    return np.concatenate([rows_MD for rows_MD, _ in drawn]), np.concatenate([values_M for _, values_M in drawn])


def pareto_front(goal: Objective, scores: Sequence[str], *, candidates: int = 20_000) -> ParetoFront:
    """At most 64 mixtures on the predicted front of two or more of the goal's scores, spread over it: whatever their weights
    and its aim. Raises MixtureError."""
    space, surrogates = goal.space, goal.surrogates
    if len(scores) < 2 or (unknown := [name for name in scores if name not in surrogates]):
        seen = (
            f"score {unknown[0]!r} was not measured" if len(scores) >= 2 else f"{len(scores)} scores given, expected at least 2"
        )
        raise MixtureError(f"Pareto front: {seen}; the scores are {', '.join(surrogates)}.")
    signs_T = np.array([-1.0 if name in goal.higher_is_better else 1.0 for name in scores])
    corners_MD = corners(space)
    drawn = [np.concatenate([corners_MD, sample_candidates(space, candidates - len(corners_MD), goal.seed)])]
    for name, sign in zip(scores, signs_T, strict=True):
        best = np.argsort(sign * surrogates[name].mean(space.shares(drawn[0])), kind="stable")[:_ELITE]
        drawn.append(sample_around(space, drawn[0][best], candidates // len(scores) // 4, goal.seed + 1))
    weights_MD = np.concatenate(drawn)
    predicted_MT = np.stack([surrogates[name].mean(space.shares(weights_MD)) for name in scores], axis=1)
    front = _not_dominated(predicted_MT * signs_T)
    extremes = front[(predicted_MT[front] * signs_T).argmin(axis=0)]
    spread_T = np.ptp(predicted_MT[front], axis=0) + 1e-12
    points_MT, ends = predicted_MT[front] / spread_T, np.flatnonzero(np.isin(front, extremes))[:_FRONT]
    rows = front[np.concatenate([ends, farthest_points(points_MT, points_MT[ends], _FRONT - len(ends))])]
    rows = rows[np.argsort(predicted_MT[rows, 0], kind="stable")]
    return ParetoFront(tuple(scores), weights_MD[rows], space.shares(weights_MD[rows]), predicted_MT[rows])


def _not_dominated(values_MT: np.ndarray) -> np.ndarray:
    """Rows that no other row beats in every column (lower is better). The strongest come first and strike out many at once."""
    left = np.argsort(values_MT.sum(axis=1), kind="stable")
    front = []
    while len(left):
        first = values_MT[left[0]]
        front.append(left[0])
        left = left[(values_MT[left] < first).any(axis=1)]
    return np.array(front)
