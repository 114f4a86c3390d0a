"""Assembles the page: sections from whatever data there is, one HTML file with its style, plots and script inside."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_demix import __version__
from megatron_demix.artifact import write_atomic
from megatron_demix.errors import ConfigError
from megatron_demix.report import caveats, figures, optimum
from megatron_demix.report.data import FOUND, Fit, ReportData
from megatron_demix.report.drawing import colour_variable
from megatron_demix.report.maturity import gaps
from megatron_demix.report.verdict import Verdict, judge, standard_deviation
from megatron_demix.study.search import ProxyScore
from megatron_demix.units import format_bytes, format_count, format_duration

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Bar:
    """One mixture as a stacked bar: (domain, share, CSS colour variable)."""

    label: str
    note: str
    parts: Sequence[tuple[str, float, str]]


def build_report(data: ReportData, output: Path) -> None:
    """Write the report as one HTML file at `output`; needs no network to be read, and the same data give the same bytes.

    Sections whose data are absent are left out. Raises ConfigError if `output` is a folder, StorageError if the disk is full.
    """
    output = Path(output)
    if output.is_dir():
        raise ConfigError(
            f"report: {output} is a folder, expected the path of the HTML file to write, as in {output}/index.html."
        )
    write_atomic(output, render(data))


def render(data: ReportData) -> str:
    """The page as text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": _percent, "loss": _loss, "spread": _spread, "count": format_count, "bytes": format_bytes}
    environment.filters |= {"duration": format_duration}
    verdict = judge(data)
    svg = {name: [Markup(f) for f in found if f] for name, found in _figures(data, verdict).items()}
    colours = {name: colour_variable(i) for i, name in enumerate(data.domain_names)}
    return environment.get_template("page.html.j2").render(
        data=data,
        verdict=verdict,
        style=Markup((_HERE / "style.css").read_text(encoding="utf-8")),
        version=__version__,
        found=FOUND,
        colours=colours,
        bars=_bars(data, colours),
        tiles=_tiles(data, verdict),
        figures=svg,
        final=_final_table(data, verdict),
        proxies=_proxy_rows(data),
        maturity=gaps(data),
        proxy_score=_PROXY_SCORES[data.proxy_score] if data.proxies == "merged" else "",
        surrogates=_surrogates(_last_fit(data)),
        timings=_timings(data),
        warnings=caveats.warnings(data, verdict),
        not_measured=caveats.not_measured(data, verdict),
        settings=_flat(data.settings),
    )


_PROXY_SCORES: dict[ProxyScore, str] = {
    "merged": "A proxy's scores are those of the merged model.",
    "interpolated": "A proxy's scores are the components' own, averaged with its merge weights: no proxy was merged for them.",
    "stack": "A proxy's scores lie between those of the merged model and the components' own, averaged with its merge weights.",
    "ensemble": "A proxy's scores are those of the components' probabilities, averaged for every token with its merge weights; "
    "those of generated answers are the components' own, averaged. No proxy was merged for them.",
}


def _figures(data: ReportData, verdict: Verdict) -> dict[str, list[str | None]]:
    groups: dict[str, dict[str, Mapping[str, Sequence[float]]]] = {}
    for name, curve in data.losses.items():
        if curve.get("iteration"):
            groups.setdefault(name.rpartition("/")[0], {})[name] = curve
    return {
        "forest": [figures.forest(verdict.comparisons, data.final_unit)] if verdict.comparisons else [],
        "parallel": [figures.parallel_coordinates(data)],
        "ternary": [optimum.ternary(data)],
        "spread": [optimum.optimum_spread(data)],
        "pareto": list(optimum.pareto_panels(data)),
        "scores": [figures.score_against_share(data, score) for score in data.score_names],
        "fits": [figures.predicted_against_measured(s, fit, data.unit_of(s)) for s, fit in _last_fit(data).items()],
        "rounds": [figures.objective_by_round(data)],
        "losses": [figures.loss_curves(group, curves) for group, curves in groups.items()],
    }


def _last_fit(data: ReportData) -> Mapping[str, Fit]:
    return next((r.fit for r in reversed(data.rounds) if r.fit), {})


def _surrogates(fits: Mapping[str, Fit]) -> str:
    """ "Surrogate: gaussian process." where all scores have one kind, else each score's."""
    kinds = {score: fit.kind.replace("_", " ") for score, fit in fits.items()}
    if len(set(kinds.values())) == 1:
        return f"Surrogate: {next(iter(kinds.values()))}."
    return "Surrogates: " + ", ".join(f"{score} {kind}" for score, kind in kinds.items()) + "."


