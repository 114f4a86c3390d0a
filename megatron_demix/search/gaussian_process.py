"""The Gaussian process family: on which inputs, from which start, and how the length scales are found."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

_EXPONENT = 0.3
_PART = 512
"""Mixtures whose covariances with the proxies are in memory at once: these fit the processor's cache, which more do not."""
_STEPS, _POLISHING = 200, 20
_LEAST_SPREAD = 1e-2
_TUNED, _POLISHED = 256, 1024
"""Length scales are found on at most the first number of proxies, because a step's cost grows with the cube of their number; up
to the second number, a few more steps then see all of them."""


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
        # Spread over the proxies as sorted by what they are, so that the order of the rows has no part in it.
        order_M = np.lexsort((scores_M, *shares_MD.T))
        some = order_M[np.linspace(0, len(scores_M) - 1, _TUNED).astype(int)]
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
        from megatron_demix.search.matern import MaternRegressor

        inputs_MD = shares_MD**_EXPONENT
        # The digits of a share that never varies are no distance.
        self._centre_D, self._spread_D = inputs_MD.mean(axis=0), np.maximum(inputs_MD.std(axis=0), _LEAST_SPREAD)
        with warnings.catch_warnings():
            # A scale at its bound means that a domain does not matter to this score: expected, not a problem.
            warnings.simplefilter("ignore")
            model = MaternRegressor(kernel, alpha=1e-8, optimizer=optimizer)
            self._model = model.fit((inputs_MD - self._centre_D) / self._spread_D, scores_M)

    def _parts(self, shares_ND: np.ndarray) -> list[np.ndarray]:
        """Inputs in parts: the covariance of 200 000 candidates with the proxies need not be in memory at once."""
        inputs_ND = (np.clip(shares_ND, 0, None) ** _EXPONENT - self._centre_D) / self._spread_D
        return np.array_split(inputs_ND, 1 + len(inputs_ND) // _PART)

    def mean(self, shares_ND: np.ndarray) -> np.ndarray:
        return np.concatenate([self._model.mean(part) for part in self._parts(shares_ND)])

    def predict(self, shares_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parts = [self._model.predict(part, return_std=True) for part in self._parts(shares_ND)]
        return np.concatenate([mean for mean, _ in parts]), np.concatenate([std for _, std in parts])


def _lbfgs(steps: int) -> Callable:
    def optimizer(objective: Callable, start: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, float]:
        from scipy.optimize import minimize

        solved = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": steps})
        return solved.x, solved.fun

    return optimizer
