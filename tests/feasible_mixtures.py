"""What SearchSpace promises, said once more from its bounds: an oracle for all that leaves a search."""

import numpy as np

from megatron_demix.search.space import TOLERANCE, SearchSpace


def feasible(space: SearchSpace, weights_MD: np.ndarray) -> np.ndarray:
    """bool_M: rows that lie on the simplex and within every bound (tolerance 1e-9 of a share)."""
    weights_MD = np.asarray(weights_MD, np.float64)
    shares_MD = space.shares(weights_MD)
    good_M = (weights_MD >= -TOLERANCE).all(axis=1) & (np.abs(weights_MD.sum(axis=1) - 1) <= TOLERANCE)
    good_M &= (shares_MD >= space.bounds_D2[:, 0] - TOLERANCE).all(axis=1)
    good_M &= (shares_MD <= space.bounds_D2[:, 1] + TOLERANCE).all(axis=1)
    for group in space.groups.values():
        sums_M = shares_MD[:, [space.domains.index(name) for name in group.domains]].sum(axis=1)
        good_M &= (sums_M >= group.lowest - TOLERANCE) & (sums_M <= group.highest + TOLERANCE)
    if space.max_kl is not None:
        good_M &= space.kl(weights_MD) <= space.max_kl + TOLERANCE
    return good_M
