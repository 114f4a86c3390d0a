"""The linear families: Bayesian ridge on shares, their pairwise products and their logarithms, without a table of the features.

Pairs of 100 domains are 5 000 features. A prediction needs none of them: sums of weighted pairs are a quadratic form of the
shares, and deviations need inner products with the proxies' features, which are polynomials of those of the shares.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_SMALL_SHARE = 1e-3
_PART = 1024
"""Mixtures whose inner products with the proxies' features are in memory at once."""
_PRIOR = 1e-6
"""Of both precisions, scikit-learn's: shape and rate of a gamma distribution that says nearly nothing."""
_STEPS, _TOLERANCE = 300, 1e-3
_SHARED = 33
"""Decompositions that are kept: those of three families, on all proxies and without each of ten folds. All scores use them."""


@dataclass(frozen=True)
class Features:
    """Shares; with pairs, the products of any two of them (Scheffe's quadratic: squares are implied, because shares sum to 1);
    with logs, their logarithms."""

    pairs: bool = False
    logs: bool = False

    def __call__(self, shares_MD: np.ndarray) -> np.ndarray:
        """features_MP"""
        parts = [shares_MD]
        if self.pairs:
            left, right = np.triu_indices(shares_MD.shape[1], k=1)
            parts.append(shares_MD[:, left] * shares_MD[:, right])
        if self.logs:
            parts.append(np.log(shares_MD + _SMALL_SHARE))
        return np.concatenate(parts, axis=1)

    def products(self, left_ND: np.ndarray, right_MD: np.ndarray) -> np.ndarray:
        """products_NM: features(left) @ features(right).T, to rounding."""
        dots_NM = left_ND @ right_MD.T
        products_NM = dots_NM
        if self.pairs:
            products_NM = dots_NM + (np.square(dots_NM) - np.square(left_ND) @ np.square(right_MD).T) / 2
        if self.logs:
            products_NM = products_NM + np.log(left_ND + _SMALL_SHARE) @ np.log(right_MD + _SMALL_SHARE).T
        return products_NM

    def squares(self, shares_ND: np.ndarray) -> np.ndarray:
        """squares_N: the features' summed squares, the diagonal of products(shares, shares)."""
        squares_N = dots_N = np.square(shares_ND).sum(axis=1)
        if self.pairs:
            squares_N = squares_N + (np.square(dots_N) - np.square(np.square(shares_ND)).sum(axis=1)) / 2
        if self.logs:
            squares_N = squares_N + np.square(np.log(shares_ND + _SMALL_SHARE)).sum(axis=1)
        return squares_N


class _Curve:
    """features(shares_ND) @ features(proxies_MD).T @ weights_M, for as many mixtures as one likes."""

    def __init__(self, features: Features, proxies_MD: np.ndarray, weights_M: np.ndarray) -> None:
        self._linear_D = proxies_MD.T @ weights_M
        self._pairs_DD = self._logs_D = None
        if features.pairs:
            self._pairs_DD = (proxies_MD.T * weights_M) @ proxies_MD / 2
            np.fill_diagonal(self._pairs_DD, 0.0)
        if features.logs:
            self._logs_D = np.log(proxies_MD + _SMALL_SHARE).T @ weights_M

    def __call__(self, shares_ND: np.ndarray) -> np.ndarray:
        values_N = shares_ND @ self._linear_D
        if self._pairs_DD is not None:
            values_N += ((shares_ND @ self._pairs_DD) * shares_ND).sum(axis=1)
        if self._logs_D is not None:
            values_N += np.log(shares_ND + _SMALL_SHARE) @ self._logs_D
        return values_N


