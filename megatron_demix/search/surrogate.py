"""A surrogate predicts one score of any mixture from the proxies measured so far, and says how sure it is.

Every surrogate is cross-validated: the out-of-fold errors choose the family (`auto`), weigh the stack, and scale the standard
deviations so that a nominal 90 % interval held 90 % of the proxies that the fit had not seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, get_args

import numpy as np

from megatron_demix.errors import ConfigError, IncompatibleInputs
from megatron_demix.search.regressors import REGRESSORS, Regressor
from megatron_demix.search.sample import distinct, kinds
from megatron_demix.study.choices import MIN_PROXIES, SurrogateKind

KINDS = get_args(SurrogateKind)
_FOLDS, _FOLDS_SMALL, _SMALL = 5, 10, 128
"""More folds for fewer proxies, so that each fit still sees most of them."""
Z90 = 1.6448536269514722
"""Standard deviations from the mean to each end of a 90 % interval."""
LITTLE_SKILL = 0.1
"""A surrogate with less is hardly better than the mean."""


@dataclass(frozen=True)
class Surrogate:
    """A fitted score. `kind` is the family chosen; `members` its weighted regressors (one, unless it is a stack).

    shares_MD, scores_M: of all proxies; a score is NaN where it was not measured, and that proxy had no part in the fit.
    cross_validation: {"rmse", "spearman", "measured_M", "predicted_M", "std_M"}, out of fold and in the score's unit, and
    "kinds": {kind: rmse}, by which `auto` chose: in standard deviations of the score (of its logarithm, if scale says so).
    """

    kind: str
    members: tuple[tuple[float, Regressor], ...]
    shares_MD: np.ndarray
    scores_M: np.ndarray
    cross_validation: dict[str, Any]
    scale: Scale
    widen: float
    """Factor on the raw standard deviations, from cross-validation."""
    num_dropped: int = 0
    """The last columns of shares_MD, of domains that only proxies of an earlier study had: predictions have none of these."""

    def mean(self, shares_ND: np.ndarray) -> np.ndarray:
        """The mean of predict alone, for large N."""
        shares_ND = self._with_dropped(shares_ND)
        return self.scale.to_scores(_weighted([(weight, part.mean(shares_ND)) for weight, part in self.members]))

    def predict(self, shares_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean_N and standard deviation_N of the score that would be measured at actual shares_ND, in the score's unit."""
        shares_ND = self._with_dropped(shares_ND)
        predictions = [(weight, *part.predict(shares_ND)) for weight, part in self.members]
        scores_N = self.scale.to_scores(_weighted([(weight, mean_N) for weight, mean_N, _ in predictions]))
        # Members err alike, so their deviations add up rather than average out.
        std_N = _weighted([(weight, std_N) for weight, _, std_N in predictions])
        return scores_N, self.scale.std_of(scores_N, self.widen * std_N)

    @property
    def errors_M(self) -> np.ndarray:
        """Out of fold, in the score's unit; NaN where the score was not measured."""
        errors_M = np.full(len(self.scores_M), np.nan)
        errors_M[np.isfinite(self.scores_M)] = self.cross_validation["measured_M"] - self.cross_validation["predicted_M"]
        return errors_M

    @property
    def skill(self) -> float:
        """The part of the score's variance that is predicted out of fold; of noise alone, about 0."""
        return 1 - self.cross_validation["rmse"] ** 2 / float(np.nanvar(self.scores_M, ddof=1))

    def _with_dropped(self, shares_ND: np.ndarray) -> np.ndarray:
        shares_ND = np.asarray(shares_ND, np.float64)
        return np.pad(shares_ND, ((0, 0), (0, self.num_dropped))) if self.num_dropped else shares_ND

    def refit(self, rows: np.ndarray) -> Surrogate:
        """The same family with the same hyperparameters on other rows (a bootstrap sample) of the same proxies."""
        rows = rows[np.isfinite(self.scores_M[rows])]
        standard_M = self.scale.to_standard(self.scores_M[rows])
        members = tuple((weight, part.refit(self.shares_MD[rows], standard_M, tune=False)) for weight, part in self.members)
        return replace(self, members=members)


def _weighted(parts: list[tuple[float, np.ndarray]]) -> np.ndarray:
    return np.sum([weight * values_N for weight, values_N in parts], axis=0)


