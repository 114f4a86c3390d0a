"""Scores of mixtures from those of the components alone: averaged with the merge weights, or on a law that one mixture bends.

The law is exponential in the weights, as losses of trained models were found to be (arXiv 2403.16952):
score(w) = limit +- exp(sum_k w_k log |score_k - limit|). It goes through every component's own score whatever its limit, so one
trained mixture, the centroid, says what that is; with a limit far away it is the weighted mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_NEAREST, _FARTHEST = 0.05, 1e3
"""How near and far a limit may be to the next component's score, in ranges of the components' scores."""


@dataclass(frozen=True)
class MixingLaw:
    """Of one score. limit: None where it is the weighted mean."""

    limit: float | None = None

    def of(self, weights_MK: np.ndarray, scores_K: np.ndarray) -> np.ndarray:
        """[M] what mixtures of components with these scores have, all of them on one side of the limit. Weights sum to 1."""
        if self.limit is None:
            return weights_MK @ scores_K
        sign = np.sign(scores_K[0] - self.limit)
        return self.limit + sign * np.exp(weights_MK @ np.log(sign * (scores_K - self.limit)))


def law_through(scores_K: np.ndarray, centroid: float, others: np.ndarray | None = None) -> MixingLaw:
    """The law by which components with these scores have the score `centroid` at equal weights.

    others: scores that the limit has to lie beyond, too. Where the centroid is beyond what a law allows, it is the nearest one.
    """
    from scipy.optimize import brentq

    every = scores_K if others is None else np.concatenate([scores_K, others])
    flat, spread = scores_K.mean(), np.ptp(every)
    even_1K = np.full((1, len(scores_K)), 1 / len(scores_K))
    # Bent downwards, it falls towards a limit below all scores; upwards, it rises to one above them.
    sign = 1.0 if centroid < flat else -1.0
    edge = every.min() if sign > 0 else every.max()

    def at(distance: float) -> MixingLaw:
        return MixingLaw(float(edge - sign * distance * spread))

    def beyond(distance: float) -> float:
        """How far the law's centroid is bent beyond the trained one."""
        return sign * float(centroid - at(distance).of(even_1K, scores_K)[0])

    if not spread or not np.isfinite(centroid) or beyond(_FARTHEST) >= 0:
        return MixingLaw()
    if beyond(_NEAREST) <= 0:
        return at(_NEAREST)
    return at(brentq(beyond, _NEAREST, _FARTHEST))
