"""Mixtures uniform over the feasible space, however small a part of the simplex that is."""

from __future__ import annotations

import numpy as np

from megatron_demix.search.space import SearchSpace
from megatron_demix.search.waterfill import GRID

_STEPS = 30
"""A domain, of each walk: every share is then redrawn about 60 times."""
_SHRINKS = 50


def walk_inside(space: SearchSpace, num: int, rng: np.random.Generator) -> np.ndarray:
    """`num` independent feasible merge weights_MD, each the end of a walk from the centre (hit-and-run, Smith 1984).

    A step moves a uniform part of what the bounds allow from one domain to another: along the edges of the space, so that no
    bound, however tight, stops a walk. Where the space is one point, all rows are that point.
    """
    lows_D, highs_D, lows_G, highs_G = (counts / GRID for counts in space.grid_bounds)
    member_DG = np.stack([np.isin(np.arange(len(lows_D)), columns) for columns, _, _ in space.blocks], axis=1)
    block_D = member_DG.argmax(axis=1)
    movable = np.flatnonzero(highs_D > lows_D)
    weights_MD = np.tile(space.centre_D, (num, 1))
    rows = np.arange(num)
    for _ in range(_STEPS * len(movable) if len(movable) > 1 else 0):
        first = rng.integers(len(movable), size=num)
        to, source = movable[first], movable[(first + rng.integers(1, len(movable), size=num)) % len(movable)]
        sums_MG = weights_MD @ member_DG
        given_M, taken_M = weights_MD[rows, to], weights_MD[rows, source]
        up_M = np.minimum(highs_D[to] - given_M, taken_M - lows_D[source])
        down_M = np.minimum(given_M - lows_D[to], highs_D[source] - taken_M)
        to_G, source_G = block_D[to], block_D[source]
        given_M, taken_M = sums_MG[rows, to_G], sums_MG[rows, source_G]
        crosses_M = to_G != source_G
        up_M = np.where(crosses_M, np.minimum(up_M, np.minimum(highs_G[to_G] - given_M, taken_M - lows_G[source_G])), up_M)
        down_M = np.where(
            crosses_M, np.minimum(down_M, np.minimum(given_M - lows_G[to_G], highs_G[source_G] - taken_M)), down_M
        )
        move_MD = np.zeros_like(weights_MD)
        move_MD[rows, to], move_MD[rows, source] = 1.0, -1.0
        weights_MD += _step(space, weights_MD, move_MD, np.maximum(down_M, 0), np.maximum(up_M, 0), rng)[:, None] * move_MD
    return space.nearest(np.maximum(weights_MD, 0))


def _step(
    space: SearchSpace,
    weights_MD: np.ndarray,
    move_MD: np.ndarray,
    down_M: np.ndarray,
    up_M: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Uniform in -down_M ... up_M, as far as the leash allows: what lies beyond it shortens the range, and is drawn again."""
    step_M = rng.uniform(-down_M, up_M)
    if space.max_kl is None:
        return step_M
    far = np.arange(len(step_M))
    for _ in range(_SHRINKS):
        far = far[space.kl(weights_MD[far] + step_M[far, None] * move_MD[far]) > space.max_kl]
        if not len(far):
            return step_M
        down_M[far] = np.where(step_M[far] < 0, -step_M[far], down_M[far])
        up_M[far] = np.where(step_M[far] > 0, step_M[far], up_M[far])
        step_M[far] = rng.uniform(-down_M[far], up_M[far])
    step_M[far] = 0.0
    return step_M
