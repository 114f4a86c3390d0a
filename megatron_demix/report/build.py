"""Assembles the page: sections from whatever data there is, one HTML file with its style, plots and script inside."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_demix import __version__
from megatron_demix.artifact import write_atomic
from megatron_demix.errors import ConfigError
from megatron_demix.report import caveats, figures, optimum, selection
from megatron_demix.report.data import FOUND, Cost, Fit, Proxy, ReportData
from megatron_demix.report.drawing import colour_variable
from megatron_demix.report.maturity import gaps
from megatron_demix.report.seed_noise import standard_deviation
from megatron_demix.report.verdict import Verdict, judge
from megatron_demix.study.search import ProxyScore
from megatron_demix.units import format_bytes, format_count, format_duration

_HERE = Path(__file__).parent
_MOST_COLUMNS = 12
"""Scores side by side in a table; more are put below one another."""


@dataclass(frozen=True)
class Bar:
    """One mixture as a stacked bar: (domain, share, CSS colour variable)."""

    label: str
    note: str
    parts: Sequence[tuple[str, float, str]]


def build_report(data: ReportData, output: Path, table: str = "proxies.csv") -> None:
    """Write the report as one HTML file at `output`; needs no network to be read, and the same data give the same bytes. Beside
    it, under the name `table`, all that is known of every proxy, if there are any; else a table of that name is removed.

    Sections whose data are absent are left out. Raises ConfigError if `output` is a folder, StorageError if the disk is full.
    """
    output = Path(output)
    if output.is_dir():
        raise ConfigError(
            f"report: {output} is a folder, expected the path of the HTML file to write, as in {output}/index.html."
        )
    beside = output.with_name(table)
    if any(r.mixtures for r in data.rounds):
        write_atomic(beside, proxy_table(data))
    else:
        beside.unlink(missing_ok=True)
    write_atomic(output, render(data, table))


def render(data: ReportData, table: str = "proxies.csv") -> str:
    """The page as text. table: the name of the table beside it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": _percent, "loss": _loss, "spread": _spread, "count": format_count, "bytes": format_bytes}
    environment.filters |= {"duration": format_duration, "deviation": _deviation}
    verdict = judge(data)
    svg = {name: [Markup(f) for f in found if f] for name, found in _figures(data, verdict).items()}
    colours = {name: colour_variable(index) for name, index in selection.colour_indices(data).items()}
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
        num_proxies=sum(len(r.mixtures) for r in data.rounds),
        proxies=_proxy_rows(data),
        table=table,
        objective=_objective(data),
        domains={d.name: d for d in data.domains},
        shown_scores=selection.drawn_scores(data),
        shown_domains=selection.drawn_domains(data),
        most_columns=_MOST_COLUMNS,
        by_weight=sorted(selection.ordered_scores(data), key=lambda name: -data.objective.get(name, 0.0)),
        said=_said(data),
        fit_of=selection.last_fit(data),
        maturity=gaps(data),
        proxy_score=_proxy_score(data),
        surrogates=_surrogates(selection.last_fit(data)),
        costs=_costs(data),
        timings=_timings(data),
        warnings=caveats.warnings(data, verdict),
        not_measured=caveats.not_measured(data, verdict),
        settings=_flat(data.settings),
    )


_PROXY_SCORES: dict[ProxyScore, str] = {
    "merged": "A proxy's scores are those of the merged model.",
    "interpolated": "A proxy's scores are the components' own, averaged with its merge weights: no proxy was merged for them.",
    "stack": "A proxy's scores are the mean of the merged model's and of the components' own, averaged with its merge weights.",
    "ensemble": "A proxy's scores are those of the components' probabilities, averaged for every token with its merge weights; "
    "those of generated answers are interpolated from the components' own. No proxy was merged for them.",
}


