"""The plots of training and of the proxies. Those of the found mixture are in optimum.py."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.ticker import MaxNLocator

from megatron_demix.report.data import Fit, Proxy, ReportData
from megatron_demix.report.drawing import (
    ACCENT,
    CELL,
    COLOURED,
    INK,
    MEDIUM,
    MOST_TIPS,
    MUTED,
    OTHERS,
    RULE,
    SMALL,
    WARM,
    by_square_root,
    categorical,
    legend,
    new_figure,
    points,
    render,
    shares_text,
    shortened,
    titled,
)
from megatron_demix.report.selection import MOST_POINTS, colour_indices, drawn_domains, evenly
from megatron_demix.report.verdict import Comparison


def forest(comparisons: Sequence[Comparison], unit: str) -> str:
    """Found minus each baseline with its interval; the zero line is "no difference"."""
    figure, axes = new_figure(4.3, 1.0 + 0.4 * len(comparisons))
    for y, c in enumerate(comparisons):
        colour = {"won": ACCENT, "lost": WARM}.get(c.outcome, MUTED)
        if c.interval:
            axes.plot(c.interval, [y, y], color=colour, linewidth=2.5, solid_capstyle="round")
        axes.plot([c.difference], [y], marker="o", color=colour, markersize=7)
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks(range(len(comparisons)), [f"against {c.baseline}" for c in comparisons])
    axes.set_ylim(len(comparisons) - 0.5, -0.5)
    ends = [abs(v) for c in comparisons for v in (c.interval or (c.difference,))]
    reach = 1.15 * max(ends) or 1.0
    axes.set_xlim(-reach, reach)
    axes.set_xlabel(f"difference of the objective, {unit}")
    axes.text(-reach, -0.5, "← found is better", color=MUTED, fontsize=SMALL, va="bottom")
    axes.text(reach, -0.5, "baseline is better →", color=MUTED, fontsize=SMALL, va="bottom", ha="right")
    axes.grid(axis="y", visible=False)
    return render(figure, "difference between the found mixture and each baseline")


def objective_by_round(data: ReportData) -> str | None:
    """Every proxy's objective, round by round, and the best so far."""
    rounds = [[(p.name, value) for p, value in data.measured(n)] for n, r in enumerate(data.rounds) if r.scores]
    if not any(rounds):
        return None
    figure, axes = new_figure(*CELL)
    tips: dict[str, Iterable[str]] = {}
    best, best_so_far = math.inf, []
    for number, proxies in enumerate(rounds, start=1):
        # Spread sideways by rank within the round: deterministic, and no two points hide one another.
        xs, ys = [number + 0.5 * ((i * 0.618) % 1 - 0.5) for i in range(len(proxies))], [y for _, y in proxies]
        texts = (f"{name}: {y:.4f}" for name, y in proxies)
        tips |= points(axes, xs, ys, texts, size=16, color=ACCENT, alpha=0.5, gid=f"points-{number}")
        best = min([best, *ys])
        best_so_far.append(best)
    numbers = range(1, len(rounds) + 1)
    axes.plot(numbers, best_so_far, color=WARM, linewidth=1.8, marker="_", markersize=14, label="best so far")
    if data.choice:
        axes.axhline(data.choice.objective[0], color=INK, linewidth=1, linestyle=(0, (4, 3)), label="predicted for the choice")
    if len(numbers) <= _NAMED_ROUNDS:
        axes.set_xticks(list(numbers), [f"round {n}" for n in numbers])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_xlabel("round")
    axes.set_title("objective by round")
    axes.set_xlim(0.5, len(rounds) + 0.5)
    axes.set_ylabel(data.unit)
    legend(axes)
    return render(figure, "objective by round", tips)


_NAMED_ROUNDS = 4


