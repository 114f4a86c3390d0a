"""Mixtures to try: random ones around the natural shares, and designs that spread over the feasible space.

Every design is drawn without regard to the bounds, then moved onto the feasible space (SearchSpace.nearest): caps cannot leak.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from megatron_demix.errors import MixtureError
from megatron_demix.search.space import SearchSpace

Design = Literal["dirichlet", "sobol", "lattice", "optimal"]
_POOL = 4096


def sample_mixtures(
    space: SearchSpace,
    num: int,
    seed: int,
    *,
    design: Design = "dirichlet",
    landmarks: bool = True,
    temperature: float = 0.7,
    strength: tuple[float, float] = (0.5, 5.0),
    min_weight: float = 2e-4,
) -> np.ndarray:
    """`num` feasible merge weights_MD (float64): each row sums to exactly 1 and depends only on the arguments.

    dirichlet: the paper's (section 3.3): around natural**temperature, concentration log-uniform in `strength`; weights under
    min_weight become 0. sobol: low-discrepancy, uniform over the simplex. lattice: the regular grid of the simplex, thinned
    to the rows farthest apart. optimal: rows of a random pool chosen greedily for the least mean variance of a quadratic model
    (I-optimal). landmarks: where num allows (twice as many), the first rows are the centroid, the natural mixture and each
    domain's corner, as far as the bounds let them, so that a surrogate never extrapolates to the edges.
    Raises MixtureError on num < 1 or an unknown design.
    """
    if num < 1:
        raise MixtureError(f"asked for {num} mixtures, expected at least 1.")
    if design not in get_args(Design):
        raise MixtureError(f"design {design!r} is unknown; expected one of {', '.join(get_args(Design))}.")
    rng = np.random.default_rng(seed)
    first_MD = _landmarks(space) if landmarks and num >= 2 * (len(space.domains) + 2) else np.empty((0, len(space.domains)))
    rest = num - len(first_MD)
    if design == "dirichlet":
        rest_MD = space.nearest(_dirichlet(space, rest, rng, temperature, strength, min_weight))
    elif design == "sobol":
        rest_MD = space.nearest(_sobol(len(space.domains), rest, rng))
    elif design == "lattice":
        rest_MD = farthest(space.nearest(_lattice(len(space.domains), rest, rng)), rest, chosen_MD=first_MD)
    else:
        pool_MD = space.nearest(_dirichlet(space, max(_POOL, rest), rng, temperature, strength, min_weight))
        rest_MD = _i_optimal(pool_MD, first_MD, rest)
    return np.concatenate([first_MD, rest_MD])


def sample_around(
    space: SearchSpace, centres_MD: np.ndarray, num: int, seed: int, *, strength: tuple[float, float] = (20.0, 2000.0)
) -> np.ndarray:
    """`num` feasible merge weights, each Dirichlet around one of the given rows, concentration log-uniform in `strength`."""
    rng = np.random.default_rng(seed)
    centres_ND = centres_MD[rng.integers(len(centres_MD), size=num)]
    strength_N = np.exp(rng.uniform(np.log(strength[0]), np.log(strength[1]), size=num))
    # A trace of every domain, so that an absent one can come back.
    return space.nearest(rng.standard_gamma(strength_N[:, None] * (centres_ND + 1e-4)))


def _landmarks(space: SearchSpace) -> np.ndarray:
    num_domains = len(space.domains)
    natural = np.array(list(space.natural.values()))
    return space.nearest(np.concatenate([np.full((1, num_domains), 1.0), natural[None], np.eye(num_domains)]))


def _dirichlet(
    space: SearchSpace, num: int, rng: np.random.Generator, temperature: float, strength: tuple[float, float], min_weight: float
) -> np.ndarray:
    around_D = np.array(list(space.natural.values())) ** temperature
    around_D /= around_D.sum()
    strength_M = np.exp(rng.uniform(np.log(strength[0]), np.log(strength[1]), size=num))
    drawn_MD = rng.standard_gamma(np.maximum(strength_M[:, None] * around_D, 1e-6))
    drawn_MD /= np.maximum(drawn_MD.sum(axis=1, keepdims=True), 1e-300)
    drawn_MD[drawn_MD < min_weight] = 0.0
    return drawn_MD


def _sobol(num_domains: int, num: int, rng: np.random.Generator) -> np.ndarray:
    """Scrambled Sobol points of the cube, as normalised exponentials: uniform on the simplex."""
    from scipy.stats import qmc

    power = int(np.ceil(np.log2(max(num, 2))))
    cube_MD = qmc.Sobol(num_domains, rng=rng).random_base2(power)[:num]
    return -np.log(np.clip(1 - cube_MD, 1e-12, 1.0))


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
    """`num` rows of the pool, each the farthest from all before it (Hellinger distance). Starts away from chosen_MD if that has
    rows, else with the pool's first row. Where the pool is too small, rows repeat."""
    roots_MD = np.sqrt(np.clip(pool_MD, 0, None))
    nearest_M = np.full(len(pool_MD), np.inf)
    for row_D in () if chosen_MD is None else np.sqrt(np.clip(chosen_MD, 0, None)):
        nearest_M = np.minimum(nearest_M, ((roots_MD - row_D) ** 2).sum(axis=1))
    picked = []
    for _ in range(num):
        picked.append(int(nearest_M.argmax()))
        nearest_M = np.minimum(nearest_M, ((roots_MD - roots_MD[picked[-1]]) ** 2).sum(axis=1))
    return pool_MD[picked]


def _i_optimal(pool_MD: np.ndarray, chosen_MD: np.ndarray, num: int) -> np.ndarray:
    """Greedy I-optimal design for Scheffe's quadratic model: each row lowers the pool's mean predictive variance the most."""
    features_MF = _scheffe(pool_MD)
    moment_FF = features_MF.T @ features_MF / len(pool_MD)
    first_MF = _scheffe(chosen_MD)
    # A weak prior keeps the first rows, when there are fewer of them than features, well defined.
    inverse_FF = np.linalg.inv(first_MF.T @ first_MF + 1e-3 * moment_FF + 1e-9 * np.eye(len(moment_FF)))
    picked = []
    for _ in range(num):
        pulled_MF = features_MF @ inverse_FF
        gain_M = ((pulled_MF @ moment_FF) * pulled_MF).sum(axis=1) / (1 + (pulled_MF * features_MF).sum(axis=1))
        picked.append(int(gain_M.argmax()))
        pull_F = pulled_MF[picked[-1]]
        inverse_FF -= np.outer(pull_F, pull_F) / (1 + features_MF[picked[-1]] @ pull_F)
    return pool_MD[picked]


def _scheffe(weights_MD: np.ndarray) -> np.ndarray:
    left, right = np.triu_indices(weights_MD.shape[1], k=1)
    return np.concatenate([weights_MD, weights_MD[:, left] * weights_MD[:, right]], axis=1)
