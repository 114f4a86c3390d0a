"""Stacks of merged and interpolated scores, on a score whose every value is known."""

import numpy as np
import pytest

from megatron_demix.search.mixing_law import MixingLaw
from megatron_demix.search.proxy_score import Curves, part_of_merged

MERGED_M = np.array([2.0, 1.0, 1.5])
AVERAGED_M = np.array([2.0, 2.5, 2.75])


@pytest.mark.parametrize(
    ("trained", "part"),
    [
        (1.0, 1.0),  # as the merge has it
        (2.5, 0.0),  # as the average has it
        (2.2, 0.2),
        (0.5, 1.0),  # beyond the merge: no farther than it
        (3.0, 0.0),
    ],
)
def test_the_trained_centroid_says_how_much_is_merged(trained, part):
    """The second mixture is the centroid; the law goes through it, too."""
    found = part_of_merged(AVERAGED_M[1], MERGED_M[1], trained)
    assert found == pytest.approx(part)
    law_M = np.array([2.0, trained, 2.4])
    stacked_M = Curves(MixingLaw(), found).stacked(law_M, AVERAGED_M, MERGED_M)
    assert stacked_M == pytest.approx((law_M + part * MERGED_M + (1 - part) * AVERAGED_M) / 2)
    if 1 <= trained <= 2.5:
        assert stacked_M[1] == pytest.approx(trained)


def test_a_centroid_where_both_agree_says_nothing():
    assert part_of_merged(2.5, 2.5, 2.0) == 0.5
