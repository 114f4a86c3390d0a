"""What counts as a proxy's score: the merged model's, the components' own interpolated, or a stack of the two.

Merging and interpolating err in different ways: a merge loses what the components do not share, interpolation misses all that
domains do for one another. Their mean ranked mixtures better than either in benchmarks/rank_consistency.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

ProxyScore = Literal["merged", "interpolated", "stack"]


@dataclass(frozen=True)
class Centroid:
    """One score of the merge of all components in equal parts, and of models trained on the mixture it stands for."""

    merged: float
    trained: float


def proxy_scores(
    kind: ProxyScore, weights_MK: np.ndarray, merged_M: np.ndarray, components_K: np.ndarray, part: float = 0.5
) -> np.ndarray:
    """One score of M proxies. weights_MK: merge weights; merged_M, components_K: measured on the proxies and the components.

    stack: a score lies this part of the way from interpolated to merged.
    """
    if kind == "merged":
        return merged_M
    interpolated_M = weights_MK @ components_K
    if kind == "interpolated":
        return interpolated_M
    return interpolated_M + part * (merged_M - interpolated_M)


def part_of_merged(interpolated: float, centroid: Centroid) -> float:
    """How far the trained centroid lies between the interpolated and the merged one; never beyond either."""
    gap = centroid.merged - interpolated
    return float(np.clip((centroid.trained - interpolated) / gap, 0, 1)) if gap else 0.5
