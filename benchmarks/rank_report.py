"""From the tables of rank_consistency.py to its report: macro rho by group, composites, errors, paired differences, plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_demix.search.agreement import regret, spearman

NUM_BOOTSTRAPS = 1000
SPREAD_OVER_NOISE = 2.0
"""A score counts if its references' spread is at least this many times their seed noise."""
GROUPS = ("in-domain", "held-out", "skill bits", "skill accuracy")
DEFAULTS = ("merged", "interpolated", "stack: mean of merged and interpolated", "stack: calibrated at the centroid")
"""The candidates for the default proxy score."""
COMPOSITES: dict[str, tuple[str, dict[str, float] | None]] = {
    "held-out mean": ("held-out", None),
    "in-domain mean": ("in-domain", None),
    "code .6, math .3, english .1": ("in-domain", {"code": 0.6, "math": 0.3, "english": 0.1}),
    "mean of accuracies": ("skill accuracy", None),
    "mean of skill bits": ("skill bits", None),
}
"""Each is a weighted mean of the raw scores of a group, all of them (None: equal weights), counted or not."""
CALIBRATED = "stack: calibrated at the centroid"
"""What proxies were scored by, where a study said nothing, when the third run was made."""
CHALLENGERS = (
    "stack: mean of merged and interpolated",
    "stack: calibrated with one part for all losses",
    "mixing law through the components and the centroid",
    "stack: mean of merged and mixing law",
    "stack: mean of merged, interpolated and ensemble",
)
"""What could take its place (the third run)."""
TRAINED = "trained proxies, best in hindsight"
TRAINED_MORE = "trained proxies of one model more, best in hindsight"
TRAINED_AUTO = "trained proxies, 1/4 of the horizon, auto"
BEST_TRAINED = {TRAINED: 0, TRAINED_MORE: 1}
"""What the rows that may choose among trained proxies may spend beside the components' cost, in models."""
AUTO_KEY = (0, 0.25, "auto")
CEILING = "seed ceiling"

Table = Mapping[str, np.ndarray]
Trace = np.ndarray
"""[1 + B] a statistic on the mixtures themselves and on each bootstrap sample."""


def group_of(score: str, kind: str, suite: str) -> str:
    if suite == "text":
        return "in-domain" if kind == "in_domain" else "held-out"
    return "skill accuracy" if score.endswith(" accuracy") else "skill bits"


