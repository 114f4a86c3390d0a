"""Do proxies rank mixtures as training does? Agreement of proxies' scores with references', with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from megatron_demix.errors import IncompatibleInputs
from megatron_demix.search.agreement import METRICS
from megatron_demix.search.objective import normalised

MIN_MIXTURES = 4


def rank_consistency(
    proxies: Mapping[str, np.ndarray],
    references: Mapping[str, np.ndarray],
    *,
    reseeded: Mapping[str, np.ndarray] | None = None,
    objective: Mapping[str, float] | None = None,
    higher_is_better: Collection[str] = (),
    num_bootstraps: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Agreement of two score tables over the same M mixtures, in the same order: score name -> values_M.

    Returns {"num_mixtures", "scores": {name: report}, "macro": report, "objective": report of the weighted mean of `objective`,
    where given}. A report maps each metric of METRICS to {"value", "low", "high"}: the value and its bootstrap 90 % interval
    over mixtures (all None where it is undefined: top-25 % needs 12 mixtures). The upper end of a regret's interval is too low:
    most resamples have the same best mixtures. The macro report averages each metric over
    the scores, bootstrapped jointly. reseeded: the references trained again with another seed; adds "ceiling", the same reports
    of references against them. Both sides of that have seeds of their own, so a proxy without noise would agree better. By
    classical test theory its correlation is the square root of the ceiling's: "noiseless" has that of Spearman's rho, as
    {"scores": {name: rho}, "macro": rho, "objective": rho}; None where the ceiling's is undefined or below 0.
    Raises IncompatibleInputs on fewer than 4 mixtures, on other names or lengths, missing (NaN), infinite or constant scores;
    MixtureError where the objective's weights are not usable.
    """
    proxies, references = _checked(proxies, references, "proxies")
    num = len(next(iter(references.values())))
    counts_BM = _resamples(num, num_bootstraps, seed)
    report = {"num_mixtures": num} | _reports(proxies, references, objective, higher_is_better, counts_BM)
    if reseeded is not None:
        again, references = _checked(reseeded, references, "re-seeded references")
        report["ceiling"] = _reports(again, references, objective, higher_is_better, counts_BM)
        report["noiseless"] = _noiseless(report["ceiling"])
    return report


def _noiseless(ceiling: Mapping[str, Any]) -> dict[str, Any]:
    def root(metrics: Mapping[str, Any]) -> float | None:
        value = metrics["spearman"]["value"]
        return math.sqrt(value) if value is not None and value >= 0 else None

    scores = {name: root(metrics) for name, metrics in ceiling["scores"].items()}
    known = [value for value in scores.values() if value is not None]
    report: dict[str, Any] = {"scores": scores, "macro": math.fsum(known) / len(known) if len(known) == len(scores) else None}
    if "objective" in ceiling:
        report["objective"] = root(ceiling["objective"])
    return report


def _checked(
    left: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray], what: str
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    if set(left) != set(right) or not left:
        odd = sorted(set(left) ^ set(right))
        raise IncompatibleInputs(
            f"{what} and references have other scores: {', '.join(odd) or 'none at all'} on one side only. Name them alike, or "
            "drop the score."
        )
    tables = []
    for label, table in ((what, left), ("references", right)):
        arrays = {name: np.asarray(table[name], np.float64) for name in right}
        for name, values_M in arrays.items():
            _check_column(label, name, values_M)
        tables.append(arrays)
    for name in right:
        if tables[0][name].shape != tables[1][name].shape:
            raise IncompatibleInputs(
                f"score {name!r}: {len(tables[0][name])} {what} against {len(tables[1][name])} references; "
                "they must be the same mixtures."
            )
    return tables[0], tables[1]


def _check_column(label: str, name: str, values_M: np.ndarray) -> None:
    if len(values_M) < MIN_MIXTURES:
        raise IncompatibleInputs(
            f"{label}: {len(values_M)} mixtures are too few to compare ranks, expected at least {MIN_MIXTURES}."
        )
    if (bad_M := ~np.isfinite(values_M)).any():
        raise IncompatibleInputs(
            f"{label}: score {name!r} is missing or infinite for {int(bad_M.sum())} of {len(bad_M)} mixtures, the first at row "
            f"{int(bad_M.argmax())}. Evaluate them, or leave those mixtures out on both sides; nothing is filled in."
        )
    if np.ptp(values_M) == 0:
        raise IncompatibleInputs(
            f"{label}: score {name!r} is {values_M[0]:g} for every mixture: it ranks nothing. Drop the score."
        )


def _resamples(num: int, num_bootstraps: int, seed: int) -> np.ndarray:
    """counts_BM of each mixture in each bootstrap sample; the first row is the sample itself."""
    drawn_BM = np.random.default_rng(seed).multinomial(num, np.full(num, 1 / num), size=num_bootstraps)
    return np.concatenate([np.ones((1, num)), drawn_BM])


def _reports(
    proxies: Mapping[str, np.ndarray],
    references: Mapping[str, np.ndarray],
    objective: Mapping[str, float] | None,
    higher_is_better: Collection[str],
    counts_BM: np.ndarray,
) -> dict[str, Any]:
    # From here on, lower is better for every score.
    signs = {name: -1.0 if name in higher_is_better else 1.0 for name in references}
    traces = {name: _trace(signs[name] * proxies[name], signs[name] * references[name], counts_BM) for name in references}
    report: dict[str, Any] = {"scores": {name: _interval(trace) for name, trace in traces.items()}}
    macro = {metric: np.mean([trace[metric] for trace in traces.values()], axis=0) for metric in METRICS}
    # Regrets of different scores have different units: they do not average.
    macro["regret"] = np.full(len(counts_BM), np.nan)
    report["macro"] = _interval(macro)
    if objective is not None:
        weights = normalised(objective, references)
        left_M, right_M = (
            sum(weight * signs[name] * table[name] for name, weight in weights.items()) for table in (proxies, references)
        )
        report["objective"] = _interval(_trace(np.asarray(left_M), np.asarray(right_M), counts_BM))
    return report


def _interval(trace: Mapping[str, np.ndarray]) -> dict[str, dict[str, float | None]]:
    report: dict[str, dict[str, float | None]] = {}
    for metric, values_B in trace.items():
        drawn_B = values_B[1:][np.isfinite(values_B[1:])]
        if not np.isfinite(values_B[0]) or len(drawn_B) == 0:
            report[metric] = {"value": None, "low": None, "high": None}
        else:
            low, high = np.quantile(drawn_B, [0.05, 0.95])
            report[metric] = {"value": float(values_B[0]), "low": float(low), "high": float(high)}
    return report


def _trace(proxy_M: np.ndarray, reference_M: np.ndarray, counts_BM: np.ndarray) -> dict[str, np.ndarray]:
    """Every metric on every resample."""
    return {name: metric(proxy_M, reference_M, counts_BM) for name, metric in METRICS.items()}