@dataclass(frozen=True)
class Scale:
    """What the families see of a score: mean 0 and standard deviation 1, of its logarithm where that is less skewed.

    A loss has a floor and a long tail above it, so errors are closer to equal in its logarithm.
    """

    logarithmic: bool
    centre: float
    spread: float

    @classmethod
    def of(cls, scores_M: np.ndarray) -> Scale:
        logarithmic = bool(scores_M.min() > 0) and abs(_skewness(np.log(scores_M))) < abs(_skewness(scores_M))
        values_M = np.log(scores_M) if logarithmic else scores_M
        return cls(logarithmic, float(values_M.mean()), float(values_M.std()))

    def to_standard(self, scores_M: np.ndarray) -> np.ndarray:
        return ((np.log(scores_M) if self.logarithmic else scores_M) - self.centre) / self.spread

    def to_scores(self, standard_M: np.ndarray) -> np.ndarray:
        values_M = self.centre + self.spread * standard_M
        return np.exp(values_M) if self.logarithmic else values_M

    def std_of(self, scores_M: np.ndarray, standard_stds_M: np.ndarray) -> np.ndarray:
        """A standard deviation in the score's unit, to first order."""
        return self.spread * standard_stds_M * (np.abs(scores_M) if self.logarithmic else 1.0)


def _skewness(values_M: np.ndarray) -> float:
    return float(np.mean(((values_M - values_M.mean()) / values_M.std()) ** 3))


@dataclass
class _Trial:
    """One family's out-of-fold predictions of the standardised scores."""

    kind: str
    mean_M: np.ndarray
    std_M: np.ndarray
    parts: list[tuple[float, str]] = field(default_factory=list)

    def rmse(self, scores_M: np.ndarray) -> float:
        return float(np.sqrt(np.mean(np.square(self.mean_M - scores_M))))


def fit_surrogate(
    shares_MD: np.ndarray,
    scores_M: np.ndarray,
    kind: str = "auto",
    *,
    seed: int = 0,
    name: str = "score",
    measured_M: np.ndarray | None = None,
    num_dropped: int = 0,
) -> Surrogate:
    """Fit scores_M of M proxies against their actual shares_MD.

    measured_M: which proxies have this score; the others have no part in the fit. Without it, all must. num_dropped: that many
    last columns are domains that mixtures to be predicted no longer have.

    auto takes the family, or the stack of them, with the least cross-validated error; lightgbm takes part in neither, so that
    the choice does not depend on what is installed. name labels the errors.
    Raises ConfigError (unknown kind), IncompatibleInputs (fewer than 8 proxies, NaN, constant scores, shapes).
    """
    all_shares_MD, all_scores_M = shares_MD, scores_M = np.asarray(shares_MD, np.float64), np.asarray(scores_M, np.float64)
    if measured_M is not None:
        all_scores_M = np.where(measured_M, scores_M, np.nan)
        shares_MD, scores_M = shares_MD[measured_M], scores_M[measured_M]
    check_fit(shares_MD, scores_M, kind, name)
    scale = Scale.of(scores_M)
    standard_M = scale.to_standard(scores_M)
    folds_M = _folds(shares_MD, seed)
    fitted: dict[str, Regressor] = {}
    trials: list[_Trial] = []
    for candidate in _candidates(kind):
        fitted[candidate] = REGRESSORS[candidate](seed)
        fitted[candidate].fit(shares_MD, standard_M)
        trials.append(_cross_validate(candidate, fitted[candidate], shares_MD, standard_M, folds_M))
    if kind in ("auto", "stack"):
        trials.append(_stack(trials, standard_M, folds_M))
    chosen = trials[-1] if kind == "stack" else min(trials, key=lambda trial: trial.rmse(standard_M))
    widen = _calibration(standard_M - chosen.mean_M, chosen.std_M)
    predicted_M = scale.to_scores(chosen.mean_M)
    report = {
        "rmse": float(np.sqrt(np.mean(np.square(predicted_M - scores_M)))),
        "spearman": _spearman(predicted_M, scores_M),
        "measured_M": scores_M,
        "predicted_M": predicted_M,
        "std_M": scale.std_of(predicted_M, widen * chosen.std_M),
        "kinds": {trial.kind: trial.rmse(standard_M) for trial in trials},
    }
    members = tuple((weight, fitted[part]) for weight, part in chosen.parts)
    return Surrogate(chosen.kind, members, all_shares_MD, all_scores_M, report, scale, widen, num_dropped)


def check_fit(shares_MD: np.ndarray, scores_M: np.ndarray, kind: str, name: str) -> None:
    """Raise as fit_surrogate does."""
    if kind not in KINDS:
        raise ConfigError(f"surrogate kind {kind!r} is unknown; expected one of {', '.join(KINDS)}.")
    check_shapes(shares_MD, scores_M, name)
    if (num := len(distinct(shares_MD))) < MIN_PROXIES:
        raise IncompatibleInputs(
            f"{name}: {num} proxies{' of different mixtures' if num < len(scores_M) else ''} are too few for a surrogate, "
            f"expected at least {MIN_PROXIES}. Evaluate more mixtures."
        )
    for what, bad_M in (("shares", ~np.isfinite(shares_MD).all(axis=1)), ("score", ~np.isfinite(scores_M))):
        if bad_M.any():
            raise IncompatibleInputs(
                f"{name}: {what} of proxy {int(bad_M.argmax())} is not a finite number "
                f"({int(bad_M.sum())} of {len(bad_M)} such). "
                "A missing score is never filled in: evaluate the proxy again, or leave it out."
            )
    if is_constant(scores_M):
        raise IncompatibleInputs(
            f"{name}: all {len(scores_M)} scores are {scores_M[0]:g}: nothing to learn. Drop the score from the objective, or "
            "use a finer one (a loss instead of an accuracy)."
        )


