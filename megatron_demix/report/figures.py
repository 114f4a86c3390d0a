"""The plots of training and of the proxies. Those of the found mixture are in optimum.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from megatron_demix.report.data import Fit, ReportData
from megatron_demix.report.drawing import (
    ACCENT,
    CELL,
    INK,
    MEDIUM,
    MUTED,
    RULE,
    SMALL,
    WARM,
    categorical,
    legend,
    new_figure,
    render,
    shares_text,
)
from megatron_demix.report.verdict import Comparison

_Z90 = 1.6448536269514722


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
    tips, best, best_so_far = [], math.inf, []
    for number, points in enumerate(rounds, start=1):
        # Spread sideways by rank within the round: deterministic, and no two points hide one another.
        xs = [number + 0.5 * ((i * 0.618) % 1 - 0.5) for i in range(len(points))]
        axes.scatter(xs, [y for _, y in points], s=16, color=ACCENT, alpha=0.5, linewidths=0, gid=f"points-{number}")
        tips.append([f"{name}: {y:.4f}" for name, y in points])
        best = min([best, *(y for _, y in points)])
        best_so_far.append(best)
    numbers = range(1, len(rounds) + 1)
    axes.plot(numbers, best_so_far, color=WARM, linewidth=1.8, marker="_", markersize=14, label="best so far")
    if data.choice:
        axes.axhline(data.choice.objective[0], color=INK, linewidth=1, linestyle=(0, (4, 3)), label="predicted for the choice")
    axes.set_xticks(list(numbers), [f"round {n}" for n in numbers])
    axes.set_title("objective by round")
    axes.set_xlim(0.5, len(rounds) + 0.5)
    axes.set_ylabel(data.unit)
    legend(axes)
    return render(figure, "objective by round", {f"points-{n}": t for n, t in enumerate(tips, start=1)})


def parallel_coordinates(data: ReportData) -> str | None:
    """Every scored proxy as a line over the domains' actual shares, ending at its objective (best on top)."""
    proxies = [pair for number in range(len(data.rounds)) for pair in data.measured(number)]
    domains = data.domain_names
    if not proxies or not domains:
        return None
    proxies.sort(key=lambda item: -item[1])
    values = [y for _, y in proxies]
    worst, best = max(values), min(values)
    top = max([p.shares.get(d, 0.0) for p, _ in proxies for d in domains]) * 1.05 or 1.0
    figure, axes = new_figure(1.5 * (len(domains) + 1) + 0.8, 3.0)
    columns = range(len(domains) + 1)
    for rank, (proxy, value) in enumerate(proxies, start=1):
        among_best = rank > 0.9 * len(proxies)
        end = top * (worst - value) / (worst - best) if worst > best else top / 2
        axes.plot(
            columns,
            [*(proxy.shares.get(d, 0.0) for d in domains), end],
            color=ACCENT if among_best else MUTED,
            alpha=0.8 if among_best else 0.06 + 0.3 * rank / len(proxies),
            linewidth=1.4 if among_best else 0.8,
            gid=f"tip-{proxy.name}",
        )
    tips = {f"tip-{p.name}": [f"{p.name}: {y:.4f}  " + shares_text(p.shares)] for p, y in proxies}
    if data.choice:
        shares = data.choice.shares
        axes.plot(columns[:-1], [shares.get(d, 0.0) for d in domains], color=INK, linewidth=2.6, marker="o", label="found")
        legend(axes, loc="upper left")
    for x in columns:
        axes.axvline(x, color=RULE, linewidth=1)
    axes.text(len(domains) + 0.03, top, f" {best:.4f} (best)", va="top", color=MUTED, fontsize=SMALL)
    axes.text(len(domains) + 0.03, 0, f" {worst:.4f}", va="bottom", color=MUTED, fontsize=SMALL)
    axes.set_xlim(-0.15, len(domains) + 0.45)
    axes.set_ylim(0, top)
    axes.set_xticks(list(columns), [*domains, "objective"])
    axes.set_ylabel("actual share of the data")
    axes.grid(axis="x", visible=False)
    return render(figure, "shares of every proxy and its objective", tips)


