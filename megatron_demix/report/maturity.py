"""Whether the merged centroid is as good as models trained on its mixture, or the base branched too early."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_demix.report.data import ReportData
from megatron_demix.report.seed_noise import SeedNoise
from megatron_demix.report.selection import listed


@dataclass(frozen=True)
class Gap:
    """One score. gap: of the merged centroid to the mean of the trained ones, positive where merging is worse.

    interval: of the gap, from the seeds' standard deviation pooled over all scores of its unit (those of which less is better
    are bits per byte, the others parts of all answers); None with one seed. kept: the part of what training won over the base
    that survived merging; None where training won nothing.
    """

    score: str
    merged: float
    trained: float
    gap: float
    interval: tuple[float, float] | None
    kept: float | None

    @property
    def beyond_noise(self) -> bool:
        return self.interval is not None and self.interval[0] > 0


def gaps(data: ReportData) -> list[Gap]:
    """By score that all models have, in the order of the table; empty where the study has no such check."""
    check = data.maturity
    if check is None:
        return []
    models = [check.merged, check.base, *check.trained]
    seeds = {s: [row[s] for row in check.trained] for s in check.merged if all(s in row for row in models)}
    of_unit = {more: [v for score, v in seeds.items() if (score in data.higher_is_better) == more] for more in (False, True)}
    noises = {more: SeedNoise.of(values) for more, values in of_unit.items()}
    found = []
    for score, values in seeds.items():
        more = score in data.higher_is_better
        sign, noise = (-1.0 if more else 1.0), noises[more]
        mean = math.fsum(values) / len(values)
        gap = sign * (check.merged[score] - mean)
        won = sign * (check.base[score] - mean)
        # The merged centroid, too, is one of many that other seeds would have given.
        half = noise.half_interval(1, len(values)) if noise else None
        interval = (gap - half, gap + half) if half is not None else None
        found.append(Gap(score, check.merged[score], mean, gap, interval, 1 - gap / won if won > 0 else None))
    return found


def maturity_warning(data: ReportData) -> str | None:
    """What to do where a score of the objective did not survive merging."""
    worse = [g for g in gaps(data) if g.beyond_noise and data.objective.get(g.score)]
    if not worse:
        return None
    scores = listed([f"{g.score} by {g.gap:.4f}" for g in worse])
    mixed = data.maturity is not None and data.maturity.is_mixed
    which, where = (" without component.mixed", "away from the mixed components") if mixed else ("", "there")
    return (
        f"The merged centroid{which} is worse than models trained on its mixture, beyond the seed noise: {scores}. What forms "
        f"after branching does not survive averaging, so proxies may rank mixtures wrongly {where}. Branch from a base trained "
        "for longer, train components for less, or train the proxies (search.proxies: trained)."
    )