def _proxy_score(data: ReportData) -> str:
    if data.proxies != "merged":
        return ""
    if data.proxy_score == "interpolated" and data.merged_parts:
        return (
            "A proxy's scores are the components' own, on an exponential mixing law through the model trained on equal parts "
            "of all domains: no proxy was merged for them."
        )
    if data.proxy_score == "stack" and data.merged_parts:
        drawn = selection.drawn_scores(data)
        parts = ", ".join(f"{name} {part:.0%}" for name, part in data.merged_parts.items() if name in drawn)
        return (
            "A proxy's scores are the mean of two estimates, and both go through the model trained on equal parts of all "
            "domains: the components' scores on an exponential mixing law, and a part of the way from their average to the "
            f"merged model's scores ({parts})."
        )
    return _PROXY_SCORES[data.proxy_score]


def _figures(data: ReportData, verdict: Verdict) -> dict[str, list[str | None]]:
    groups: dict[str, dict[str, Mapping[str, Sequence[float]]]] = {}
    for name, curve in data.losses.items():
        if curve.get("iteration"):
            groups.setdefault(name.rpartition("/")[0], {})[name] = curve
    ranked, drawn, fits = figures.RankedShares(data), selection.drawn_scores(data), selection.last_fit(data)
    return {
        "forest": [figures.forest(verdict.comparisons, data.final_unit)] if verdict.comparisons else [],
        "parallel": [figures.parallel_coordinates(data)],
        "ternary": [optimum.ternary(data)],
        "spread": [optimum.optimum_spread(data)],
        "pareto": list(optimum.pareto_panels(data)),
        "scores": [figures.score_against_share(data, score, ranked) for score in drawn],
        "fits": [figures.predicted_against_measured(s, fits[s], data.unit_of(s)) for s in drawn if s in fits],
        "rounds": [figures.objective_by_round(data)],
        "losses": [figures.loss_curves(group, curves, selection.drawn_domains(data)) for group, curves in groups.items()],
    }


def _said(data: ReportData) -> dict[str, str]:
    """Of what is too much for the page, which part is on it; empty where all is."""
    rows, scores, domains = len(_in_order(data)), len(selection.ordered_scores(data)), len(data.domain_names)
    columns = [
        f"{most} of {num} {what}"
        for most, num, what in (
            (selection.MOST_SCORES, scores, "scores"),
            (selection.MOST_DOMAINS, domains, "domains"),
        )
        if num > most
    ]
    shown = " and ".join(columns)
    which = selection.said_of_rows(rows)
    lines = f"Drawn are the best tenth and some of the others, {figures.MOST_LINES} of {rows} proxies."
    return {
        "colours": selection.said_of_colours(data),
        "domains": selection.said_of_domains(data),
        "scores": selection.said_of_scores(data),
        "pairs": optimum.said_of_pairs(data),
        "others": optimum.others_at_the_optimum(data),
        "lines": lines if rows > figures.MOST_LINES else "",
        "points": f"Drawn are {selection.MOST_POINTS} of {rows} proxies." if rows > selection.MOST_POINTS else "",
        "rows": f"{which or 'Every proxy'}{f', with {shown}' if shown else ''}." if which or shown else "",
    }


def _objective(data: ReportData) -> str:
    """The scores that count and their weights, the largest of them if they are many."""
    weights = {name: weight for name, weight in data.objective.items() if weight}
    if len(weights) <= _MOST_COLUMNS:
        return " + ".join(f"{weight:g} × {name}" for name, weight in weights.items())
    most = sorted(weights, key=lambda name: -weights[name])[:_MOST_TERMS]
    if len(set(weights.values())) == 1:
        return f"the mean of {len(weights)} scores ({', '.join(most)} and {len(weights) - _MOST_TERMS} more)"
    terms = " + ".join(f"{weights[name]:g} × {name}" for name in most)
    return f"{terms} + {len(weights) - _MOST_TERMS} more, with smaller weights or the same"


_MOST_TERMS = 6


def _surrogates(fits: Mapping[str, Fit]) -> str:
    """ "Surrogate: gaussian process." where all scores have one kind, else each score's."""
    kinds = {score: fit.kind.replace("_", " ") for score, fit in fits.items()}
    if len(set(kinds.values())) == 1:
        return f"Surrogate: {next(iter(kinds.values()))}."
    if len(kinds) > selection.MOST_SCORES:
        return ""  # in the table of all scores
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
    return [Bar(label, note, _parts(mixture, colours)) for label, note, mixture in rows]


