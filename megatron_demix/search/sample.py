"""Mixtures to try: random ones around the natural shares, and designs that spread over the feasible space."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import numpy as np

from megatron_demix.errors import MixtureError
from megatron_demix.search.linear import Features
from megatron_demix.search.space import SearchSpace
from megatron_demix.search.walk import walk_inside
from megatron_demix.search.waterfill import GRID
from megatron_demix.study.choices import Design

SAME = 1e-6
"""Mixtures whose weights all differ by less are one: their proxies would score the same."""
_POOL = 4096
_TRIES = 16
"""Draws for each row that is asked for, besides _POOL of them, before rows are taken from elsewhere."""
_MOST_OPTIMAL = 100
"""Domains of an optimal design: 40 s and 1.7 GB (an idle core, 128 mixtures); 50 take 4 s, and more soon take hours."""
_FINEST = 65536
"""Points of the finest lattice that is tried where bounds leave too few of a coarser one."""


def sample_mixtures(
    space: SearchSpace,
    num: int,
    seed: int,
    *,
    design: Design = "dirichlet",
    landmarks: bool = True,
) -> np.ndarray:
    """`num` feasible merge weights_MD (float64): each row sums to exactly 1 and depends only on the arguments. Rows are
    distinct (by SAME), unless the bounds leave but one mixture: then they repeat it.

    dirichlet: the paper's (section 3.3): around natural**0.7, concentration log-uniform in 0.5 to 5; weights under 0.0002
    become 0, and what lies outside the bounds is moved onto them, where optima often lie; where rows repeat, others that lie
    inside stand in. sobol: low-discrepancy, uniform over the simplex; what lies outside the bounds is left out. lattice: the
    regular grid of the simplex above the smallest weights, as fine as the bounds need, thinned to the rows farthest apart.
    Where hardly any of these lie inside, the rest is uniform over the feasible space; for sobol and lattice the farthest apart.
    optimal: rows of a random pool, on the bounds and inside, chosen greedily for the least mean variance of a quadratic model
    (I-optimal). landmarks: where num allows (twice as many), the first rows are the centroid, the natural mixture and each
    domain's corner, as far as the bounds let them, so that a surrogate never extrapolates to the edges.
    Raises MixtureError on num < 1, an unknown design, and an optimal one of more than 100 domains.
    """
    if num < 1:
        raise MixtureError(f"asked for {num} mixtures, expected at least 1.")
    if design not in get_args(Design):
        raise MixtureError(f"design {design!r} is unknown; expected one of {', '.join(get_args(Design))}.")
    if design == "optimal" and len(space.domains) > _MOST_OPTIMAL:
        raise MixtureError(
            f"design 'optimal' weighs every pair of the {len(space.domains)} domains, and may do so for {_MOST_OPTIMAL} "
            "at most. Choose dirichlet (the default), sobol or lattice."
        )
    rng = np.random.default_rng(seed)
    corners_MD = corners(space) if landmarks and num >= 2 * (len(space.domains) + 2) else np.empty((0, len(space.domains)))
    first_MD, drawn = distinct(corners_MD), num - len(corners_MD)
    if design == "dirichlet":
        first_MD = distinct(np.concatenate([first_MD, space.nearest(_dirichlet(space, drawn, rng))]))
        rows_MD = _accepted(space, _dirichlets(space, rng), first_MD, num)
    elif design == "sobol":
        rows_MD = _accepted(space, _sobol(len(space.domains), drawn, rng), first_MD, num)
    elif design == "lattice":
        rows_MD = _lattice_inside(space, drawn, rng, first_MD, num)
    else:
        raw_MD = _dirichlet(space, max(_POOL, drawn), rng)
        pool_MD = space.nearest(raw_MD)
        if not _inside(raw_MD, pool_MD).all():
            pool_MD = distinct(np.concatenate([pool_MD, walk_inside(space, len(pool_MD), rng)]))
        rows_MD = np.concatenate([first_MD, _i_optimal(pool_MD, first_MD, num - len(first_MD))])
    if lacking := num - len(rows_MD):
        pool_MD = distinct(walk_inside(space, max(_POOL, 2 * lacking), rng), rows_MD)
        more_MD = pool_MD[:lacking] if design == "dirichlet" else farthest(pool_MD, lacking, chosen_MD=rows_MD)
        rows_MD = np.concatenate([rows_MD, more_MD])
    return rows_MD[np.arange(num) % len(rows_MD)]


def sample_candidates(space: SearchSpace, num: int, seed: int) -> np.ndarray:
    """`num` feasible merge weights for a search: dirichlet draws, moved onto the bounds where they lie outside. Many repeat."""
    return space.nearest(_dirichlet(space, num, np.random.default_rng(seed)))


def distinct(rows_MD: np.ndarray, beside_MD: np.ndarray | None = None) -> np.ndarray:
    """The rows that differ from all before them, and from all of beside_MD."""
    before_MD = rows_MD[:0] if beside_MD is None else beside_MD
    first_K, _ = kinds(np.concatenate([before_MD, rows_MD]))
    return rows_MD[np.sort(first_K[first_K >= len(before_MD)]) - len(before_MD)]


def kinds(rows_MD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first row of each of K mixtures that differ (by SAME), sorted by their shares; and kind_M: which of these each row
    is."""
    _, first_K, kind_M = np.unique(np.round(rows_MD / SAME), axis=0, return_index=True, return_inverse=True)
    return first_K, kind_M.ravel()