def check_shapes(shares_MD: np.ndarray, scores_M: np.ndarray, name: str) -> None:
    """Raises IncompatibleInputs unless there is a score for each of the mixtures."""
    if shares_MD.ndim != 2 or scores_M.shape != shares_MD.shape[:1]:
        raise IncompatibleInputs(
            f"{name}: {shares_MD.shape} shares do not go with {scores_M.shape} scores; expected (M, D) and (M,)."
        )


def is_constant(scores_M: np.ndarray) -> bool:
    """Whether all scores are the same, but for rounding: there is nothing to learn from them. False where one is NaN."""
    return bool(np.ptp(scores_M) <= 1e-12 * max(1.0, float(np.abs(scores_M).max())))


def _candidates(kind: str) -> list[str]:
    if kind not in ("auto", "stack"):
        return [kind]
    return [name for name in REGRESSORS if name != "lightgbm"]


def _folds(shares_MD: np.ndarray, seed: int) -> np.ndarray:
    """The fold of each proxy: a seeded shuffle of the mixtures into equal parts. Proxies of one mixture (trained with other
    seeds, say) are in one: each would tell what the others score. The order of the rows has no part in it, as `kinds` sorts."""
    first_K, kind_M = kinds(shares_MD)
    num = len(first_K)
    folds = min(num // 2, _FOLDS_SMALL) if num < _SMALL else _FOLDS
    return (np.random.default_rng(seed).permutation(num) % folds)[kind_M]


def _cross_validate(
    kind: str, regressor: Regressor, shares_MD: np.ndarray, scores_M: np.ndarray, folds_M: np.ndarray
) -> _Trial:
    trial = _Trial(kind, np.empty(len(scores_M)), np.empty(len(scores_M)), [(1.0, kind)])
    for fold in range(folds_M.max() + 1):
        out_M = folds_M == fold
        if is_constant(scores_M[~out_M]):
            # All that differ are in this fold: the others tell nothing, least of all that there is nothing to tell.
            trial.mean_M[out_M], trial.std_M[out_M] = scores_M[~out_M][0], 1.0
            continue
        again = regressor.refit(shares_MD[~out_M], scores_M[~out_M], tune=True)
        trial.mean_M[out_M], trial.std_M[out_M] = again.predict(shares_MD[out_M])
    return trial


def _stack(trials: list[_Trial], scores_M: np.ndarray, folds_M: np.ndarray) -> _Trial:
    """Non-negative weights of the families that fit the out-of-fold predictions best. The stack's own out-of-fold predictions
    use, for each fold, the weights of the other folds."""
    means_MK, stds_MK = np.stack([t.mean_M for t in trials], axis=1), np.stack([t.std_M for t in trials], axis=1)
    stack = _Trial("stack", np.empty(len(scores_M)), np.empty(len(scores_M)))
    for fold in range(folds_M.max() + 1):
        out_M = folds_M == fold
        weights_K = _stack_weights(means_MK[~out_M], scores_M[~out_M])
        stack.mean_M[out_M], stack.std_M[out_M] = means_MK[out_M] @ weights_K, stds_MK[out_M] @ weights_K
    weights_K = _stack_weights(means_MK, scores_M)
    stack.parts = [(float(w), t.kind) for w, t in zip(weights_K, trials, strict=True) if w > 0]
    return stack


def _stack_weights(means_MK: np.ndarray, scores_M: np.ndarray) -> np.ndarray:
    from scipy.optimize import nnls

    # A heavy last row holds the sum at 1.
    weight = 1e3 * len(scores_M)
    weights_K, _ = nnls(np.vstack([means_MK, np.full(means_MK.shape[1], weight)]), np.append(scores_M, weight))
    return weights_K / weights_K.sum()


def _calibration(errors_M: np.ndarray, stds_M: np.ndarray) -> float:
    """The factor with which 90 % of the errors lie within 1.645 standard deviations (split-conformal rank). A single deviation
    far below the errors is a fit through all its points: it would multiply all others."""
    least = max(0.1 * float(np.sqrt(np.mean(np.square(errors_M)))), 1e-12)
    ratios_M = np.sort(np.abs(errors_M) / np.maximum(stds_M, least))
    rank = min(len(ratios_M), int(np.ceil(0.9 * (len(ratios_M) + 1))))
    return max(float(ratios_M[rank - 1]) / Z90, 1e-6)


def _spearman(left_M: np.ndarray, right_M: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(left_M, right_M).statistic)
