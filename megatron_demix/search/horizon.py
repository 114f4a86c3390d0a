"""Scores at a longer horizon than was trained: on a line in the logarithm of the length, through scores after parts of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NOISY = 1.5
"""A line that multiplies noise by more than this is warned of: with 1.6 times, scores ranked mixtures worse than without a line
in benchmarks/rank_consistency.py."""


@dataclass(frozen=True, eq=False)
class Line:
    """A score at `horizon` is coefficients_P @ its values after the lengths_P, P >= 2 of them ascending, all in one unit."""

    lengths_P: Sequence[int]
    horizon: int

    @property
    def coefficients_P(self) -> np.ndarray:
        """Of the least-squares line; they sum to 1. Those of short runs are negative where the line is continued."""
        logs_P = np.log(np.asarray(self.lengths_P, np.float64))
        design_P2 = np.stack([np.ones_like(logs_P), logs_P], axis=1)
        return np.array([1.0, np.log(self.horizon)]) @ np.linalg.pinv(design_P2)

    @property
    def facts(self) -> dict[str, Any]:
        """For fit.json."""
        coefficients = dict(zip(map(str, self.lengths_P), self.coefficients_P.tolist(), strict=True))
        return {"iterations": self.horizon, "coefficients": coefficients, "noise": self.noise}

    @property
    def noise(self) -> float:
        """What it multiplies the standard deviation of noise by that is equally large, and independent, after all lengths."""
        return float(np.linalg.norm(self.coefficients_P))

    def __str__(self) -> str:
        """In words."""
        *before, last = map(str, self.lengths_P)
        return (
            f"scores after {', '.join(before)} and {last} iterations, continued on a line in their logarithm to "
            f"{self.horizon}, with {self.noise:.1f} times the noise"
        )

    @property
    def warning(self) -> str | None:
        if self.noise <= NOISY:
            return None
        return (
            f"search.extrapolate multiplies the noise of scores by {self.noise:.1f}. More than {NOISY:g} may cost more than "
            "the line wins: train components for longer, take parts farther from the end, or take it out."
        )
