"""Stacks of merged and interpolated scores, on a score whose every value is known."""

import numpy as np
import pytest

from megatron_demix.search.proxy_score import Centroid, part_of_merged, stacked

MERGED_M = np.array([2.0, 1.0, 1.5])
INTERPOLATED_M = np.array([2.0, 2.5, 2.75])


def test_a_stack_is_the_mean_until_the_centroid_is_known():
    assert stacked(INTERPOLATED_M, MERGED_M) == pytest.approx((MERGED_M + INTERPOLATED_M) / 2)


@pytest.mark.parametrize(
    ("trained", "part"),
    [
        (1.0, 1.0),  # as the merge has it
        (2.5, 0.0),  # as interpolation has it
        (2.2, 0.2),
        (0.5, 1.0),  # beyond the merge: no farther than it
        (3.0, 0.0),
    ],
)
def test_the_trained_centroid_says_how_much_of_each(trained, part):
    centroid = Centroid(merged=1.0, trained=trained)
    stacked_M = stacked(INTERPOLATED_M, MERGED_M, part_of_merged(INTERPOLATED_M[1], centroid))
    assert stacked_M == pytest.approx(part * MERGED_M + (1 - part) * INTERPOLATED_M)
    assert stacked_M[1] == pytest.approx(min(max(trained, 1.0), 2.5))


def test_a_centroid_where_both_agree_says_nothing():
    assert part_of_merged(2.5, Centroid(merged=2.5, trained=2.0)) == 0.5