def _parts(mixture: Mapping[str, float], colours: Mapping[str, str]) -> list[tuple[str, float, str]]:
    """Domains without a colour of their own together."""
    alike = colour_variable(None)
    others = [name for name, colour in colours.items() if colour == alike]
    parts = [(name, mixture.get(name, 0.0), colour) for name, colour in colours.items() if colour != alike]
    together = math.fsum(mixture.get(name, 0.0) for name in others)
    return [*parts, (f"{len(others)} others", together, alike)] if others else parts


def _tiles(data: ReportData, verdict: Verdict) -> list[tuple[str, str, str]]:
    """(what, value, remark): the figures at the top."""
    tiles = []
    if verdict.groups and verdict.groups[0].mixture == FOUND:
        found = verdict.groups[0]
        remark = f"{found.num_seeds} seed{'s' * (found.num_seeds > 1)}, {data.final_unit}, lower is better"
        tiles.append(("objective of the found mixture", _loss(found.objective), remark))
    elif data.choice:
        mean, std = data.choice.objective
        tiles.append(
            ("predicted objective", _loss(mean), f"± {_deviation(std)} of the surrogate; {data.unit}, lower is better")
        )
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
    by_weight = sorted(columns, key=lambda name: -data.objective.get(name, 0.0))
    seeds = ", ".join(f"{group.mixture} {group.num_seeds}" for group in verdict.groups)
    return (
        {"by_weight": by_weight, "seeds": f"Seeds: {seeds}"}
        | {"columns": columns, "rows": rows, "best": best, "best_objective": min(g.objective for g, _ in rows)}
        | {"untrained": [(name, data.objective_of(scores), scores) for name, scores in data.untrained.items()]}
    )


@dataclass(frozen=True)
class ProxyRow:
    """round: from 1. objective: NaN where it is not known."""

    round: int
    proxy: Proxy
    scores: Mapping[str, float]
    objective: float


def _in_order(data: ReportData) -> list[ProxyRow]:
    rows = []
    for number, r in enumerate(data.rounds, start=1):
        for proxy in r.mixtures:
            scores = r.scores.get(proxy.name, {})
            rows.append(ProxyRow(number, proxy, scores, data.objective_of_proxy(proxy.name, scores)))
    return rows


def _proxy_rows(data: ReportData) -> list[ProxyRow]:
    """Those in the page, the best first."""
    rows = _in_order(data)
    return selection.best_and_latest(rows, sorted(rows, key=lambda row: (math.isnan(row.objective), row.objective)))


def proxy_table(data: ReportData) -> str:
    """Every proxy as CSV (docs/FORMATS.md), in the order they were made."""
    domains, scores = data.domain_names, data.score_names
    merged = domains if data.proxies == "merged" else []
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    header = ["proxy", "round", "objective", *(f"score:{s}" for s in scores), *(f"share:{d}" for d in domains)]
    writer.writerow([*header, *(f"weight:{d}" for d in merged)])
    for row in _in_order(data):
        values = [
            row.objective,
            *(row.scores.get(s, math.nan) for s in scores),
            *(row.proxy.shares.get(d, 0.0) for d in domains),
        ]
        values += [row.proxy.weights.get(d, 0.0) for d in merged]
        writer.writerow([row.proxy.name, row.round, *(f"{v:.8g}" if math.isfinite(v) else "" for v in values)])
    return text.getvalue()


def _costs(data: ReportData) -> list[tuple[Cost, float]]:
    """Each with its part of all FLOP."""
    total = math.fsum(cost.flop for cost in data.costs)
    return [(cost, cost.flop / total) for cost in data.costs]


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


def _deviation(value: float) -> str:
    """Two digits; of what is below the last digit that losses are shown with, only that."""
    return "<0.0001" if value < 1e-4 else f"{value:.2g}"


def _loss(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.4f}"
