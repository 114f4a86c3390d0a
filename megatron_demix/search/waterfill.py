"""Exact points of a bounded simplex: scale a row until its clipped entries sum to the total.

Weights live on a grid of 2**-40, so that every sum of up to 8192 of them is exact in float64, in any order, and a
bound that is met on the grid is met in every later computation.
"""

from __future__ import annotations

import numpy as np

GRID = 2**40
_FLOOR = 1e-30


def floor_to_grid(values):
    """Largest grid counts (int64) not above `values`; a value within float rounding of a grid point is that point."""
    return np.floor(np.asarray(values, np.float64) * GRID + 1e-3).astype(np.int64)


def ceil_to_grid(values):
    """Smallest grid counts (int64) not below `values`; a value within float rounding of a grid point is that point."""
    return np.ceil(np.asarray(values, np.float64) * GRID - 1e-3).astype(np.int64)


def waterfill(amounts_MD: np.ndarray, lows_D: np.ndarray, highs_D: np.ndarray, totals_M: np.ndarray) -> np.ndarray:
    """Grid counts_MD (int64) with lows <= counts <= highs and exact row sums `totals_M`, closest to amounts_MD.

    Row m is clip(c_m * amounts, lows, highs) for the one scale c_m that gives the sum: the Kullback-Leibler projection
    of the row onto the box, so entries that meet no bound keep their proportions. amounts_MD: finite, >= 0, any scale;
    an entry of 0 receives something only when all others are full. lows, highs, totals: int64 grid counts with
    sum(lows) <= totals <= sum(highs), which the caller guarantees.
    """
    amounts_MD = amounts_MD / np.maximum(amounts_MD.sum(axis=1, keepdims=True), _FLOOR) + _FLOOR
    scales_M = totals_M / amounts_MD.sum(axis=1)
    filled_MD = scales_M[:, None] * amounts_MD
    outside_M = ((filled_MD < lows_D) | (filled_MD > highs_D)).any(axis=1)
    if outside_M.any():
        part_MD = amounts_MD[outside_M]
        scales = _scales(part_MD, lows_D.astype(np.float64), highs_D.astype(np.float64), totals_M[outside_M])
        filled_MD[outside_M] = np.clip(scales[:, None] * part_MD, lows_D, highs_D)
    counts_MD = np.clip(np.floor(filled_MD).astype(np.int64), lows_D, highs_D)
    _hand_out(counts_MD, totals_M - counts_MD.sum(axis=1), highs_D)
    return counts_MD


def _scales(amounts_MD: np.ndarray, lows_D: np.ndarray, highs_D: np.ndarray, totals_M: np.ndarray) -> np.ndarray:
    """The scale of each row. The clipped sum grows with the scale and is linear between the entries' bounds, so: bisect
    over the sorted bounds, then solve the linear piece with the entries that are free in it."""
    enters_MD, leaves_MD = lows_D / amounts_MD, highs_D / amounts_MD
    bounds_MB = np.sort(np.concatenate([enters_MD, leaves_MD], axis=1), axis=1)
    rows = np.arange(len(amounts_MD))
    below, above = np.zeros(len(rows), np.int64), np.full(len(rows), bounds_MB.shape[1] - 1)
    while (open_M := above - below > 1).any():
        middle = (below + above) // 2
        sums_M = np.clip(bounds_MB[rows, middle][:, None] * amounts_MD, lows_D, highs_D).sum(axis=1)
        reaches_M = sums_M > totals_M
        above = np.where(open_M & reaches_M, middle, above)
        below = np.where(open_M & ~reaches_M, middle, below)
    start_M, end_M = bounds_MB[rows, below], bounds_MB[rows, above]
    full_MD, empty_MD = leaves_MD <= start_M[:, None], enters_MD > start_M[:, None]
    fixed_M = np.where(full_MD, highs_D, 0).sum(axis=1) + np.where(empty_MD & ~full_MD, lows_D, 0).sum(axis=1)
    free_M = np.where(full_MD | empty_MD, 0, amounts_MD).sum(axis=1)
    solved_M = np.divide(totals_M - fixed_M, free_M, out=end_M.copy(), where=free_M > 0)
    return np.clip(solved_M, start_M, end_M)


def _hand_out(counts_MD: np.ndarray, missing_M: np.ndarray, highs_D: np.ndarray) -> None:
    """Add the few units lost to rounding (or to a clipped scale), in place: to the largest entry that has room, so that
    zeros stay zero; where no single entry has room for all of them, to each in turn."""
    room_MD = highs_D - counts_MD
    fits_MD = room_MD >= missing_M[:, None]
    rows = np.flatnonzero((missing_M > 0) & fits_MD.any(axis=1))
    counts_MD[rows, np.where(fits_MD[rows], counts_MD[rows], -1).argmax(axis=1)] += missing_M[rows]
    for row in np.flatnonzero((missing_M > 0) & ~fits_MD.any(axis=1)):
        left = int(missing_M[row])
        for d in np.argsort(-counts_MD[row], kind="stable"):
            step = min(left, int(highs_D[d] - counts_MD[row, d]))
            counts_MD[row, d] += step
            left -= step