@dataclass(frozen=True)
class _Decomposed:
    """Singular values_R and left_MR vectors of the proxies' centred features, and their centre.

    Where features outnumber proxies, there are too many to keep: no right vectors, axes_PR, and of the centre only its inner
    products_M with the proxies' features.
    """

    features: Features
    shares_MD: np.ndarray
    values_R: np.ndarray
    left_MR: np.ndarray
    axes_PR: np.ndarray | None
    centre: np.ndarray

    @classmethod
    def of(cls, features: Features, shares_MD: np.ndarray) -> _Decomposed:
        return _decomposed(features, shares_MD.shape[1], np.ascontiguousarray(shares_MD, np.float64).tobytes())

    def to_features(self, coefficients_R: np.ndarray) -> np.ndarray:
        """Of the features, where these are few; else left as they are."""
        return coefficients_R if self.axes_PR is None else self.axes_PR @ coefficients_R

    def along(self, shares_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """squares_N, summed over the centred features; and along_NR, these along the right vectors, times the values."""
        if self.axes_PR is not None:
            centred_NP = self.features(shares_ND) - self.centre
            return np.square(centred_NP).sum(axis=1), centred_NP @ self.axes_PR * self.values_R
        products_NM = self.features.products(shares_ND, self.shares_MD)
        to_centre_N = products_NM.mean(axis=1)
        squares_N = self.features.squares(shares_ND) - 2 * to_centre_N + self.centre.mean()
        products_NM -= to_centre_N[:, None] + (self.centre - self.centre.mean())
        return squares_N, products_NM @ self.left_MR


@lru_cache(_SHARED)
def _decomposed(features: Features, num_domains: int, shares: bytes) -> _Decomposed:
    shares_MD = np.frombuffer(shares).reshape(-1, num_domains)
    features_MP = features(shares_MD)
    centre_P = features_MP.mean(axis=0)
    features_MP -= centre_P
    if features_MP.shape[1] <= len(features_MP):
        left_MR, values_R, axes_RP = np.linalg.svd(features_MP, full_matrices=False)
        return _Decomposed(features, shares_MD, values_R, left_MR, axes_RP.T, centre_P)
    # The same of a matrix that is square: half the time.
    triangle_MM = np.asarray(np.linalg.qr(features_MP.T, mode="r"))
    left_MR, values_R, _ = np.linalg.svd(triangle_MM.T)
    return _Decomposed(features, shares_MD, values_R, left_MR, None, features.products(shares_MD, shares_MD).mean(axis=0))


class Linear:
    """Bayesian ridge on fixed features: its two precisions are learned, so small samples shrink to the mean.

    scikit-learn's BayesianRidge, to rounding where there are no more features than proxies, else with another end of its
    iterations. It decomposes the features anew for every score; they are the same for all.
    """

    def __init__(self, features: Features) -> None:
        self._features = features

    def fit(self, shares_MD: np.ndarray, scores_M: np.ndarray) -> None:
        # Features are not standardised: that would blow up the products of domains that seldom meet.
        self._shares_MD, found = shares_MD, _Decomposed.of(self._features, shares_MD)
        centred_M = scores_M - scores_M.mean()
        along_R = found.left_MR.T @ centred_M
        outside = float(np.square(centred_M - found.left_MR @ along_R).sum())
        self._noise, self._prior = _precisions(found, along_R, outside, len(scores_M))
        weights_M = found.left_MR @ (along_R / (found.values_R**2 + self._prior / self._noise))
        # Their sum is 0 but for rounding, which the centre of the features would multiply.
        self._curve = _Curve(self._features, shares_MD, weights_M - weights_M.mean())
        self._offset = float(scores_M.mean() - self._curve(shares_MD).mean())

    def refit(self, shares_MD: np.ndarray, scores_M: np.ndarray, *, tune: bool) -> Linear:
        again = Linear(self._features)
        again.fit(shares_MD, scores_M)
        return again

    def mean(self, shares_ND: np.ndarray) -> np.ndarray:
        return self._offset + self._curve(shares_ND)

    def predict(self, shares_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parts = np.array_split(shares_ND, 1 + len(shares_ND) // _PART)
        return self.mean(shares_ND), np.sqrt(1 / self._noise + np.concatenate([self._variance(part) for part in parts]))

    def _variance(self, shares_ND: np.ndarray) -> np.ndarray:
        """Of the mean: the prior's, less what the proxies tell."""
        # Not kept here: of many scores' surrogates, each would hold its own once it has been to another process and back.
        found = _Decomposed.of(self._features, self._shares_MD)
        squares_N, along_NR = found.along(shares_ND)
        told_R = self._noise / (self._noise * found.values_R**2 + self._prior)
        return np.maximum((squares_N - np.square(along_NR) @ told_R) / self._prior, 0)


def _precisions(found: _Decomposed, along_R: np.ndarray, outside: float, num: int) -> tuple[float, float]:
    """Of noise and prior, by MacKay's updates (1992) from `num` centred scores: what they are along the left vectors, and the
    square of what is left of them."""
    squares_R = found.values_R**2
    noise, prior = 1 / ((np.square(along_R).sum() + outside) / num + np.finfo(np.float64).eps), 1.0
    before_R = None
    for _ in range(_STEPS):
        ridge_R = squares_R + prior / noise
        coefficients_R = found.values_R * along_R / ridge_R
        error = outside + np.square(along_R * (prior / noise) / ridge_R).sum()
        used = (squares_R / ridge_R).sum()
        prior = float((used + 2 * _PRIOR) / (np.square(coefficients_R).sum() + 2 * _PRIOR))
        noise = float((num - used + 2 * _PRIOR) / (error + 2 * _PRIOR))
        if before_R is not None and np.abs(found.to_features(coefficients_R - before_R)).sum() < _TOLERANCE:
            break
        before_R = coefficients_R
    return noise, prior
