"""How far predictions reach beyond what was measured."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from megatron_demix.search.sample import distinct
from megatron_demix.search.surrogate import Surrogate

_MOST = 0.9


def distances(surrogates: Mapping[str, Surrogate], shares_ND: np.ndarray) -> tuple[np.ndarray, float]:
    """Of each of the actual shares_ND, the distance to the nearest measured mixture; and the one within which 9 in 10 measured
    mixtures have another. Farther off, a prediction is an extrapolation.

    Total variation: half the summed differences of shares, 0 to 1. Measured is what has any of the surrogates' scores.
    """
    from scipy.spatial import KDTree

    first = next(iter(surrogates.values()))
    has_M = np.any([np.isfinite(surrogate.scores_M) for surrogate in surrogates.values()], axis=0)
    measured = KDTree(distinct(first.shares_MD[has_M]))
    among_M2, _ = measured.query(measured.data, k=2, p=1)
    nearest_N, _ = measured.query(np.pad(shares_ND, ((0, 0), (0, first.num_dropped))), p=1)
    return nearest_N / 2, float(np.quantile(among_M2[:, 1] / 2, _MOST))


def far_off(nearest: float, usual: float) -> bool:
    """With room for rounded shares."""
    return nearest > 1.01 * usual + 1e-6
