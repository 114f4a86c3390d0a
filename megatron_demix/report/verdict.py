"""Did the found mixture win? The final runs' objective, compared with the seed noise, and said in one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_demix.report.data import FOUND, ReportData
from megatron_demix.report.seed_noise import CONFIDENCE, SeedNoise, standard_deviation

Outcome = Literal["won", "lost", "within noise", "unknown"]


@dataclass(frozen=True)
class Group:
    """The final runs of one mixture. objective: mean over seeds, the lower the better. sd is None with one seed."""

    mixture: str
    num_seeds: int
    objective: float
    sd: float | None


@dataclass(frozen=True)
class Comparison:
    """Found minus baseline, in the objective's unit (below 0: found is better), with its interval where the noise is known."""

    baseline: str
    difference: float
    interval: tuple[float, float] | None

    @property
    def outcome(self) -> Outcome:
        if self.interval is None:
            return "unknown"
        low, high = self.interval
        return "won" if high < 0 else "lost" if low > 0 else "within noise"


@dataclass(frozen=True)
class Verdict:
    """outcome: won = better than every baseline beyond the noise; lost = worse than one beyond the noise."""

    outcome: Outcome
    headline: str
    sentence: str
    groups: Sequence[Group]
    comparisons: Sequence[Comparison]
    noise: SeedNoise | None
    """Of the objective, pooled over the mixtures; None while each has one seed."""


def judge(data: ReportData) -> Verdict:
    """The verdict on the final runs; "unknown" while there are none to compare.

    The interval of a difference of means is Student's, with one standard deviation pooled over all mixtures (degrees of
    freedom: runs less mixtures). It covers the noise of the final runs' seeds and nothing else.
    """
    by_mixture = _objectives(data)
    groups = [Group(name, len(v), math.fsum(v) / len(v), standard_deviation(v)) for name, v in by_mixture.items()]
    if not groups:
        sentence = "No final run is finished, so nothing is known about whether the found mixture is better than a baseline."
        return Verdict("unknown", "No verdict yet", sentence, [], [], None)
    found = next((g for g in groups if g.mixture == FOUND), None)
    baselines = [g for g in groups if g.mixture != FOUND]
    if found is None or not baselines:
        measured = groups[0] if found is None else found
        sentence = (
            f"Mixture {measured.mixture}: {measured.objective:.4f} {data.final_unit}. There is nothing to compare it with."
        )
        return Verdict("unknown", "Not compared", sentence, groups, [], None)
    noise = SeedNoise.of(by_mixture.values())
    comparisons = [_compare(found, b, noise) for b in baselines]
    outcome = _overall(comparisons)
    headline = {
        "won": "The found mixture won",
        "lost": "The found mixture lost",
        "within noise": "No clear winner: within the seed noise",
        "unknown": "Compared with one seed each: the noise is unknown",
    }[outcome]
    return Verdict(
        outcome,
        headline,
        _sentence(found, baselines, comparisons, noise, data),
        groups,
        comparisons,
        noise,
    )


def _objectives(data: ReportData) -> dict[str, list[float]]:
    """Of the final runs of each mixture, the found one first."""
    by_mixture: dict[str, list[float]] = {}
    for run in sorted(data.final, key=lambda run: run.mixture != FOUND):
        by_mixture.setdefault(run.mixture, []).append(data.objective_of(run.scores))
    return by_mixture


def _compare(found: Group, baseline: Group, noise: SeedNoise | None) -> Comparison:
    difference = found.objective - baseline.objective
    if noise is None:
        return Comparison(baseline.mixture, difference, None)
    half = noise.half_interval(found.num_seeds, baseline.num_seeds)
    return Comparison(baseline.mixture, difference, (difference - half, difference + half))


def _overall(comparisons: Sequence[Comparison]) -> Outcome:
    outcomes = {c.outcome for c in comparisons}
    if "lost" in outcomes:
        return "lost"
    if "unknown" in outcomes:
        return "unknown"
    return "won" if outcomes == {"won"} else "within noise"


def _sentence(
    found: Group,
    baselines: Sequence[Group],
    comparisons: Sequence[Comparison],
    noise: SeedNoise | None,
    data: ReportData,
) -> str:
    best = min(baselines, key=lambda g: g.objective)
    against = " and ".join(f"{b.objective:.4f} ({b.mixture})" for b in baselines)
    closest = next(c for c in comparisons if c.baseline == best.mixture)
    part = ""
    if best.objective and not data.mixes_units:
        part = f" ({100 * abs(closest.difference / best.objective):.2f} %)"
    side = "better" if closest.difference < 0 else "worse"
    text = (
        f"Objective on the test split: {found.objective:.4f} {data.final_unit} with the found mixture, against {against}. "
        f"That is {abs(closest.difference):.4f}{part} {side} than {best.mixture}, the best baseline; "
    )
    if closest.interval is None or noise is None:
        return text + "with one seed each nothing says how much of it is chance. Set final.seeds to 2 or more."
    low, high = sorted(-end if closest.difference < 0 else end for end in closest.interval)
    return text + (
        f"the {CONFIDENCE:.0%} interval of that is {_signed(low)} to {_signed(high)}, from a seed standard "
        f"deviation of {noise.sd:.4f} ({_seeds([found, *baselines])}, {noise.freedom} degrees of freedom)."
    )


def _seeds(groups: Sequence[Group]) -> str:
    counts: Mapping[str, int] = {g.mixture: g.num_seeds for g in groups}
    if len(set(counts.values())) == 1:
        return f"{groups[0].num_seeds} seeds a mixture"
    return "seeds: " + ", ".join(f"{name} {n}" for name, n in counts.items())


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")
