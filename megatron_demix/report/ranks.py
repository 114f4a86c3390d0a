"""The rank plot: where proxies and references put each mixture, and how close to the ceiling that is."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from megatron_demix.report.drawing import shortened

FORMATS = (".svg", ".pdf", ".png")
_INK, _MUTED, _RULE, _PROXY, _CEILING = "#1b1d21", "#646a73", "#e3e4e7", "#0b7285", "#c2410c"
_COLUMNS, _PANEL, _LONGEST = 4, 2.35, 18
_MOST_PANELS = 24

Columns = Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray | None]]
"""Score -> values of proxies_M, references_M and, if there are any, re-seeded references_M of the same mixtures."""


def draw_ranks(columns: Columns, report: Mapping[str, Any], higher_is_better: Collection[str], suffix: str) -> bytes:
    """One row of Spearman intervals with the ceiling, and what noiseless proxies would reach; then a panel a score, or of many
    scores for those that agree least: rank among proxies against rank among references, 1 the best. report: of
    search.consistency.rank_consistency. suffix: one of FORMATS. The same numbers give the same bytes."""
    shown = _least_alike(list(columns), report)
    num_rows = -(-len(shown) // _COLUMNS)
    rows = [name for name in ("macro", "objective") if name in report] + list(columns)
    heights = [1.1 + 0.24 * len(rows), *[_PANEL] * num_rows]
    across = min(_COLUMNS, max(len(columns), 2))
    figure = Figure(figsize=(_PANEL * across + 0.6, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(1 + num_rows, across, height_ratios=heights)
    fewer = f"; in panels the {len(shown)} lowest of {len(columns)} scores" if len(shown) < len(columns) else ""
    _intervals(figure.add_subplot(grid[0, :]), rows, report, fewer)
    for index, (name, tables) in enumerate((name, columns[name]) for name in shown):
        axes = figure.add_subplot(grid[1 + index // _COLUMNS, index % _COLUMNS])
        _panel(axes, tables, -1.0 if name in higher_is_better else 1.0)
        axes.set_title(_title(name, report), fontsize=9, color=_INK, parse_math=False)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ranks"}):
        nothing = {"Date": None} if suffix == ".svg" else {"CreationDate": None} if suffix == ".pdf" else {}
        return _saved(figure, suffix, nothing)


def _saved(figure: Any, suffix: str, metadata: dict[str, None]) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format=suffix[1:], dpi=160, metadata=metadata)
    return stream.getvalue()


def _style(axes: Any) -> None:
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_RULE)
    axes.tick_params(colors=_MUTED, labelsize=8, length=0)
    axes.set_axisbelow(True)


def _least_alike(names: list[str], report: Mapping[str, Any]) -> list[str]:
    """All, or the lowest Spearman correlations, those that are undefined first."""
    if len(names) <= _MOST_PANELS:
        return names
    values = {name: own.value if (own := _spearman(report, name)) else -2.0 for name in names}
    return sorted(names, key=lambda name: values[name])[:_MOST_PANELS]


def _intervals(axes: Any, rows: list[str], report: Mapping[str, Any], fewer: str) -> None:
    """Spearman of every score with its interval; the ceiling as a bar behind it, and its root."""
    lowest = 1.0
    for y, name in enumerate(rows):
        if top := _spearman(report.get("ceiling"), name):
            label = "another seed (ceiling)" if y == 0 else None
            axes.fill_betweenx([y - 0.32, y + 0.32], top.low, top.high, color=_CEILING, alpha=0.15, linewidth=0)
            axes.plot([top.value] * 2, [y - 0.32, y + 0.32], color=_CEILING, linewidth=1.6, label=label)
            lowest = min(lowest, top.low)
        if (root := _noiseless(report, name)) is not None:
            label = "noiseless proxies" if y == 0 else None
            axes.plot([root] * 2, [y - 0.32, y + 0.32], color=_CEILING, linewidth=1.2, linestyle=(0, (2, 1.5)), label=label)
        if own := _spearman(report, name):
            axes.plot([own.low, own.high], [y, y], color=_PROXY, linewidth=2, solid_capstyle="round")
            axes.plot(own.value, y, "o", color=_PROXY, markersize=5, label="proxies" if y == 0 else None)
            lowest = min(lowest, own.low)
    titles = ["mean of all" if name == "macro" else shortened(name, _LONGEST) for name in rows]
    axes.set_yticks(range(len(rows)), titles, parse_math=False)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(max(-1.0, lowest - 0.05), 1.01)
    axes.grid(axis="x", color=_RULE, linewidth=0.6)
    title = f"Spearman correlation with {report['num_mixtures']} references, 90 % intervals{fewer}"
    # Above the legend: beside it there is no room where scores are few.
    axes.set_title(title, fontsize=9, color=_INK, loc="left", pad=20)
    axes.legend(
        frameon=False, fontsize=8, labelcolor=_INK, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, borderpad=0.2,
        borderaxespad=0.2, columnspacing=1.2, handlelength=1.4,
    )  # fmt: skip
    _style(axes)


class _Interval(NamedTuple):
    value: float
    low: float
    high: float


def _spearman(report: Mapping[str, Any] | None, name: str) -> _Interval | None:
    """None where there is no such report, or the correlation is undefined."""
    if report is None:
        return None
    found = (report[name] if name in ("macro", "objective") else report["scores"][name])["spearman"]
    return None if found["value"] is None else _Interval(**found)


def _noiseless(report: Mapping[str, Any], name: str) -> float | None:
    """Spearman's rho of proxies without noise; None where nothing says it."""
    if "noiseless" not in report:
        return None
    return report["noiseless"][name] if name in ("macro", "objective") else report["noiseless"]["scores"][name]


def _title(name: str, report: Mapping[str, Any]) -> str:
    own, top = _spearman(report, name), _spearman(report.get("ceiling"), name)
    return shortened(name, _LONGEST) + (f" · ρ {own.value:.2f}" if own else "") + (f" of {top.value:.2f}" if top else "")


def _panel(axes: Any, tables: tuple[np.ndarray, np.ndarray, np.ndarray | None], sign: float) -> None:
    from scipy.stats import rankdata

    proxies_M, references_M, reseeded_M = tables
    x_M = rankdata(sign * references_M)
    ends = (0.3, len(x_M) + 0.7)
    axes.plot(ends, ends, color=_MUTED, linewidth=0.8)
    if reseeded_M is not None:
        axes.scatter(x_M, rankdata(sign * reseeded_M), s=16, facecolors="none", edgecolors=_CEILING, linewidths=0.8, alpha=0.8)
    axes.scatter(x_M, rankdata(sign * proxies_M), s=14, color=_PROXY, alpha=0.8, linewidths=0)
    axes.set_xlim(ends)
    axes.set_ylim(ends)
    axes.set_aspect("equal")
    axes.set_xlabel("rank among references", fontsize=8, color=_MUTED)
    axes.set_ylabel("rank among proxies", fontsize=8, color=_MUTED)
    _style(axes)
