"""The families of curves a surrogate can be, from shares to one standardised score. All give a mean and a standard deviation.

Shares enter as powers, logarithms or products, because a loss falls roughly with the logarithm of its domain's share.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from megatron_demix.errors import ConfigError


class Regressor(Protocol):
    """scores_M have mean 0 and standard deviation 1; shares sum to 1. refit keeps the hyperparameters of the last fit."""

    def fit(self, shares_MD: np.ndarray, scores_M: np.ndarray) -> None: ...

    def refit(self, shares_MD: np.ndarray, scores_M: np.ndarray) -> Regressor: ...

    def predict(self, shares_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


Features = Callable[[np.ndarray], np.ndarray]
_SMALL_SHARE = 1e-3


def power_features(shares_MD: np.ndarray) -> np.ndarray:
    """shares ** 0.3: like a logarithm, but finite where a domain is absent."""
    return np.clip(shares_MD, 0, None) ** 0.3


def ridge_features(shares_MD: np.ndarray) -> np.ndarray:
    return np.concatenate([shares_MD, np.log(shares_MD + _SMALL_SHARE)], axis=1)


def quadratic_features(shares_MD: np.ndarray) -> np.ndarray:
    """Scheffe's quadratic: shares and their pairwise products (squares are implied, because shares sum to 1)."""
    left, right = np.triu_indices(shares_MD.shape[1], k=1)
    return np.concatenate([shares_MD, shares_MD[:, left] * shares_MD[:, right]], axis=1)


def scheffe_log_features(shares_MD: np.ndarray) -> np.ndarray:
    """Scheffe's quadratic with the logarithms of the shares."""
    return np.concatenate([quadratic_features(shares_MD), np.log(shares_MD + _SMALL_SHARE)], axis=1)