def _bars(data: ReportData, colours: Mapping[str, str]) -> list[Bar]:
    names = list(colours)
    natural = {d.name: d.natural_share for d in data.domains}
    rows: list[tuple[str, str, Mapping[str, float]]] = []
    if data.choice:
        rows.append(("found", "actual shares of the data", data.choice.shares))
    if natural:
        rows.append(("natural", "in proportion to the tokens there are", natural))
    if names:
        rows.append(("uniform", "", dict.fromkeys(names, 1 / len(names))))
    if data.choice and data.proxies == "merged":
        rows.append(("merge weights", "of the components in the found mixture's proxy", data.choice.weights))
    return [Bar(label, note, [(n, m.get(n, 0.0), colours[n]) for n in names]) for label, note, m in rows]


def _tiles(data: ReportData, verdict: Verdict) -> list[tuple[str, str, str]]:
    """(what, value, remark): the figures at the top."""
    tiles = []
    if verdict.groups and verdict.groups[0].mixture == FOUND:
        found = verdict.groups[0]
        remark = f"{found.num_seeds} seed{'s' * (found.num_seeds > 1)}, {data.final_unit}, lower is better"
        tiles.append(("objective of the found mixture", _loss(found.objective), remark))
    elif data.choice:
        mean, std = data.choice.objective
        tiles.append(("predicted objective", _loss(mean), f"± {std:.2g} of the surrogate; {data.unit}, lower is better"))
    if data.choice and data.domains:
        moves = {d.name: data.choice.shares.get(d.name, 0.0) - d.natural_share for d in data.domains}
        name = max(moves, key=lambda n: abs(moves[n]))
        tiles.append((f"share of {name}", _percent(data.choice.shares.get(name, 0.0)), "the largest move away from natural"))
    if num := sum(len(r.mixtures) for r in data.rounds):
        rounds = len(data.rounds)
        remark = f"in {rounds} round{'s' * (rounds > 1)}" + (", none of them trained" if data.proxies == "merged" else "")
        tiles.append((f"{data.kind_of_proxies} proxies", str(num), remark))
    if data.timings_s:
        tiles.append(("stage time", format_duration(math.fsum(data.timings_s.values())), f"{len(data.timings_s)} stages"))
    return tiles


def _final_table(data: ReportData, verdict: Verdict) -> dict[str, Any]:
    """Columns, one row a run, and one row a mixture with the mean and standard deviation over its seeds."""
    if not verdict.groups:
        return {}
    columns = list(dict.fromkeys(name for run in data.final for name in run.scores))
    rows = []
    for group in verdict.groups:
        runs = [run for run in data.final if run.mixture == group.mixture]
        scores = {c: [run.scores[c] for run in runs if c in run.scores] for c in columns}
        rows.append((group, {c: (math.fsum(v) / len(v), standard_deviation(v)) for c, v in scores.items() if v}))
    best = {c: (max if c in data.higher_is_better else min)(row[c][0] for _, row in rows if c in row) for c in columns}
    return {"columns": columns, "rows": rows, "best": best, "best_objective": min(g.objective for g, _ in rows)} | {
        "untrained": [(name, data.objective_of(scores), scores) for name, scores in data.untrained.items()]
    }


def _proxy_rows(data: ReportData) -> list[dict[str, Any]]:
    rows = []
    for number, r in enumerate(data.rounds, start=1):
        for proxy in r.mixtures:
            scores = r.scores.get(proxy.name, {})
            value = data.objective_of_proxy(proxy.name, scores)
            rows.append({"round": number, "proxy": proxy, "scores": scores, "objective": value})
    return sorted(rows, key=lambda row: (math.isnan(row["objective"]), row["objective"]))


def _timings(data: ReportData) -> list[dict[str, Any]]:
    """Stages of one kind together: the first part of their name, how many, seconds, and the part of the longest."""
    kinds: dict[str, list[float]] = {}
    for name, seconds in data.timings_s.items():
        kinds.setdefault(name.split("/")[0], []).append(seconds)
    longest = max((math.fsum(v) for v in kinds.values()), default=0.0) or 1.0
    return [{"kind": kind, "num": len(v), "seconds": math.fsum(v), "part": math.fsum(v) / longest} for kind, v in kinds.items()]


def _flat(settings: Any, prefix: str = "") -> list[tuple[str, str]]:
    """("model.num_layers", "4"), ...: nested settings as one list."""
    if isinstance(settings, Mapping):
        return [row for key, value in settings.items() for row in _flat(value, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(settings, (list, tuple)) and any(isinstance(item, Mapping) for item in settings):
        return [row for i, item in enumerate(settings) for row in _flat(item, f"{prefix}.{i}")]
    if isinstance(settings, (list, tuple)):
        return [(prefix, ", ".join(map(str, settings)))]
    return [(prefix, "" if settings is None else str(settings))]


def _percent(share: float) -> str:
    return "–" if share is None or math.isnan(share) else f"{100 * share:.1f} %"


def _spread(sd: float | None) -> str:
    return "" if sd is None else f"± {sd:.4f}"


def _loss(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.4f}"
