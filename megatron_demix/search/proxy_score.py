"""What counts as a proxy's score: the merged model's, the components' own interpolated, or a stack of the two.

Merging and interpolating err in different ways: a merge loses what the components do not share, interpolation misses all that
domains do for one another. Their mean ranked mixtures better than either in benchmarks/rank_consistency.py. Averaged
probabilities (megatron_demix.evaluate.ensemble) are the fourth kind.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Centroid:
    """One score of the merge of all components in equal parts, and of models trained on the mixture it stands for."""

    merged: float
    trained: float


def stacked(interpolated_M: np.ndarray, merged_M: np.ndarray, part: float = 0.5) -> np.ndarray:
    """One score of M proxies: this part of the way from interpolated to merged."""
    return interpolated_M + part * (merged_M - interpolated_M)


def part_of_merged(interpolated: float, centroid: Centroid) -> float:
    """How far the trained centroid lies between the interpolated and the merged one; never beyond either."""
    gap = centroid.merged - interpolated
    return float(np.clip((centroid.trained - interpolated) / gap, 0, 1)) if gap else 0.5
