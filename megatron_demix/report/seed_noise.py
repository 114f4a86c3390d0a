"""What another seed alone would change: the noise that differences between runs are compared with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class SeedNoise:
    """sd: standard deviation of one run, pooled over groups of runs that differ in their seeds alone. freedom: its degrees of
    freedom, runs less groups."""

    sd: float
    freedom: int

    @classmethod
    def of(cls, groups: Iterable[Sequence[float]]) -> SeedNoise | None:
        """None where no group has two runs."""
        known = [(len(values) - 1, sd) for values in groups if (sd := standard_deviation(values)) is not None]
        if not (freedom := sum(n for n, _ in known)):
            return None
        return cls(math.sqrt(math.fsum(n * sd**2 for n, sd in known) / freedom), freedom)

    def half_interval(self, runs: int, others: int) -> float:
        """Half the width of Student's interval of a difference between the means of so many runs and of so many others."""
        from scipy.special import stdtrit  # scipy.stats takes over a second to import

        return float(stdtrit(self.freedom, 0.5 + CONFIDENCE / 2)) * self.sd * math.sqrt(1 / runs + 1 / others)


def standard_deviation(values: Sequence[float]) -> float | None:
    """Of a sample (n - 1); None for fewer than two values."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
