"""Parametric mixing laws: a score as a curve in one weighted sum of the shares, fitted by bounded least squares."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np


class _Law(ABC):
    """score = offset + sign * curve(parameters, shares). A loss falls along its curve (sign +1), an accuracy rises (-1)."""

    _sign = 1.0
    _parameters: np.ndarray
    _std: float
    _lowest: float
    _highest: float
    """An exponential of few proxies explodes where there are none: predictions reach as far beyond the scores as these lie
    apart, and are less sure by what they are cut."""

    @abstractmethod
    def _curve(self, parameters: np.ndarray, shares_MD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """curve_M and its slopes_MP by the parameters after the offset."""

    @abstractmethod
    def _start(self, shares_MD: np.ndarray, scores_M: np.ndarray) -> np.ndarray: ...

    @abstractmethod
    def _bounds(self, num_domains: int) -> tuple[np.ndarray, np.ndarray]: ...

    @abstractmethod
    def _pull(self, num_domains: int) -> tuple[np.ndarray, np.ndarray]:
        """Strength and target of the weak prior on the parameters after the offset."""

    def fit(self, shares_MD: np.ndarray, scores_M: np.ndarray) -> None:
        solved = []
        for sign in (1.0, -1.0):
            start = np.append(np.min(sign * scores_M) - 0.5, self._start(shares_MD, sign * scores_M))
            solved.append((*self._solve(shares_MD, sign * scores_M, start), sign))
        _, self._parameters, self._sign = min(solved, key=lambda found: found[0])
        self._measure_noise(shares_MD, scores_M)

    def refit(self, shares_MD: np.ndarray, scores_M: np.ndarray, *, tune: bool) -> _Law:
        again = type(self)()
        if tune:
            again.fit(shares_MD, scores_M)
            return again
        again._sign = self._sign
        _, again._parameters = self._solve(shares_MD, self._sign * scores_M, self._parameters)
        again._measure_noise(shares_MD, scores_M)
        return again

    def _solve(self, shares_MD: np.ndarray, falling_M: np.ndarray, start: np.ndarray) -> tuple[float, np.ndarray]:
        from scipy.optimize import least_squares

        strength, target = self._pull(shares_MD.shape[1])
        low, high = self._bounds(shares_MD.shape[1])
        low, high = np.append(falling_M.min() - 20, low), np.append(falling_M.max(), high)

        def residuals(parameters: np.ndarray) -> np.ndarray:
            curve_M, _ = self._curve(parameters[1:], shares_MD)
            return np.concatenate([parameters[0] + curve_M - falling_M, strength * (parameters[1:] - target)])

        def slopes(parameters: np.ndarray) -> np.ndarray:
            _, slopes_MP = self._curve(parameters[1:], shares_MD)
            data = np.concatenate([np.ones((len(falling_M), 1)), slopes_MP], axis=1)
            return np.concatenate([data, np.diag(np.append(0.0, strength))[1:]])

        start = np.clip(start, low + 1e-6, high - 1e-6)
        solved = least_squares(residuals, start, jac=slopes, bounds=(low, high), max_nfev=100)
        return float(solved.cost), solved.x

    def _measure_noise(self, shares_MD: np.ndarray, scores_M: np.ndarray) -> None:
        reach = float(np.ptp(scores_M))
        self._lowest, self._highest = float(scores_M.min()) - reach, float(scores_M.max()) + reach
        degrees = max(len(scores_M) - len(self._parameters), len(scores_M) // 4, 1)
        self._std = float(np.sqrt(np.square(scores_M - self.mean(shares_MD)).sum() / degrees)) + 1e-9

    def _unbounded(self, shares_ND: np.ndarray) -> np.ndarray:
        return self._sign * (self._parameters[0] + self._curve(self._parameters[1:], shares_ND)[0])

    def mean(self, shares_ND: np.ndarray) -> np.ndarray:
        return np.clip(self._unbounded(shares_ND), self._lowest, self._highest)

    def predict(self, shares_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        curve_N = self._unbounded(shares_ND)
        mean_N = np.clip(curve_N, self._lowest, self._highest)
        return mean_N, self._std + np.minimum(np.abs(curve_N - mean_N), self._highest - self._lowest)


class LogLinear(_Law):
    """The exponential mixing law: score = c +- exp(t . shares)."""

    def _curve(self, parameters: np.ndarray, shares_MD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        curve_M = np.exp(np.clip(shares_MD @ parameters, -30, 30))
        return curve_M, curve_M[:, None] * shares_MD

    def _start(self, shares_MD: np.ndarray, scores_M: np.ndarray) -> np.ndarray:
        return np.zeros(shares_MD.shape[1])

    def _bounds(self, num_domains: int) -> tuple[np.ndarray, np.ndarray]:
        return np.full(num_domains, -30.0), np.full(num_domains, 30.0)

    def _pull(self, num_domains: int) -> tuple[np.ndarray, np.ndarray]:
        return np.full(num_domains, 1e-2), np.zeros(num_domains)


class PowerLaw(_Law):
    """The transfer law: score = c +- (e + sum_d a_d shares_d ** p) ** -b, all of e, a, p, b positive.

    a_d is how much a token of domain d is worth to this score, p < 1 how soon more of one domain saturates. Parameters are the
    logarithms of b, e, p and a_D.
    """

    def _curve(self, parameters: np.ndarray, shares_MD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        power, small, exponent = np.exp(parameters[:3])
        logs_MD = np.log(np.maximum(shares_MD, 1e-12))
        terms_MD = np.where(shares_MD > 0, np.exp(exponent * logs_MD + parameters[3:]), 0.0)
        worth_M = small + terms_MD.sum(axis=1)
        curve_M = worth_M**-power
        by_worth_M = -power * curve_M / worth_M
        slopes = (
            -power * curve_M * np.log(worth_M),
            by_worth_M * small,
            by_worth_M * exponent * (terms_MD * logs_MD).sum(axis=1),
        )
        return curve_M, np.concatenate([np.stack(slopes, axis=1), by_worth_M[:, None] * terms_MD], axis=1)

    def _start(self, shares_MD: np.ndarray, scores_M: np.ndarray) -> np.ndarray:
        inputs_MD = shares_MD**0.3 - np.mean(shares_MD**0.3, axis=0)
        scale_D = np.sqrt(np.square(inputs_MD).sum(axis=0) * np.square(scores_M - scores_M.mean()).sum()) + 1e-12
        helps_D = np.maximum(-(inputs_MD * (scores_M - scores_M.mean())[:, None]).sum(axis=0) / scale_D, 0.0)
        return np.concatenate([np.log([0.5, 0.02, 0.8]), np.log(0.05) + 4 * helps_D])

    def _bounds(self, num_domains: int) -> tuple[np.ndarray, np.ndarray]:
        low = np.concatenate([[-4.0, -12.0, -2.0], np.full(num_domains, -12.0)])
        return low, np.concatenate([[2.0, 6.0, 0.5], np.full(num_domains, 6.0)])

    def _pull(self, num_domains: int) -> tuple[np.ndarray, np.ndarray]:
        strength = np.concatenate([[0.0, 0.0, 0.05], np.full(num_domains, 0.015)])
        return strength, np.concatenate([np.zeros(3), np.full(num_domains, np.log(0.05))])