class Linear:
    """Bayesian ridge on fixed features: its two precisions are learned, so small samples shrink to the mean."""

    def __init__(self, features: Features) -> None:
        self._features = features

    def fit(self, shares_MD: np.ndarray, scores_M: np.ndarray) -> None:
        from sklearn.linear_model import BayesianRidge
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        self._model = make_pipeline(StandardScaler(), BayesianRidge()).fit(self._features(shares_MD), scores_M)

    def refit(self, shares_MD: np.ndarray, scores_M: np.ndarray) -> Linear:
        again = Linear(self._features)
        again.fit(shares_MD, scores_M)
        return again

    def predict(self, shares_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._model.predict(self._features(shares_ND), return_std=True)


class GaussianProcess:
    """Matern 5/2 with one length scale a domain, on powers of the shares, plus noise; marginal likelihood picks the scales."""

    def __init__(self, kernel: Any = None) -> None:
        self._kernel = kernel

    def fit(self, shares_MD: np.ndarray, scores_M: np.ndarray) -> None:
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

        inputs_MD = power_features(shares_MD)
        self._mean_D, self._std_D = inputs_MD.mean(axis=0), inputs_MD.std(axis=0) + 1e-9
        kernel, optimizer = self._kernel, None
        if kernel is None:
            scales = np.full(shares_MD.shape[1], 2.0)
            kernel = ConstantKernel(10.0, (1e-2, 1e4)) * Matern(scales, (1e-2, 1e4), nu=2.5) + WhiteKernel(1e-2, (1e-6, 1.0))
            optimizer = "fmin_l_bfgs_b"
        with warnings.catch_warnings():
            # A scale at its bound means that a domain does not matter to this score: expected, not a problem.
            warnings.simplefilter("ignore")
            model = GaussianProcessRegressor(kernel, optimizer=optimizer)
            self._model = model.fit((inputs_MD - self._mean_D) / self._std_D, scores_M)

    def refit(self, shares_MD: np.ndarray, scores_M: np.ndarray) -> GaussianProcess:
        again = GaussianProcess(self._model.kernel_)
        again.fit(shares_MD, scores_M)
        return again

    def predict(self, shares_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        inputs_ND = (power_features(shares_ND) - self._mean_D) / self._std_D
        # In parts: the covariance between 200 000 candidates and the proxies need not be in memory at once.
        parts = [self._model.predict(part, return_std=True) for part in np.array_split(inputs_ND, 1 + len(inputs_ND) // 8192)]
        return np.concatenate([mean for mean, _ in parts]), np.concatenate([std for _, std in parts])


class LogLinear:
    """The exponential mixing law, score = c +- exp(b + t . shares), fitted by least squares with a weak pull of t to 0."""

    def fit(self, shares_MD: np.ndarray, scores_M: np.ndarray) -> None:
        fits = [self._fit_sign(shares_MD, scores_M, sign) for sign in (1.0, -1.0)]
        _, self._sign, self._offset, self._slope_D = min(fits, key=lambda fit: fit[0])
        degrees = max(len(scores_M) - shares_MD.shape[1] - 1, 1)
        self._std = float(np.sqrt(np.square(scores_M - self._mean(shares_MD)).sum() / degrees)) + 1e-9

    @staticmethod
    def _fit_sign(shares_MD: np.ndarray, scores_M: np.ndarray, sign: float) -> tuple[float, float, float, np.ndarray]:
        from scipy.optimize import least_squares

        def residuals(parameters: np.ndarray) -> np.ndarray:
            curve_M = np.exp(np.clip(shares_MD @ parameters[1:], -30, 30))
            return np.concatenate([parameters[0] + sign * curve_M - scores_M, 1e-2 * parameters[1:]])

        def slopes(parameters: np.ndarray) -> np.ndarray:
            curve_M = np.exp(np.clip(shares_MD @ parameters[1:], -30, 30))
            by_offset = np.ones((len(scores_M), 1))
            upper = np.concatenate([by_offset, sign * curve_M[:, None] * shares_MD], axis=1)
            return np.concatenate([upper, 1e-2 * np.eye(len(parameters))[1:]])

        start = np.concatenate([[scores_M.mean() - sign], np.zeros(shares_MD.shape[1])])
        solved = least_squares(residuals, start, jac=slopes, max_nfev=500)
        return float(solved.cost), sign, float(solved.x[0]), solved.x[1:]

    def refit(self, shares_MD: np.ndarray, scores_M: np.ndarray) -> LogLinear:
        again = LogLinear()
        again.fit(shares_MD, scores_M)
        return again

    def _mean(self, shares_ND: np.ndarray) -> np.ndarray:
        return self._offset + self._sign * np.exp(np.clip(shares_ND @ self._slope_D, -30, 30))

    def predict(self, shares_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._mean(shares_ND), np.full(len(shares_ND), self._std)


class LightGBM:
    """Boosted trees of 7 leaves (the paper's larger trees need hundreds of proxies)."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def fit(self, shares_MD: np.ndarray, scores_M: np.ndarray) -> None:
        try:
            import lightgbm
        except (ImportError, OSError) as e:
            raise ConfigError(
                f"surrogate 'lightgbm' needs the package lightgbm ({e}): pip install 'megatron-demix[search]' (and libgomp1), "
                "or choose another surrogate."
            ) from e
        leaf = max(2, min(20, len(scores_M) // 16))
        settings = {
            "objective": "l2", "num_leaves": 7, "learning_rate": 0.05, "min_data_in_leaf": leaf, "feature_fraction": 0.7,
            "bagging_fraction": 0.8, "bagging_freq": 1, "seed": self._seed, 
            "verbose": -1, "num_threads": 1, "deterministic": True,
        }  # fmt: skip
        self._model = lightgbm.train(settings, lightgbm.Dataset(shares_MD, scores_M), num_boost_round=500)
        self._std = float(np.std(scores_M - self._model.predict(shares_MD))) + 1e-3

    def refit(self, shares_MD: np.ndarray, scores_M: np.ndarray) -> LightGBM:
        again = LightGBM(self._seed)
        again.fit(shares_MD, scores_M)
        return again

    def predict(self, shares_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(self._model.predict(shares_ND)), np.full(len(shares_ND), self._std)


REGRESSORS: dict[str, Callable[[int], Regressor]] = {
    "gaussian_process": lambda seed: GaussianProcess(),
    "quadratic": lambda seed: Linear(quadratic_features),
    "scheffe_log": lambda seed: Linear(scheffe_log_features),
    "ridge": lambda seed: Linear(ridge_features),
    "log_linear": lambda seed: LogLinear(),
    "lightgbm": LightGBM,
}
"""Kind -> a fresh regressor from a seed."""
