"""The plots of the found mixture: how sure it is, what it trades for what, and where it lies among three domains."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import combinations

import numpy as np
from matplotlib.axes import Axes

from megatron_demix.report.data import Choice, Optimum, ReportData
from megatron_demix.report.drawing import (
    ACCENT,
    CELL,
    INK,
    MUTED,
    RULE,
    SMALL,
    by_square_root,
    categorical,
    legend,
    new_figure,
    points,
    render,
    shares_text,
    shortened,
)
from megatron_demix.report.selection import (
    MOST_DOMAINS,
    MOST_POINTS,
    colour_indices,
    drawn_domains,
    evenly,
    ordered_domains,
    said_of_domains,
    said_of_weights,
)

_MOST_TRADED = 4
"""Scores drawn against each other in panels of the Pareto front: those with the largest weights."""


def optimum_spread(data: ReportData) -> str | None:
    """The largest domains' shares at the optima of the searches on resampled proxies, with the found and the natural share."""
    choice = data.choice
    if choice is None or choice.optimum is None:
        return None
    names = [name for name in drawn_domains(data) if name in choice.optimum.samples]
    indices = colour_indices(data)
    natural = {d.name: d.natural_share for d in data.domains}
    figure, axes = new_figure(7.2, 0.9 + 0.42 * len(names))
    tips: dict[str, Iterable[str]] = {}
    for y, name in enumerate(names):
        samples = np.asarray(choice.optimum.samples[name])
        heights = y + 0.3 * _swarm(samples)
        texts = (f"{name} {share:.1%} in one resampled search" for share in samples)
        tips |= points(axes, samples, heights, texts, size=15, color=categorical(indices[name]), alpha=0.45, gid=f"samples-{y}")
        first = y == 0
        edges = [y - 0.38, y + 0.38]
        axes.plot([choice.shares.get(name, 0.0)] * 2, edges, color=INK, linewidth=1.8, label="found" if first else None)
        if name in natural:
            dashes = (0, (2, 2))
            axes.plot(
                [natural[name]] * 2, edges, color=MUTED, linewidth=1.2, linestyle=dashes, label="natural" if first else None
            )
        text = _mean_and_deviation(samples)
        axes.annotate(text, (1.01, y), xycoords=("axes fraction", "data"), va="center", color=INK, fontsize=SMALL)
    axes.set_yticks(range(len(names)), [shortened(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("share of the data at the optimum")
    if len(names) < len(data.domain_names):
        by_square_root(axes, "x")
        axes.set_xlabel("share of the data at the optimum (square-root scale)")
    axes.grid(axis="y", visible=False)
    legend(axes, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderpad=0)
    return render(figure, "distribution of the optimum over resampled proxies", tips)


def others_at_the_optimum(data: ReportData) -> str:
    """What the domains that are not drawn have together; empty where all are."""
    if data.choice is None or data.choice.optimum is None or not (said := said_of_domains(data)):
        return ""
    others = [name for name in ordered_domains(data)[MOST_DOMAINS:] if name in data.choice.optimum.samples]
    together = np.sum([data.choice.optimum.samples[name] for name in others], axis=0)
    found = math.fsum(data.choice.shares.get(name, 0.0) for name in others)
    return (
        f"{said} The {len(others)} others have {100 * found:.1f} % of the data together, and at these optima "
        f"{_mean_and_deviation(together)}."
    )


def _mean_and_deviation(shares: np.ndarray) -> str:
    deviation = 100 * shares.std(ddof=1)
    return f"{100 * shares.mean():.1f} ± {f'{deviation:.2g}' if deviation >= 0.01 else '<0.01'} %"


def _swarm(values: np.ndarray) -> np.ndarray:
    """Heights in -1 ... 1 that spread crowded values, by their rank within a fine bin: the same for the same values."""
    width = np.ptp(values) / 12 or 1.0
    bins = np.floor((values - values.min()) / width)
    heights = np.zeros(len(values))
    for each in np.unique(bins):
        rows = np.flatnonzero(bins == each)
        heights[rows] = np.linspace(-1, 1, len(rows)) if len(rows) > 1 else 0.0
    return heights


def pareto_panels(data: ReportData) -> list[str]:
    """The front, two scores at a time, among all proxies."""
    if data.choice is None or not data.choice.pareto:
        return []
    scores = sorted(data.choice.pareto[0].predicted, key=lambda name: -data.objective.get(name, 0.0))[:_MOST_TRADED]
    return [_panel(data, data.choice, pair) for pair in combinations(scores, 2)]


def said_of_pairs(data: ReportData) -> str:
    """Which are drawn; empty where all are."""
    if data.choice is None or not data.choice.pareto:
        return ""
    traded = data.choice.pareto[0].predicted  # the heaviest alone
    count = [name for name, weight in data.objective.items() if weight or name in traded]
    if len(count) <= _MOST_TRADED:
        return ""
    which = said_of_weights(data, count, _MOST_TRADED)
    return f"Of {len(count)} scores in the objective {_MOST_TRADED} are drawn, each against each: {which}."


def _panel(data: ReportData, choice: Choice, pair: tuple[str, str]) -> str:
    x, y = pair
    figure, axes = new_figure(*CELL)
    rows = [(p, s) for r in data.rounds for p in r.mixtures if (s := r.scores.get(p.name)) and x in s and y in s]
    rows = evenly(rows, MOST_POINTS)
    texts = (f"{p.name}: {x} {s[x]:.4f}, {y} {s[y]:.4f}" for p, s in rows)
    xs, ys = [s[x] for _, s in rows], [s[y] for _, s in rows]
    tips = points(axes, xs, ys, texts, size=9, color=MUTED, alpha=0.35, gid="proxies")
    front = choice.pareto
    texts = (shares_text(p.shares) for p in front)
    xs, ys = [p.predicted[x] for p in front], [p.predicted[y] for p in front]
    tips |= points(axes, xs, ys, texts, size=13, color=ACCENT, alpha=1.0, gid="front")
    if x in choice.predicted and y in choice.predicted:
        found = (choice.predicted[x][0], choice.predicted[y][0])
        axes.plot(*found, marker="D", markersize=6, color=INK, linestyle="none", label="found")
        tips["found"] = [f"found: {x} {found[0]:.4f}, {y} {found[1]:.4f}"]
    if x in choice.natural and y in choice.natural:
        axes.plot(choice.natural[x][0], choice.natural[y][0], marker="o", markersize=6, markerfacecolor="none",
                  color=INK, linestyle="none", label="natural")  # fmt: skip
    axes.set_xlabel(_labelled(data, x))
    axes.set_ylabel(_labelled(data, y))
    legend(axes, handletextpad=0.2)
    return render(figure, f"Pareto front of {x} and {y}", tips)


def _labelled(data: ReportData, score: str) -> str:
    return f"{shortened(score)}, {data.unit_of(score)}"


def ternary(data: ReportData) -> str | None:
    """All proxies in the triangle of three domains, worse half, better half and best tenth; None unless there are three."""
    names = data.domain_names
    proxies = sorted((pair for n in range(len(data.rounds)) for pair in data.measured(n)), key=lambda pair: -pair[1])
    if len(names) != 3 or not proxies:
        return None
    figure, axes = new_figure(4.6, 4.1)
    axes.set_axis_off()
    axes.set_aspect("equal")
    corners = _at([[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    for level in (0.2, 0.4, 0.6, 0.8):
        for d in range(3):
            ends = np.zeros((2, 3))
            ends[:, d], ends[0, (d + 1) % 3], ends[1, (d + 2) % 3] = level, 1 - level, 1 - level
            axes.plot(*_at(ends).T, color=RULE, linewidth=0.7, zorder=0)
    axes.plot(*np.concatenate([corners, corners[:1]]).T, color=MUTED, linewidth=1)
    for (x, y), name, side in zip(corners, names, ("right", "left", "center"), strict=True):
        top = side == "center"
        axes.text(x, y + (0.03 if top else -0.03), f"all {name}", ha=side, va="bottom" if top else "top", fontsize=9, color=INK)
    places = _at([[p.shares.get(name, 0.0) for name in names] for p, _ in proxies])
    half, best = len(proxies) // 2, len(proxies) - max(1, len(proxies) // 10)
    tips: dict[str, Iterable[str]] = {}
    for gid, part, colour, alpha in (
        ("worse", slice(0, half), MUTED, 0.25),
        ("better", slice(half, best), MUTED, 0.7),
        ("best", slice(best, None), ACCENT, 0.85),
    ):
        texts = (f"{p.name}: {value:.4f}  {shares_text(p.shares)}" for p, value in proxies[part])
        tips |= points(axes, places[part, 0], places[part, 1], texts, size=24, color=colour, alpha=alpha, gid=gid)
    _mark(axes, data.choice, names, data.choice.optimum if data.choice else None)
    axes.set_xlim(-0.12, 1.12)
    axes.set_ylim(-0.1, math.sqrt(0.75) + 0.1)
    if data.choice:
        legend(axes, loc="upper right")
    return render(figure, "every proxy in the triangle of its domains", tips)


def _mark(axes: Axes, choice: Choice | None, names: Sequence[str], optimum: Optimum | None) -> None:
    if optimum is not None:
        places = _at(np.transpose([optimum.samples[name] for name in names]))
        axes.plot(*places.T, marker=".", markersize=4, color=INK, alpha=0.3, linestyle="none", label="optimum, resampled")
    if choice is not None:
        point = _at([[choice.shares.get(name, 0.0) for name in names]])
        axes.plot(*point.T, marker="D", markersize=7, color=INK, linestyle="none", label="found")


def _at(shares_M3: Sequence[Sequence[float]] | np.ndarray) -> np.ndarray:
    """Points of the plane: the first domain at the left, the second at the right, the third on top."""
    return np.asarray(shares_M3, np.float64) @ np.array([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]])
