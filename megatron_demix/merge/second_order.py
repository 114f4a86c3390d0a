"""Merges to second order in the weights, from a few more components that were trained on mixed weights.

What is trained on merge weights w is, to second order,  theta(w) = sum_k w_k theta_k + sum_{j<k} w_j w_k c_jk.  With q(w) the
products w_j w_k, P = K (K - 1) / 2 of them, and Q their rows at the mixed components' weights V, the smallest corrections that
explain those components are  c = Q^+ (theta_mixed - V theta).  The merge stays linear in all components: the mixed ones get
g = q(w) Q^+, the others  w - g V.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_demix.errors import ConfigError

_DIGITS = 10
"""Coefficients are rounded to these, so that a merge at a component's own weights is that component, bit for bit."""
_NEW = 1e-3
"""The part of a mixed component's products that no other one has has to be larger than this, of its length."""


class SecondOrder:
    """Components of K domains and R that were trained on mixed merge weights.

    mixed: by name, weights that sum to 1; a domain that one does not name has 0. Raises ConfigError where a name is a domain's,
    or where one corrects nothing, alone or beside the others.
    """

    def __init__(self, domains: Sequence[str], mixed: Mapping[str, Mapping[str, float]]) -> None:
        self.names = [*domains, *mixed]
        """Of all components, in the order of their coefficients."""
        self._domains = list(domains)
        self._mixed_RK = np.array([[w.get(d, 0.0) for d in domains] for w in mixed.values()]).reshape(-1, len(domains))
        products_RP = _products(self._mixed_RK)
        _check(self._domains, list(mixed), products_RP)
        self._inverse_PR = np.linalg.pinv(products_RP)

    def coefficients(self, weights_MK: np.ndarray) -> np.ndarray:
        """[M, K + R]. Of weights that sum to 1, whatever their signs, they do, too; some may be negative."""
        weights_MK = np.asarray(weights_MK, np.float64)
        if not len(self._mixed_RK):
            return weights_MK
        corrections_MR = _products(weights_MK) @ self._inverse_PR
        return np.round(np.hstack([weights_MK - corrections_MR @ self._mixed_RK, corrections_MR]), _DIGITS)

    @property
    def num_domains(self) -> int:
        """K."""
        return len(self._domains)

    @property
    def centroid_K(self) -> np.ndarray:
        """[K + R] the coefficients of equal weights."""
        return self.coefficients(np.full((1, self.num_domains), 1 / self.num_domains))[0]

    def of(self, weights: Mapping[str, float]) -> dict[str, float]:
        """The coefficients of one mixture, by component; its own weights where no component is mixed."""
        if not len(self._mixed_RK):
            return dict(weights)
        row_1K = np.array([[weights.get(d, 0.0) for d in self._domains]])
        return dict(zip(self.names, self.coefficients(row_1K)[0].tolist(), strict=True))


def _products(weights_MK: np.ndarray) -> np.ndarray:
    """[M, P] w_j w_k of all j < k."""
    first_P, second_P = np.triu_indices(weights_MK.shape[1], 1)
    return weights_MK[:, first_P] * weights_MK[:, second_P]


def _check(domains: Sequence[str], names: Sequence[str], products_RP: np.ndarray) -> None:
    for r, name in enumerate(names):
        if name in domains:
            raise ConfigError(f"mixed component {name!r} has the name of a domain's. Give it another.")
        length = np.linalg.norm(products_RP[r])
        if not length:
            raise ConfigError(f"mixed component {name!r} is of one domain alone, which is a component already. Leave it out.")
        before_PR = products_RP[:r].T
        rest_P = products_RP[r] - before_PR @ np.linalg.lstsq(before_PR, products_RP[r], rcond=None)[0]
        if np.linalg.norm(rest_P) < _NEW * length:
            raise ConfigError(
                f"mixed component {name!r} corrects nothing beside {', '.join(names[:r])}: the products of its weights, two by "
                "two, are a combination of theirs. Leave it out, or take another mixture."
            )
