"""The families a surrogate can be: curves from shares to one standardised score, each with a mean and a standard deviation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from megatron_demix.errors import ConfigError
from megatron_demix.search.gaussian_process import GaussianProcess
from megatron_demix.search.laws import LogLinear, PowerLaw
from megatron_demix.search.linear import Features, Linear


class Regressor(Protocol):
    """scores_M have mean 0 and standard deviation 1; shares sum to 1."""

    def fit(self, shares_MD: np.ndarray, scores_M: np.ndarray) -> None: ...

    def refit(self, shares_MD: np.ndarray, scores_M: np.ndarray, *, tune: bool) -> Regressor:
        """The same family on other proxies. tune: nothing of this fit has a part in it, but for hyperparameters that so many
        proxies fix without any few of them; otherwise hyperparameters are kept."""
        ...

    def mean(self, shares_ND: np.ndarray) -> np.ndarray: ...

    def predict(self, shares_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean_N and standard deviation_N of a new measurement."""
        ...


def import_lightgbm() -> Any:
    """Raises ConfigError where it cannot be imported."""
    try:
        import lightgbm
    except (ImportError, OSError) as e:
        raise ConfigError(
            f"surrogate 'lightgbm' needs the package lightgbm ({e}): pip install 'megatron-demix[search]' (and libgomp1), "
            "or choose another surrogate."
        ) from e
    return lightgbm


class LightGBM:
    """Boosted trees of 7 leaves (the paper's larger trees need hundreds of proxies)."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def fit(self, shares_MD: np.ndarray, scores_M: np.ndarray) -> None:
        lightgbm = import_lightgbm()
        settings = {
            "objective": "l2",
            "num_leaves": 7,
            "learning_rate": 0.05,
            "min_data_in_leaf": max(2, min(20, len(scores_M) // 16)),
            "feature_fraction": 0.7,
            "bagging_fraction": 0.8,
            "bagging_freq": 1,
            "seed": self._seed,
            "deterministic": True,
            "num_threads": 1,
            "verbose": -1,
        }
        self._model = lightgbm.train(settings, lightgbm.Dataset(shares_MD, scores_M), num_boost_round=500)
        self._std = float(np.std(scores_M - self.mean(shares_MD))) + 1e-3

    def refit(self, shares_MD: np.ndarray, scores_M: np.ndarray, *, tune: bool) -> LightGBM:
        again = LightGBM(self._seed)
        again.fit(shares_MD, scores_M)
        return again

    def mean(self, shares_ND: np.ndarray) -> np.ndarray:
        return np.asarray(self._model.predict(shares_ND))

    def predict(self, shares_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.mean(shares_ND), np.full(len(shares_ND), self._std)


REGRESSORS: dict[str, Callable[[int], Regressor]] = {
    "gaussian_process": lambda seed: GaussianProcess(),
    "power_law": lambda seed: PowerLaw(),
    "log_linear": lambda seed: LogLinear(),
    "quadratic": lambda seed: Linear(Features(pairs=True)),
    "scheffe_log": lambda seed: Linear(Features(pairs=True, logs=True)),
    "ridge": lambda seed: Linear(Features(logs=True)),
    "lightgbm": LightGBM,
}
"""Kind -> a fresh regressor from a seed."""