def parallel_coordinates(data: ReportData) -> str | None:
    """The best tenth of the scored proxies, and some of the others, as lines over the largest domains' actual shares, ending at
    their objective (best on top)."""
    proxies = [pair for number in range(len(data.rounds)) for pair in data.measured(number)]
    domains = drawn_domains(data)
    if not proxies or not domains:
        return None
    proxies.sort(key=lambda item: -item[1])
    worst, best = proxies[0][1], proxies[-1][1]
    lines = _lines(list(enumerate(proxies, start=1)))
    top = max([p.shares.get(d, 0.0) for _, (p, _) in lines for d in domains]) * 1.05 or 1.0
    many = len(domains) < len(data.domain_names)
    strong = min(0.8, max(0.25, 16 / max(1, len(proxies) // 10)))
    figure, axes = new_figure(min(1.5 * (len(domains) + 1) + 0.8, _WIDEST), 3.0)
    columns = range(len(domains) + 1)
    tips = {}
    for rank, (proxy, value) in lines:
        among_best = rank > 0.9 * len(proxies)
        height = (worst - value) / (worst - best) if worst > best else 0.5
        end = top * (height**2 if many else height)
        axes.plot(
            columns,
            [*(proxy.shares.get(d, 0.0) for d in domains), end],
            color=ACCENT if among_best else MUTED,
            alpha=strong if among_best else 0.06 + 0.3 * rank / len(proxies),
            linewidth=1.4 if among_best else 0.8,
            gid=f"tip-{proxy.name}",
        )
        tips[f"tip-{proxy.name}"] = [f"{proxy.name}: {value:.4f}  " + shares_text(proxy.shares)]
    if data.choice:
        shares = data.choice.shares
        axes.plot(columns[:-1], [shares.get(d, 0.0) for d in domains], color=INK, linewidth=2.6, marker="o", label="found")
        legend(axes, loc="upper left")
    for x in columns:
        axes.axvline(x, color=RULE, linewidth=1)
    axes.text(len(domains) + 0.03, top, f" {best:.4f} (best)", va="top", color=MUTED, fontsize=SMALL)
    axes.text(len(domains) + 0.03, 0, f" {worst:.4f}", va="bottom", color=MUTED, fontsize=SMALL)
    axes.set_xlim(-0.15, len(domains) + 0.45 + 0.06 * max(0, len(domains) - 4))
    axes.set_ylim(0, top)
    axes.set_xticks(list(columns), [*map(shortened, domains), "objective"])
    if _LABEL_WIDTH * max(map(len, map(shortened, domains))) > figure.get_figwidth() / len(columns):
        for label in axes.get_xticklabels():
            label.set(rotation=-30, ha="left", rotation_mode="anchor")
    axes.set_ylabel("actual share of the data")
    if many:
        by_square_root(axes, "y")
        axes.set_ylabel("actual share (square-root scale)")
    axes.grid(axis="x", visible=False)
    return render(figure, "shares of every proxy and its objective", tips)


_WIDEST = 10.0
"""Inches of a plot over the domains."""
_LABEL_WIDTH = 0.08
"""Inches that a letter of a tick's label takes, with a margin."""
MOST_LINES = 250
"""Proxies drawn as lines; more hide one another."""


def _lines(ranked: list[tuple[int, tuple[Proxy, float]]]) -> list[tuple[int, tuple[Proxy, float]]]:
    """All, or the best tenth (at most half of those drawn) and an even selection of the others. ranked: the worst first."""
    if len(ranked) <= MOST_LINES:
        return ranked
    num_best = min(len(ranked) // 10, MOST_LINES // 2)
    return evenly(ranked[:-num_best], MOST_LINES - num_best) + ranked[-num_best:]


def score_against_share(data: ReportData, score: str, shares: RankedShares) -> str | None:
    """One score of every proxy against the share of the domain that moves it most (by rank correlation)."""
    values = [r.scores.get(p.name, {}).get(score, math.nan) for r in data.rounds for p in r.mixtures]
    found = [(p, value) for p, value in zip(shares.proxies, values, strict=True) if math.isfinite(value)]
    if len(found) < 3 or not shares.domains:
        return None
    domain, correlation = shares.strongest(values)
    found = evenly(found, MOST_POINTS)
    figure, axes = new_figure(*CELL)
    xs = [p.shares.get(domain, 0.0) for p, _ in found]
    colour = categorical(shares.colours[domain])
    texts = (f"{p.name}: {v:.4f}  {shares_text(p.shares)}" for p, v in found)
    tips = points(axes, xs, [v for _, v in found], texts, size=14, color=colour, alpha=0.55, gid="points")
    if data.choice and domain in data.choice.shares:
        axes.axvline(data.choice.shares[domain], color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_title(titled(score, f"rank correlation {_signed(correlation)}"))
    axes.set_xlabel(f"share of {domain}")
    axes.set_ylabel(data.unit_of(score))
    return render(figure, f"{score} against the share of {domain}", tips)


class RankedShares:
    """Of all proxies, in order: which domain's share orders them most as a score does."""

    def __init__(self, data: ReportData) -> None:
        self.proxies = [p for r in data.rounds for p in r.mixtures]
        self.domains = data.domain_names
        self.colours = colour_indices(data)
        shape = (len(self.proxies), len(self.domains))
        self._shares_MD = np.reshape([p.shares.get(d, 0.0) for p in self.proxies for d in self.domains], shape)
        self._ranks_MD = _ranks(self._shares_MD)

    def strongest(self, values: Sequence[float]) -> tuple[str, float]:
        """The domain, and the rank correlation with its share; 0.0 where either side is constant. Leaves out what is not
        finite."""
        scores_M = np.asarray(values, np.float64)
        finite = np.isfinite(scores_M)
        ranks_MD = self._ranks_MD if finite.all() else _ranks(self._shares_MD[finite])
        x_MD = ranks_MD - ranks_MD.mean(axis=0)
        (y_M,) = _ranks(scores_M[finite, None]).T
        y_M = y_M - y_M.mean()
        norms_D = np.linalg.norm(x_MD, axis=0) * np.linalg.norm(y_M)
        correlations_D = np.divide(y_M @ x_MD, norms_D, out=np.zeros(len(norms_D)), where=norms_D > 0)
        index = int(np.argmax(np.abs(correlations_D)))
        return self.domains[index], float(correlations_D[index])


def _ranks(values_MD: np.ndarray) -> np.ndarray:
    """Of each column; equal values share their mean rank."""
    from scipy.stats import rankdata

    return rankdata(values_MD, axis=0) if values_MD.size else values_MD


def predicted_against_measured(score: str, fit: Fit, unit: str) -> str | None:
    """Out-of-fold predictions of one score's surrogate."""
    halves = fit.half_intervals or [math.nan] * len(fit.measured)
    rows = [row for row in zip(fit.measured, fit.predicted, halves, strict=True) if math.isfinite(row[0] + row[1])]
    if not rows:
        return None
    rows = evenly(rows, MOST_POINTS)
    pairs = [(m, p) for m, p, _ in rows]
    figure, axes = new_figure(*CELL)
    both = [value for pair in pairs for value in pair]
    margin = 0.04 * (max(both) - min(both)) or 0.01
    ends = (min(both) - margin, max(both) + margin)
    axes.plot(ends, ends, color=MUTED, linewidth=1)
    measured, predicted = zip(*pairs, strict=True)
    spans = [(m, p - half, p + half) for m, p, half in rows if math.isfinite(half)]
    if len(spans) <= MOST_TIPS:
        axes.vlines(*zip(*spans, strict=True), color=ACCENT, alpha=0.3, linewidth=1) if spans else None
    else:  # as one line with gaps, which is a tenth as long
        xs, ys = zip(*((x, y) for m, low, high in spans for x, y in ((m, low), (m, high), (m, math.nan))), strict=True)
        axes.plot(xs, ys, color=ACCENT, alpha=0.3, linewidth=1)
    texts = (f"measured {m:.4f}, predicted {p:.4f}" for m, p in pairs)
    tips = points(axes, measured, predicted, texts, size=14, color=ACCENT, alpha=0.6, gid="points")
    axes.set_xlim(ends)
    axes.set_ylim(ends)
    axes.set_title(titled(score, f"ρ {fit.correlation} · RMSE {fit.rmse:.2g}"))
    axes.set_xlabel(f"measured, {unit}")
    axes.set_ylabel("predicted")
    return render(figure, f"predicted against measured {score}", tips)


def loss_curves(group: str, curves: Mapping[str, Mapping[str, Sequence[float]]], first: Sequence[str] = ()) -> str:
    """Training loss of the runs of one group, lightly smoothed over the raw curve. Of many runs a few are named, of `first`
    (the last parts of their names) if there are such."""
    figure, axes = new_figure(*MEDIUM)
    settled = []
    named = _named(curves, first)
    order = [*(name for name in curves if name not in named), *named]  # those without a name lie below
    for name, curve in ((name, curves[name]) for name in order):
        iterations, losses = _binned(curve["iteration"], curve["lm loss"], _MOST_STEPS if name in named else _FEW_STEPS)
        colour = ACCENT if len(curves) == 1 else categorical(named.get(name))
        if name in named:
            axes.plot(iterations, losses, color=colour, alpha=0.25, linewidth=0.8)
        label = shortened(name.removeprefix(f"{group}/")) if name in named else None
        axes.plot(iterations, _smooth(losses), color=colour, linewidth=1.6 if name in named else 0.7, label=label)
        settled += [loss for loss in losses[len(losses) // 20 :] if math.isfinite(loss)]
    if len(named) < len(curves):
        axes.plot([], [], color=OTHERS, linewidth=0.7, label=f"{len(curves) - len(named)} others")
    if settled:  # The first steps from random weights would flatten everything else.
        low, high = min(settled), sorted(settled)[int(0.98 * (len(settled) - 1))]
        axes.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.1 * (high - low) + 1e-3)
    axes.set_title(group)
    axes.set_xlabel("iteration")
    axes.set_ylabel("lm loss, nats per token")
    if len(curves) > 1:
        legend(axes, ncols=2 if len(curves) > 4 else 1)
    return render(figure, f"loss curves of {group}")


def _named(curves: Mapping[str, object], first: Sequence[str]) -> dict[str, int | None]:
    """Runs that are told apart, with the index of their colour."""
    if len(curves) <= _MOST_CURVES:
        return {name: index for index, name in enumerate(curves)}
    chosen = [name for last in first for name in curves if name.rpartition("/")[2] == last] or list(curves)
    return {name: index for index, name in enumerate(chosen[:COLOURED])}


_MOST_CURVES = 12
_MOST_STEPS, _FEW_STEPS = 500, 100
"""Points of a curve with a name, and of the others."""


def _binned(iterations: Sequence[float], losses: Sequence[float], most: int) -> tuple[list[float], list[float]]:
    """Means of so many successive steps that the curve is not too long."""
    width = -(-len(losses) // most)
    if width <= 1:
        return list(iterations), list(losses)
    starts = range(0, len(losses), width)
    means = [[sum(column[i : i + width]) / len(column[i : i + width]) for i in starts] for column in (iterations, losses)]
    return means[0], means[1]


def _smooth(values: list[float]) -> list[float]:
    """Centred moving average over about a twentieth of the curve, narrower at its ends."""
    half = max(1, len(values) // 40)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(w) / len(w) for w in windows]


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")