def summarise(suites: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """suites: of each the `kinds` of its sets and its `bases`: two seeds' `truths`, and what was `predicted` and `trained`."""
    pool = _Pool(suites)
    predictors = list(dict.fromkeys(n for s in suites.values() for base in s["bases"] for n in base["predicted"]))
    rows: dict[str, dict[str, Any]] = {name: {} for name in (CEILING, *predictors, *BEST_TRAINED, TRAINED_AUTO)}
    traces: dict[str, dict[str, Trace]] = {name: {} for name in rows}
    for group in GROUPS:
        every = {n: pool.rho(group, _from(n)) for n in predictors if pool.has(group, n)}
        every[CEILING] = pool.ceiling(group)
        family = {key: pool.rho(group, _trained(key)) for key in pool.trained_keys}
        best = _best_trained({key: float(np.nan_to_num(trace[0], nan=-1)) for key, trace in family.items()})
        every |= {name: family[key] for name, key in best.items()}
        for name, trace in every.items():
            traces[name][group] = trace
            rows[name][group] = {"rho": _interval(trace)}
            if name not in ("no model: own share", CEILING):
                table = _trained(best[name]) if name in best else _from(name)
                rows[name][group]["error"] = _interval(pool.error(group, table))
            for other in ("merged", *BEST_TRAINED, "interpolated", CEILING):
                rows[name][group][f"minus {other}"] = _interval(trace - every[other])
            rows[name][group]["by_base"] = pool.by_base(group, name)
        for name, more in BEST_TRAINED.items():
            rows[name][group]["choice"] = _choice(best[name])
            rows[name][group]["all"] = {
                f"{length} {kind}": _interval(t) for (m, length, kind), t in family.items() if m == more
            }
        rows[CEILING][group]["error"] = _interval(pool.seed_error(group))
    composites = {label: _composite_traces(pool, predictors, *spec) for label, spec in COMPOSITES.items()}
    return {
        "rows": rows,
        "overall": _overall(traces),
        "default": _default(traces),
        "composites": {label: _composite(*found) for label, found in composites.items()},
        "judged": _judged(traces, [found for found, _ in composites.values()]),
        "counted": pool.counted_by_score(),
        "by_score": pool.by_score(predictors),
    }


def _from(name: str) -> Callable[[Mapping[str, Any]], Table]:
    return lambda base: base["predicted"][name]


TrainedKey = tuple[int, float, str]
"""Models that they cost beside the components' number, the part of the horizon that each is trained for, the surrogate."""


def _best_trained(values: Mapping[TrainedKey, float]) -> dict[str, TrainedKey]:
    """The key of each row of trained proxies."""
    best = {n: max((key for key in values if key[0] == more), key=values.__getitem__) for n, more in BEST_TRAINED.items()}
    return {**best, TRAINED_AUTO: AUTO_KEY}


def _choice(key: TrainedKey) -> dict[str, Any]:
    return {"length": key[1], "surrogate": key[2]}


def _trained(key: TrainedKey) -> Callable[[Mapping[str, Any]], Table]:
    return lambda base: base["trained"][key]


class _Pool:
    """All bases of all suites, and one set of resamples for each."""

    def __init__(self, suites: Mapping[str, Mapping[str, Any]]) -> None:
        self._bases: list[tuple[str, Mapping[str, Any]]] = [(name, base) for name, s in suites.items() for base in s["bases"]]
        self._kinds = {name: s["kinds"] for name, s in suites.items()}
        rng = np.random.default_rng(0)
        self._counts_BM = []
        for _, base in self._bases:
            num = len(next(iter(base["truths"][0].values())))
            drawn_BM = rng.multinomial(num, np.full(num, 1 / num), size=NUM_BOOTSTRAPS)
            self._counts_BM.append(np.concatenate([np.ones((1, num)), drawn_BM]))
        self.trained_keys: list[TrainedKey] = list(self._bases[0][1]["trained"])

    def _scores(self, index: int, group: str, *, counted: bool = True) -> list[str]:
        suite, base = self._bases[index]
        names = [s for s in base["truths"][0] if group_of(s, self._kinds[suite][_set(s)], suite) == group]
        return [s for s in names if not counted or self._ratio(index, s) >= SPREAD_OVER_NOISE]

    def _ratio(self, index: int, score: str) -> float:
        """Spread over seed noise."""
        first_M, second_M = (truth[score] for truth in self._bases[index][1]["truths"])
        # What a seed does to all references alike does not change their order.
        noise = np.std(first_M - second_M, ddof=1) / np.sqrt(2)
        return float(np.std((first_M + second_M) / 2, ddof=1) / noise) if noise else 0.0

    def counted_by_score(self) -> dict[str, dict[str, float]]:
        result: dict[str, dict[str, float]] = {}
        for index, (suite, base) in enumerate(self._bases):
            for score in base["truths"][0]:
                result.setdefault(f"{suite}: {score}", {})[str(index)] = round(self._ratio(index, score), 2)
        return result

    def has(self, group: str, name: str) -> bool:
        return any(
            name in base["predicted"]
            for index, (_, base) in enumerate(self._bases)
            if self._scores(index, group, counted=False)
        )

    def _mean(self, group: str, statistic: Callable[[int, str], Trace], only: int | None = None) -> Trace:
        """Over scores, then over bases. Bases in which no score counts are left out."""
        means = []
        for index in range(len(self._bases)):
            if only in (None, index) and (scores := self._scores(index, group)):
                means.append(np.nanmean([statistic(index, s) for s in scores], axis=0))
        return np.mean(means, axis=0) if means else np.full(NUM_BOOTSTRAPS + 1, np.nan)

    def rho(self, group: str, table: Callable[[Mapping[str, Any]], Table], only: int | None = None) -> Trace:
        def statistic(index: int, score: str) -> Trace:
            base = self._bases[index][1]
            values_M, counts_BM = table(base)[score], self._counts_BM[index]
            return np.mean([np.nan_to_num(spearman(values_M, truth[score], counts_BM)) for truth in base["truths"]], axis=0)

        return self._mean(group, statistic, only)

    def ceiling(self, group: str, only: int | None = None) -> Trace:
        def statistic(index: int, score: str) -> Trace:
            first, second = self._bases[index][1]["truths"]
            return np.nan_to_num(spearman(first[score], second[score], self._counts_BM[index]))

        return self._mean(group, statistic, only)

    def error(self, group: str, table: Callable[[Mapping[str, Any]], Table]) -> Trace:
        def statistic(index: int, score: str) -> Trace:
            base = self._bases[index][1]
            errors_M = np.abs(table(base)[score] - np.mean([truth[score] for truth in base["truths"]], axis=0))
            return self._counts_BM[index] @ errors_M / self._counts_BM[index].sum(axis=1)

        return self._mean(group, statistic)

    def seed_error(self, group: str) -> Trace:
        """Of one seed's references against the other's."""

        def statistic(index: int, score: str) -> Trace:
            first, second = self._bases[index][1]["truths"]
            return self._counts_BM[index] @ np.abs(first[score] - second[score]) / self._counts_BM[index].sum(axis=1)

        return self._mean(group, statistic)

    def by_base(self, group: str, name: str) -> list[float | None]:
        result = []
        for index, (_, base) in enumerate(self._bases):
            if not self._scores(index, group):
                continue
            if name == CEILING:
                result.append(_value(self.ceiling(group, index)))
            elif name in base["predicted"]:
                result.append(_value(self.rho(group, _from(name), index)))
            elif name == TRAINED_AUTO or name in BEST_TRAINED:
                keys = [AUTO_KEY] if name == TRAINED_AUTO else [k for k in self.trained_keys if k[0] == BEST_TRAINED[name]]
                result.append(max((_value(self.rho(group, _trained(key), index)) or -1.0 for key in keys), default=None))
        return result

    def by_score(self, predictors: Sequence[str]) -> dict[str, dict[str, list[float | None]]]:
        """rho of every score in every base, by predictor: what the macro figures are made of."""
        result: dict[str, dict[str, list[float | None]]] = {}
        for index, (suite, base) in enumerate(self._bases):
            counts_1M = self._counts_BM[index][:1]
            for score, truth_M in base["truths"][0].items():
                row = result.setdefault(f"{suite}: {score}", {})
                again_M = base["truths"][1][score]
                row.setdefault(CEILING, []).append(_value(spearman(truth_M, again_M, counts_1M)))
                for name in predictors:
                    if name in base["predicted"]:
                        values_M = base["predicted"][name][score]
                        both = [spearman(values_M, t, counts_1M) for t in (truth_M, again_M)]
                        row.setdefault(name, []).append(_value(np.mean(both, axis=0)))
        return result

    def composite(
        self, group: str, weights: Mapping[str, float] | None, table: Callable[[Mapping[str, Any]], Table] | None
    ) -> dict[str, Any]:
        """rho and regret of a weighted mean of raw scores; table None: one seed's references against the other's."""
        rhos, regrets = [], []
        for index, (_, base) in enumerate(self._bases):
            if not (names := self._scores(index, group, counted=False)):
                continue
            sign = -1.0 if group == "skill accuracy" else 1.0
            parts = {n: (weights or {}).get(n, 0.0) if weights else 1 / len(names) for n in names}
            truths = [sign * sum(w * truth[n] for n, w in parts.items()) for truth in base["truths"]]
            counts_BM = self._counts_BM[index]
            if table is None:
                pairs = [(truths[1], truths[0]), (truths[0], truths[1])]
            else:
                values_M = sign * sum(w * table(base)[n] for n, w in parts.items())
                pairs = [(values_M, truth) for truth in truths]
            rhos.append(np.mean([np.nan_to_num(spearman(*pair, counts_BM)) for pair in pairs], axis=0))
            regrets.append(np.mean([regret(*pair, counts_BM) for pair in pairs], axis=0))
        return {"rho": np.mean(rhos, axis=0), "regret": np.mean(regrets, axis=0)}


def _set(score: str) -> str:
    return score.removesuffix(" accuracy").removesuffix(" bits")


Composites = dict[str, dict[str, Trace]]


def _composite_traces(
    pool: _Pool, predictors: Sequence[str], group: str, weights: Mapping[str, float] | None
) -> tuple[Composites, dict[str, TrainedKey]]:
    """rho and regret of every row, and which trained proxies did best."""
    found = {name: pool.composite(group, weights, _from(name)) for name in predictors if pool.has(group, name)}
    found.pop("no model: own share", None)  # its values have no unit that a weighted mean could use
    found[CEILING] = pool.composite(group, weights, None)
    family = {key: pool.composite(group, weights, _trained(key)) for key in pool.trained_keys}
    best = _best_trained({key: float(traces["rho"][0]) for key, traces in family.items()})
    found |= {name: family[key] for name, key in best.items()}
    return found, best


def _composite(found: Composites, best: Mapping[str, TrainedKey]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, traces in found.items():
        result[name] = {metric: _interval(trace) for metric, trace in traces.items()}
        for other in ("merged", *BEST_TRAINED):
            result[name][f"rho minus {other}"] = _interval(traces["rho"] - found[other]["rho"])
    for name in BEST_TRAINED:
        result[name]["choice"] = _choice(best[name])
    return result


def _judged(traces: Mapping[str, Mapping[str, Trace]], composites: Sequence[Composites]) -> dict[str, Any]:
    """Half the mean of the groups' rho, half that of the composites', of rows that have both; and the third run's rule."""
    whole = {
        name: (_over_groups(groups) + np.mean([found[name]["rho"] for found in composites], axis=0)) / 2
        for name, groups in traces.items()
        if len(groups) == len(GROUPS) and all(name in found for found in composites)
    }
    rows = {n: {"rho": _interval(t), "minus the default": _interval(t - whole[CALIBRATED])} for n, t in whole.items()}
    best = max(CHALLENGERS, key=lambda name: whole[name][0])
    return {"rows": rows, "chosen": best if (rows[best]["minus the default"]["low"] or 0.0) > 0 else CALIBRATED}


def _overall(traces: Mapping[str, Mapping[str, Trace]]) -> dict[str, Any]:
    """The mean of the groups' rho, of the rows that have all groups."""
    whole = {name: _over_groups(groups) for name, groups in traces.items() if len(groups) == len(GROUPS)}
    return {
        name: {
            "rho": _interval(trace),
            **{f"minus {o}": _interval(trace - whole[o]) for o in (*DEFAULTS[:3], *BEST_TRAINED)},
        }
        for name, trace in whole.items()
    }


def _over_groups(groups: Mapping[str, Trace]) -> Trace:
    return np.nanmean([groups[g] for g in GROUPS], axis=0)


def _default(traces: Mapping[str, Mapping[str, Trace]]) -> dict[str, Any]:
    """The rule of the docstring of rank_consistency.py."""
    whole = {name: _over_groups(traces[name]) for name in DEFAULTS}
    best = max(whole, key=lambda name: whole[name][0])
    difference = _interval(whole[best] - whole["merged"])
    chosen = best if best == "merged" or (difference["low"] or 0.0) > 0 else "merged"
    return {"highest": best, "minus merged": difference, "chosen": chosen}


def _value(trace: Trace) -> float | None:
    return None if not np.isfinite(trace[0]) else round(float(trace[0]), 4)


def _interval(trace: Trace) -> dict[str, float | None]:
    drawn_B = trace[1:][np.isfinite(trace[1:])]
    if not np.isfinite(trace[0]) or not len(drawn_B):
        return {"value": None, "low": None, "high": None}
    low, high = np.quantile(drawn_B, [0.05, 0.95])
    return {"value": round(float(trace[0]), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


# --- for people -------------------------------------------------------------------------------------------------------


def _text(interval: Mapping[str, float | None]) -> str:
    if interval["value"] is None:
        return "-"
    return "{value:.3f} [{low:.3f}, {high:.3f}]".format(**interval)


def print_report(report: Mapping[str, Any]) -> None:
    for title, key in (("macro Spearman [90 %]", "rho"), ("absolute error [90 %]", "error")):
        print(f"\n{title:46s}" + "".join(f"{group:>24s}" for group in GROUPS))
        for name, groups in report["rows"].items():
            cells = (_text(groups[g][key]) if g in groups and key in groups[g] else "-" for g in GROUPS)
            print(f"{name:46s}" + "".join(f"{cell:>24s}" for cell in cells))
    for label, rows in report["composites"].items():
        print(f"\n{label:46s}{'rho':>24s}{'regret':>24s}")
        for name, row in rows.items():
            print(f"{name:46s}{_text(row['rho']):>24s}{_text(row['regret']):>24s}")
    chosen = report["default"]
    print(f"\ndefault: {chosen['chosen']} (highest: {chosen['highest']}, minus merged {_text(chosen['minus merged'])})")
    print(f"\n{'groups and composites':56s}{'rho':>24s}{'minus the default':>24s}")
    for name, row in report["judged"]["rows"].items():
        print(f"{name:56s}{_text(row['rho']):>24s}{_text(row['minus the default']):>24s}")
    print(f"by the third run's rule: {report['judged']['chosen']}\n")
    print("did not count (spread / noise by base):")
    for score, ratios in report["counted"].items():
        if any(ratio < SPREAD_OVER_NOISE for ratio in ratios.values()):
            print(f"  {score}: {', '.join(str(r) for r in ratios.values())}")


def plot(report: Mapping[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(report["rows"])
    figure, axes = pyplot.subplots(1, len(GROUPS), figsize=(15, 0.32 * len(names) + 1), sharey=True, layout="constrained")
    for axis, group in zip(axes, GROUPS, strict=True):
        ceiling = report["rows"][CEILING][group]["rho"]
        axis.axvspan(ceiling["low"] or 0, ceiling["high"] or 0, color="grey", alpha=0.15)
        for at, name in enumerate(names):
            rho = report["rows"][name].get(group, {}).get("rho", {"value": None})
            if rho["value"] is None:
                continue
            colour = "black" if name == "merged" else "tab:red" if name.startswith(("trained", "no model")) else "tab:blue"
            axis.plot([rho["low"], rho["high"]], [at, at], color=colour, linewidth=1.5)
            axis.plot(rho["value"], at, "o", color=colour, markersize=4)
        axis.set_title(group)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0].invert_yaxis()
    figure.supxlabel("macro Spearman to truly trained references, 90 % bootstrap interval over mixtures (grey: seed ceiling)")
    figure.savefig(path, dpi=130)
