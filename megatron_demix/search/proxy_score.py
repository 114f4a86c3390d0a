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
    kind: ProxyScore, weights_MK: np.ndarray, merged_M: np.ndarray, components_K: np.ndarray, centroid: Centroid | None = None
) -> np.ndarray:
    """One score of M proxies. weights_MK: merge weights; merged_M, components_K: measured on the proxies and the components.

    stack: the mean of merged and interpolated. Where the centroid has been trained, too, each score lies as far from
    interpolated to merged as the trained centroid does between theirs, and never beyond either.
    """
    if kind == "merged":
        return merged_M
    interpolated_M = weights_MK @ components_K
    if kind == "interpolated":
        return interpolated_M
    return interpolated_M + _part_of_merged(components_K, centroid) * (merged_M - interpolated_M)


def _part_of_merged(components_K: np.ndarray, centroid: Centroid | None) -> float:
    if centroid is None:
        return 0.5
    interpolated = float(components_K.mean())
    gap = centroid.merged - interpolated
    return float(np.clip((centroid.trained - interpolated) / gap, 0, 1)) if gap else 0.5
