"""What counts as a proxy's score: the merged model's, what its components' scores say of its weights, or a stack of the two.

Merging and interpolating err in different ways: a merge loses what the components do not share, and averages of their scores
miss all that domains do for one another. One model that was trained on the centroid mixture says how much of each. Ways to use
it are compared in benchmarks/rank_consistency.py. Averaged probabilities (megatron_demix.evaluate.ensemble) are another kind.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_demix.search.mixing_law import MixingLaw

REVISION = 2
"""Of what Curves makes of scores; part of the key of every fit that has them."""


@dataclass(frozen=True)
class Curves:
    """Of one score, two curves through every component's score and the trained centroid's.

    law: one bent exponentially. merged_part: the other is bent as merging bends: this part of the way from the components'
    scores, averaged with the merge weights, to the merged model's.
    """

    law: MixingLaw
    merged_part: float

    @property
    def facts(self) -> dict[str, float | None]:
        """For fit.json."""
        return {"limit": self.law.limit, "merged_part": self.merged_part}

    def stacked(self, law_M: np.ndarray, averaged_M: np.ndarray, merged_M: np.ndarray) -> np.ndarray:
        """The mean of both."""
        return (law_M + averaged_M + self.merged_part * (merged_M - averaged_M)) / 2


def part_of_merged(averaged: float, merged: float, trained: float) -> float:
    """How far the trained centroid lies between the components' averaged and the merged one; never beyond either."""
    gap = merged - averaged
    return float(np.clip((trained - averaged) / gap, 0, 1)) if gap else 0.5
