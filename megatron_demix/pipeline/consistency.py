"""`demix consistency`, and tools/search_mixture.py consistency: do proxies rank mixtures as truly trained references do?"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_demix.errors import ConfigError, CorruptInput
from megatron_demix.exits import check_at_least, check_outputs

if TYPE_CHECKING:
    from megatron_demix.search.tables import Table

_COLUMNS = {
    "spearman": "Spearman",
    "kendall": "Kendall",
    "top_spearman": "top 25 %",
    "pairwise_accuracy": "pairs",
    "recovery": "recovery",
    "regret": "regret",
}
_LEGEND = (
    "Each value with its 90 % interval over mixtures (bootstrap). top 25 %: Spearman among the best references. pairs: ordered "
    "alike. recovery: proxies' scores / references'. regret: what picking the proxies' best costs, in the score's unit; the "
    "upper end of its interval is too low, since most resamples have the same best mixtures. "
    "ceiling: the references against themselves, trained with another seed. noiseless: what proxies without noise of their own "
    "would reach, about the square root of the ceiling."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--proxies",
        type=Path,
        required=True,
        metavar="FILE",
        help="scores of the proxies: CSV, or a run's scores.json or fit.json",
    )
    add(
        "--references",
        type=Path,
        required=True,
        metavar="FILE",
        help="scores of the references: of some of the proxies, same ids",
    )
    add("--reseeded", type=Path, metavar="FILE", help="the references trained again with another seed: the ceiling")
    add("--higher-is-better", nargs="*", default=[], metavar="SCORE", help="scores that are not losses (scores.json says so)")
    add("--objective", nargs="*", default=[], metavar="SCORE=WEIGHT", help="also report this weighted mean")
    add("--bootstraps", type=int, default=1000, metavar="N", help="resamples of the mixtures for the intervals (default: 1000)")
    add("--seed", type=int, default=0, help="of the resamples (default: 0)")
    add("--output", type=Path, metavar="JSON", help="where the report goes")
    add("--plot", type=Path, metavar="FILE", help="rank plot, as .svg, .pdf or .png")


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Make the report of these arguments, write what they ask for, and return it. Raises OutputExists."""
    from megatron_demix.artifact import json_text, write_new
    from megatron_demix.search.from_tables import compare_tables, parse_objective

    check_at_least("--bootstraps", options.bootstraps, 1)
    check_at_least("--seed", options.seed, 0)
    if options.plot:
        from megatron_demix.report.ranks import FORMATS, draw_ranks

        if options.plot.suffix not in FORMATS:
            raise ConfigError(
                f"--plot {options.plot}: unknown kind of picture, expected a name that ends in {', '.join(FORMATS)}."
            )
    check_outputs(options.output, options.plot)
    higher = set(options.higher_is_better)
    paths = (options.proxies, options.references, options.reseeded)
    proxies, references, reseeded = (_read(path, higher) if path else None for path in paths)
    assert proxies is not None
    assert references is not None
    objective = parse_objective(options.objective)
    report = compare_tables(
        proxies, references, reseeded, objective, higher, num_bootstraps=options.bootstraps, seed=options.seed
    )
    contents: dict[Path, str | bytes] = {options.output: json_text(report)} if options.output else {}
    if options.plot:
        columns = dict.fromkeys(references.columns, (proxies, references, reseeded))
        aligned = {name: _aligned(name, tables) for name, tables in columns.items()}
        contents[options.plot] = draw_ranks(aligned, report, higher, options.plot.suffix)
    write_new(contents)
    return report


def _read(path: Path, higher: set[str]) -> Table:
    """A CSV, or the scores.json or fit.json (whose scores may be stacked) of a stage, which know what is better: the names of
    scores of which more is better join `higher`."""
    import numpy as np

    from megatron_demix.artifact import read_json
    from megatron_demix.evaluate.scores import ScoreTable
    from megatron_demix.pipeline.scoring import component_row
    from megatron_demix.search.tables import Table

    if path.suffix != ".json":
        return Table.read(path)
    data = read_json(path)
    rows: dict[str, dict[str, float]] = {}
    if isinstance(data, dict) and "surrogates" in data:
        try:
            names = tuple(data["surrogates"])
            for name, facts in data["surrogates"].items():
                for model, value in zip(facts["models"], facts["measured"], strict=True):
                    rows.setdefault(model, {})[name] = np.nan if value is None else float(value)
            higher |= set(data.get("higher_is_better", ()))
        except (KeyError, ValueError, TypeError, AttributeError) as e:
            raise CorruptInput(
                f'{path}: not a fit.json, expected {{"surrogates": {{score: {{"models": [...], "measured": [...]}}}}}}.'
            ) from e
    else:
        table = ScoreTable.read(path)
        names = tuple(score.name for score in table.scores)
        # Beside its proxies, a run scores its components: these are no mixtures that anyone trained as references.
        rows = {name: row for name, row in table.rows.items() if not name.startswith(component_row(""))}
        higher |= {score.name for score in table.scores if score.direction == "higher"}
    values = [[row.get(name, np.nan) for name in names] for row in rows.values()]
    return Table(path, "model", tuple(rows), names, np.array(values, np.float64).reshape(len(values), len(names)))


def _aligned(name: str, tables: tuple[Table | None, ...]) -> tuple[Any, ...]:
    """One score in every table, its rows in the order of the references."""
    _, references, _ = tables
    assert references is not None
    ids, where = references.ids, references.path
    return tuple(table.select(ids, references.columns, other=where)[:, references.columns.index(name)] if table else None
                 for table in tables)  # fmt: skip


def show(report: Mapping[str, Any]) -> None:
    """The report as a table for people, on standard output."""
    import sys

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as Grid

    grid = Grid(box=None, pad_edge=False)
    grid.add_column("score", no_wrap=True)
    for title in _COLUMNS.values():
        grid.add_column(title, no_wrap=True, justify="right")
    for style, label, rows in _rows(report):
        for name, metrics in rows.items():
            cells = (_cell(metrics[metric], metric) for metric in _COLUMNS)
            grid.add_row(f"{label}{escape(name)}", *cells, style=style)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    num, num_proxies = report["num_mixtures"], report["num_proxies"]
    console.print(f"{num} mixtures" if num == num_proxies else f"{num} of {num_proxies} proxies, which have a reference")
    console.print(grid)
    console.print(_LEGEND, style="dim")


def _rows(report: Mapping[str, Any]) -> list[tuple[str | None, str, dict[str, Any]]]:
    found: list[tuple[str | None, str, dict[str, Any]]] = []
    for style, label, section in ((None, "", report), ("dim", "ceiling ", report.get("ceiling"))):
        if section:
            found += [(style or "bold", label, _summary(section)), (style, label, section["scores"])]
    if best := report.get("noiseless"):
        rhos = _summary(best) | best["scores"]
        rows = {
            name: {metric: {"value": rho if metric == "spearman" else None} for metric in _COLUMNS}
            for name, rho in rhos.items()
        }
        found.append(("dim", "noiseless ", rows))
    return found


def _summary(section: Mapping[str, Any]) -> dict[str, Any]:
    return {"mean of all": section["macro"]} | ({"objective": section["objective"]} if "objective" in section else {})


def _cell(value: Mapping[str, float | None], metric: str) -> str:
    """A value with its interval, if it has one."""
    if value["value"] is None:
        return "–"
    digits = "{:.4g}" if metric == "regret" else "{:.3f}"
    interval = " [{}, {}]".format(*(digits.format(value[end]) for end in ("low", "high"))) if "low" in value else ""
    return digits.format(value["value"]) + interval
