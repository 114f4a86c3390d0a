"""The Gaussian process family: scikit-learn's regressor with a marginal likelihood whose gradient needs no D x M x M array."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

_EXPONENT = 0.3
_PART = 8192
_STEPS, _POLISHING = 200, 20
_LEAST_SPREAD = 1e-2
_TUNED, _POLISHED = 256, 1024
"""Length scales are found on at most the first number of proxies, spread over all, because a step's cost grows with the cube of
their number; up to the second number, a few more steps then see all of them."""


class GaussianProcess:
    """Matern 3/2 with one length scale a domain, on shares ** 0.3, plus noise; the marginal likelihood picks the scales.

    A power behaves like a logarithm, which losses follow, but is finite where a domain is absent.
    """

    def fit(self, shares_MD: np.ndarray, scores_M: np.ndarray) -> None:
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

        scales = np.full(shares_MD.shape[1], 3.0)
        kernel = ConstantKernel(10.0, (1e-2, 1e4)) * Matern(scales, (1e-1, 1e4), nu=1.5) + WhiteKernel(1e-2, (1e-6, 1.0))
        if len(scores_M) <= _TUNED:
            self._fit(shares_MD, scores_M, kernel, _lbfgs(_STEPS))
            return
        some = np.linspace(0, len(scores_M) - 1, _TUNED).astype(int)
        self._fit(shares_MD[some], scores_M[some], kernel, _lbfgs(_STEPS))
        polish = _lbfgs(_POLISHING) if len(scores_M) <= _POLISHED else None
        self._fit(shares_MD, scores_M, self._model.kernel_, polish)

    def refit(self, shares_MD: np.ndarray, scores_M: np.ndarray, *, tune: bool) -> GaussianProcess:
        again = GaussianProcess()
        if tune and len(scores_M) <= _TUNED:
            again.fit(shares_MD, scores_M)
        else:  # so many proxies fix the scales whether a fold of them is there or not
            again._fit(shares_MD, scores_M, self._model.kernel_, None)
        return again

    def _fit(self, shares_MD: np.ndarray, scores_M: np.ndarray, kernel: Any, optimizer: Callable | None) -> None:
        inputs_MD = shares_MD**_EXPONENT
        # The digits of a share that never varies are no distance.
        self._centre_D, self._spread_D = inputs_MD.mean(axis=0), np.maximum(inputs_MD.std(axis=0), _LEAST_SPREAD)
        with warnings.catch_warnings():
            # A scale at its bound means that a domain does not matter to this score: expected, not a problem.
            warnings.simplefilter("ignore")
            model = _regressor_class()(kernel, alpha=1e-8, optimizer=optimizer)
            self._model = model.fit((inputs_MD - self._centre_D) / self._spread_D, scores_M)

    def _parts(self, shares_ND: np.ndarray) -> list[np.ndarray]:
        """Inputs in parts: the covariance of 200 000 candidates with the proxies need not be in memory at once."""
        inputs_ND = (np.clip(shares_ND, 0, None) ** _EXPONENT - self._centre_D) / self._spread_D
        return np.array_split(inputs_ND, 1 + len(inputs_ND) // _PART)

    def mean(self, shares_ND: np.ndarray) -> np.ndarray:
        return np.concatenate([self._model.predict(part) for part in self._parts(shares_ND)])

    def predict(self, shares_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parts = [self._model.predict(part, return_std=True) for part in self._parts(shares_ND)]
        return np.concatenate([mean for mean, _ in parts]), np.concatenate([std for _, std in parts])


def _lbfgs(steps: int) -> Callable:
    def optimizer(objective: Callable, start: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, float]:
        from scipy.optimize import minimize

        solved = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": steps})
        return solved.x, solved.fun

    return optimizer


@cache
def _regressor_class() -> type:
    """scikit-learn's regressor for the one kernel used here (made on demand: the import takes seconds)."""
    from scipy.linalg import LinAlgError, cho_factor, cho_solve
    from sklearn.gaussian_process import GaussianProcessRegressor

    class MaternRegressor(GaussianProcessRegressor):
        """theta: log of the variance, of the D length scales and of the noise, as the kernel lays them out."""

        def log_marginal_likelihood(self, theta=None, eval_gradient=False, clone_kernel=True):
            if theta is None or not eval_gradient:
                return super().log_marginal_likelihood(theta, eval_gradient, clone_kernel)
            variance, noise = np.exp(theta[0]), np.exp(theta[-1])
            inputs_MD, scores_M = self.X_train_ / np.exp(theta[1:-1]), self.y_train_
            squares_M = np.square(inputs_MD).sum(axis=1)
            distance_MM = np.sqrt(np.maximum(3 * (squares_M[:, None] + squares_M - 2 * inputs_MD @ inputs_MD.T), 0))
            np.fill_diagonal(distance_MM, 0.0)
            decay_MM = np.exp(-distance_MM)
            signal_MM = variance * (1 + distance_MM) * decay_MM
            covariance_MM = signal_MM + (noise + self.alpha) * np.eye(len(scores_M))
            try:
                factor = cho_factor(covariance_MM, lower=True)
            except LinAlgError:
                return -np.inf, np.zeros_like(theta)
            dual_M = cho_solve(factor, scores_M)
            value = -0.5 * scores_M @ dual_M - np.log(np.diag(factor[0])).sum() - 0.5 * len(scores_M) * np.log(2 * np.pi)
            slope_MM = np.outer(dual_M, dual_M) - cho_solve(factor, np.eye(len(scores_M)))
            # d signal_ij / d log scale_d = 3 variance decay_ij (x_id - x_jd)^2, summed against the symmetric slope for all d
            # at once: sum_ij W_ij (x_i - x_j)^2 = 2 (sum_i W_i. x_i^2 - x' W x).
            weight_MM = 3 * variance * slope_MM * decay_MM
            by_scale_D = weight_MM.sum(axis=1) @ np.square(inputs_MD) - (inputs_MD * (weight_MM @ inputs_MD)).sum(axis=0)
            gradient = np.concatenate([[0.5 * (slope_MM * signal_MM).sum()], by_scale_D, [0.5 * noise * np.trace(slope_MM)]])
            return value, gradient

    return MaternRegressor