def sample_around(
    space: SearchSpace, centres_MD: np.ndarray, num: int, seed: int, *, strength: tuple[float, float] = (20.0, 2000.0)
) -> np.ndarray:
    """`num` feasible merge weights, each Dirichlet around one of the given rows, concentration log-uniform in `strength`."""
    rng = np.random.default_rng(seed)
    centres_ND = centres_MD[rng.integers(len(centres_MD), size=num)]
    strength_N = np.exp(rng.uniform(np.log(strength[0]), np.log(strength[1]), size=num))
    # A trace of every domain, so that an absent one can come back.
    return space.nearest(rng.standard_gamma(strength_N[:, None] * (centres_ND + 1e-4)))


def corners(space: SearchSpace) -> np.ndarray:
    """Merge weights of the centroid, the natural mixture and each domain's corner, as far as the bounds let them."""
    num_domains = len(space.domains)
    natural = np.array(list(space.natural.values()))
    # What bounds keep from a corner goes to the others as the data have them.
    corners_MD = np.eye(num_domains) + 1e-15 * natural
    return space.nearest(np.concatenate([np.full((1, num_domains), 1.0), natural[None], corners_MD]))


def _accepted(space: SearchSpace, draws: Iterator[np.ndarray], first_MD: np.ndarray, num: int) -> np.ndarray:
    """first_MD and then draws that are feasible as they are, and new, up to `num` in all, or fewer where that takes long."""
    rows_MD, tried = first_MD, 0
    while len(rows_MD) < num and tried <= _TRIES * num + _POOL:
        drawn_MD = next(draws)
        moved_MD = space.nearest(drawn_MD)
        rows_MD = np.concatenate([rows_MD, distinct(moved_MD[_inside(drawn_MD, moved_MD)], rows_MD)])
        tried += len(drawn_MD)
    return rows_MD[:num]


def _dirichlets(space: SearchSpace, rng: np.random.Generator) -> Iterator[np.ndarray]:
    while True:
        yield _dirichlet(space, _POOL, rng)


def _inside(drawn_MD: np.ndarray, moved_MD: np.ndarray) -> np.ndarray:
    """bool_M: the rows that SearchSpace.nearest left where they are."""
    drawn_MD = drawn_MD / np.maximum(drawn_MD.sum(axis=1, keepdims=True), 1e-300)
    return np.abs(moved_MD - drawn_MD).max(axis=1) <= 1e-9


def _dirichlet(space: SearchSpace, num: int, rng: np.random.Generator) -> np.ndarray:
    around_D = np.array(list(space.natural.values())) ** 0.7
    around_D /= around_D.sum()
    strength_M = np.exp(rng.uniform(np.log(0.5), np.log(5.0), size=num))
    drawn_MD = rng.standard_gamma(np.maximum(strength_M[:, None] * around_D, 1e-6))
    drawn_MD /= np.maximum(drawn_MD.sum(axis=1, keepdims=True), 1e-300)
    drawn_MD[drawn_MD < 2e-4] = 0.0
    return drawn_MD