def score_against_share(data: ReportData, score: str) -> str | None:
    """One score of every proxy against the share of the domain that moves it most (by rank correlation)."""
    pairs = [(p, r.scores.get(p.name, {}).get(score, math.nan)) for r in data.rounds for p in r.mixtures]
    found = [(p, value) for p, value in pairs if math.isfinite(value)]
    if len(found) < 3 or not data.domain_names:
        return None
    values = [value for _, value in found]
    correlations = {d: _rank_correlation([p.shares.get(d, 0.0) for p, _ in found], values) for d in data.domain_names}
    domain = max(correlations, key=lambda d: abs(correlations[d]))
    figure, axes = new_figure(*CELL)
    xs = [p.shares.get(domain, 0.0) for p, _ in found]
    index = data.domain_names.index(domain)
    axes.scatter(xs, values, s=14, color=categorical(index), alpha=0.55, linewidths=0, gid="points")
    if data.choice and domain in data.choice.shares:
        axes.axvline(data.choice.shares[domain], color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_title(f"{score} · rank correlation {_signed(correlations[domain])}")
    axes.set_xlabel(f"share of {domain}")
    axes.set_ylabel(data.unit_of(score))
    tips = {"points": [f"{p.name}: {v:.4f}  {shares_text(p.shares)}" for p, v in found]}
    return render(figure, f"{score} against the share of {domain}", tips)


def predicted_against_measured(score: str, fit: Fit, unit: str) -> str | None:
    """Out-of-fold predictions of one score's surrogate."""
    pairs = [(m, p) for m, p in zip(fit.measured, fit.predicted, strict=True) if math.isfinite(m) and math.isfinite(p)]
    if not pairs:
        return None
    figure, axes = new_figure(*CELL)
    both = [value for pair in pairs for value in pair]
    margin = 0.04 * (max(both) - min(both)) or 0.01
    ends = (min(both) - margin, max(both) + margin)
    axes.plot(ends, ends, color=MUTED, linewidth=1)
    measured, predicted = zip(*pairs, strict=True)
    if len(fit.std) == len(fit.measured):
        spans = [(m, p, _Z90 * s) for m, p, s in zip(fit.measured, fit.predicted, fit.std, strict=True) if math.isfinite(m + p)]
        axes.vlines(
            [m for m, _, _ in spans],
            [p - h for _, p, h in spans],
            [p + h for _, p, h in spans],
            color=ACCENT,
            alpha=0.3,
            linewidth=1,
        )
    axes.scatter(measured, predicted, s=14, color=ACCENT, alpha=0.6, linewidths=0, gid="points")
    axes.set_xlim(ends)
    axes.set_ylim(ends)
    axes.set_title(f"{score} · ρ {fit.correlation} · RMSE {fit.rmse:.2g}")
    axes.set_xlabel(f"measured, {unit}")
    axes.set_ylabel("predicted")
    tips = [f"measured {m:.4f}, predicted {p:.4f}" for m, p in pairs]
    return render(figure, f"predicted against measured {score}", {"points": tips})


def loss_curves(group: str, curves: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Training loss of the runs of one group, lightly smoothed over the raw curve."""
    figure, axes = new_figure(*MEDIUM)
    settled = []
    for index, (name, curve) in enumerate(curves.items()):
        iterations, losses = list(curve["iteration"]), list(curve["lm loss"])
        colour = categorical(index) if len(curves) > 1 else ACCENT
        axes.plot(iterations, losses, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(iterations, _smooth(losses), color=colour, linewidth=1.6, label=name.removeprefix(f"{group}/"))
        settled += [loss for loss in losses[len(losses) // 20 :] if math.isfinite(loss)]
    if settled:  # The first steps from random weights would flatten everything else.
        low, high = min(settled), sorted(settled)[int(0.98 * (len(settled) - 1))]
        axes.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.1 * (high - low) + 1e-3)
    axes.set_title(group)
    axes.set_xlabel("iteration")
    axes.set_ylabel("lm loss, nats per token")
    if len(curves) > 1:
        legend(axes, ncols=2 if len(curves) > 4 else 1)
    return render(figure, f"loss curves of {group}")


def _rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """0.0 where either side is constant."""
    from scipy.stats import spearmanr

    return float(spearmanr(x, y).statistic) if min(len(set(x)), len(set(y))) > 1 else 0.0


def _smooth(values: list[float]) -> list[float]:
    """Centred moving average over about a twentieth of the curve, narrower at its ends."""
    half = max(1, len(values) // 40)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(w) / len(w) for w in windows]


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")