def _sobol(num_domains: int, num: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Scrambled Sobol points of the cube as normalised exponentials, uniform on the simplex. At least `num`, then as many again
    and again: the sequence is balanced whenever it has doubled."""
    from scipy.stats import qmc

    points = qmc.Sobol(num_domains, rng=rng)
    cube_MD = points.random_base2(int(np.ceil(np.log2(max(num, 2)))))
    while True:
        yield -np.log(np.clip(1 - cube_MD, 1e-12, 1.0))
        cube_MD = points.random(points.num_generated)


def _lattice_inside(space: SearchSpace, num: int, rng: np.random.Generator, first_MD: np.ndarray, total: int) -> np.ndarray:
    """first_MD and lattice points that are feasible, and new, up to `total` in all; a finer lattice where one has too few."""
    lows_D, highs_D = (counts / GRID for counts in space.grid_bounds[:2])
    free = np.flatnonzero(highs_D > lows_D)
    if len(free) < 2:
        return first_MD
    while True:
        parts_MF = _lattice(len(free), num, rng)
        points_MD = np.tile(lows_D, (len(parts_MF), 1))
        points_MD[:, free] += (1 - lows_D.sum()) * parts_MF
        moved_MD = space.nearest(points_MD)
        new_MD = distinct(moved_MD[_inside(points_MD, moved_MD)], first_MD)
        if len(new_MD) >= total - len(first_MD) or len(parts_MF) > _FINEST:
            return np.concatenate([first_MD, farthest(new_MD, total - len(first_MD), chosen_MD=first_MD)])
        num = 2 * len(parts_MF)


def _lattice(num_domains: int, num: int, rng: np.random.Generator) -> np.ndarray:
    """All mixtures in steps of 1/m, for the smallest m that gives `num` of them; a random part where that is far more."""
    from math import comb

    steps = 1
    while comb(steps + num_domains - 1, num_domains - 1) < num:
        steps += 1
    slots, bars = steps + num_domains - 1, num_domains - 1
    total = comb(slots, bars)
    if total <= max(_POOL, 4 * num):
        from itertools import combinations

        bars_MB = np.array(list(combinations(range(slots), bars)), np.int64).reshape(total, bars)
    else:
        bars_MB = np.sort(rng.random((max(_POOL, 4 * num), slots)).argsort(axis=1)[:, :bars], axis=1)
    edges_MB = np.concatenate([np.full((len(bars_MB), 1), -1), bars_MB, np.full((len(bars_MB), 1), slots)], axis=1)
    return (np.diff(edges_MB, axis=1) - 1) / steps


def farthest(pool_MD: np.ndarray, num: int, *, chosen_MD: np.ndarray | None = None) -> np.ndarray:
    """At most `num` rows of the pool, each the farthest from all before it (Hellinger distance). Starts away from chosen_MD if
    that has rows, else with the pool's first row."""
    from_ND = pool_MD[:0] if chosen_MD is None else chosen_MD
    roots_MD, roots_ND = (np.sqrt(np.clip(rows_MD, 0, None)) for rows_MD in (pool_MD, from_ND))
    return pool_MD[farthest_points(roots_MD, roots_ND, num)]


def farthest_points(points_MF: np.ndarray, from_NF: np.ndarray, num: int) -> np.ndarray:
    """Indices of at most `num` points, each the farthest from all of from_NF and from those before it; the first is point 0
    where from_NF has no rows. Fewer where all others coincide with these."""
    nearest_M = np.full(len(points_MF), np.inf)
    for point_F in from_NF:
        nearest_M = np.minimum(nearest_M, np.square(points_MF - point_F).sum(axis=1))
    picked: list[int] = []
    while len(picked) < min(num, len(points_MF)) and nearest_M.max() > 0:
        picked.append(int(nearest_M.argmax()))
        nearest_M = np.minimum(nearest_M, np.square(points_MF - points_MF[picked[-1]]).sum(axis=1))
    return np.array(picked, np.int64)


def _i_optimal(pool_MD: np.ndarray, chosen_MD: np.ndarray, num: int) -> np.ndarray:
    """Greedy I-optimal design for Scheffe's quadratic model: each row lowers the pool's mean predictive variance the most."""
    quadratic = Features(pairs=True)
    features_MF = quadratic(pool_MD)
    moment_FF = features_MF.T @ features_MF / len(pool_MD)
    first_MF = quadratic(chosen_MD)
    # A weak prior keeps the first rows, when there are fewer of them than features, well defined.
    inverse_FF = np.linalg.inv(first_MF.T @ first_MF + 1e-3 * moment_FF + 1e-9 * np.eye(len(moment_FF)))
    _, kinds_NM = kinds(np.concatenate([chosen_MD, pool_MD]))
    chosen_N, kind_M = np.split(kinds_NM, [len(chosen_MD)])
    taken_M = np.isin(kind_M, chosen_N)
    pulled_MF = features_MF @ inverse_FF
    spread_MF = pulled_MF @ moment_FF
    # Of each row: its own variance, and what it tells of the pool's. A pick changes the inverse by one rank, and these two with
    # it; the tables stay as they are, and what is taken off one of their rows is summed up when the row is needed.
    own_M, told_M = (pulled_MF * features_MF).sum(axis=1), (spread_MF * pulled_MF).sum(axis=1)
    num = min(num, len(np.unique(kind_M[~taken_M])))
    reach_KM, pull_KF, lost_KF = (np.empty((num, width)) for width in (len(pool_MD), len(moment_FF), len(moment_FF)))
    picked: list[int] = []
    for k in range(num):
        pick = int(np.where(taken_M, -np.inf, told_M / (1 + own_M)).argmax())
        picked.append(pick)
        taken_M |= kind_M == kind_M[pick]
        pull_KF[k] = pulled_MF[pick] - reach_KM[:k, pick] @ pull_KF[:k]
        lost_KF[k] = spread_MF[pick] - reach_KM[:k, pick] @ lost_KF[:k]
        along_M = features_MF @ pull_KF[k]
        reach_KM[k] = along_M / (1 + along_M[pick])
        lost_M = pulled_MF @ lost_KF[k] - (pull_KF[:k] @ lost_KF[k]) @ reach_KM[:k]
        own_M -= reach_KM[k] * along_M
        told_M += reach_KM[k] * (reach_KM[k] * (pull_KF[k] @ lost_KF[k]) - 2 * lost_M)
    return pool_MD[picked]
