"""The exponential law of merge weights, on scores whose every value is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_demix.search.mixing_law import MixingLaw, law_through

SCORES_K = np.array([2.0, 4.0, 3.0])
EVEN_1K = np.full((1, 3), 1 / 3)


def test_without_a_limit_it_is_the_weighted_mean():
    assert MixingLaw().of(np.array([[0.5, 0.25, 0.25], [0, 1, 0]]), SCORES_K) == pytest.approx([2.75, 4.0])


def test_by_hand():
    """1 + 1^.5 3^.5: half of the way in logarithms, from the limit on."""
    assert MixingLaw(1.0).of(np.array([[0.5, 0.5, 0]]), SCORES_K) == pytest.approx([1 + 3**0.5])
    # Upwards, towards a limit above.
    assert MixingLaw(5.0).of(np.array([[0.5, 0.5, 0]]), SCORES_K) == pytest.approx([5 - 3**0.5])


@pytest.mark.parametrize("centroid", [2.6, 2.9, 2.999, 3.001, 3.2, 3.4])
def test_it_goes_through_every_component_and_the_centroid(centroid):
    law = law_through(SCORES_K, centroid)
    assert law.of(np.eye(3), SCORES_K) == pytest.approx(SCORES_K)
    assert law.of(EVEN_1K, SCORES_K) == pytest.approx([centroid])


def test_a_known_law_is_found_again():
    weights_MK = np.random.default_rng(0).dirichlet([1, 1, 1], 50)
    true = MixingLaw(1.3)
    found = law_through(SCORES_K, true.of(EVEN_1K, SCORES_K)[0])
    assert found.limit == pytest.approx(1.3)
    assert found.of(weights_MK, SCORES_K) == pytest.approx(true.of(weights_MK, SCORES_K))


def test_a_centroid_that_no_law_has_bends_as_far_as_it_may():
    """Better than every component: the limit stays a twentieth of their range below the best."""
    assert law_through(SCORES_K, 1.0).limit == pytest.approx(1.9)
    assert law_through(SCORES_K, 9.0).limit == pytest.approx(4.1)


def test_what_does_not_bend_is_the_mean():
    assert law_through(SCORES_K, 3.0).limit is None
    assert law_through(np.full(3, 2.0), 1.0).limit is None
    assert law_through(SCORES_K, np.nan).limit is None


def test_the_limit_is_beyond_other_components_scores():
    """Those of an earlier study, whose proxies are on the same law."""
    others = np.array([1.0, 3.5])
    law = law_through(SCORES_K, 2.9, others)
    assert law.limit is not None
    assert law.limit < 1.0
    assert law.of(EVEN_1K, SCORES_K) == pytest.approx([2.9])
    assert np.isfinite(law.of(np.eye(2), others)).all()


@given(
    scores=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=6),
    centroid=st.floats(-1e3, 1e3),
    weights=st.lists(st.floats(0, 1), min_size=6, max_size=6),
)
def test_whatever_the_scores_mixtures_stay_among_them(scores, centroid, weights):
    scores_K = np.array(scores)
    row_K = np.array(weights[: len(scores)]) + 1e-3
    law = law_through(scores_K, centroid)
    mixed = law.of((row_K / row_K.sum())[None], scores_K)[0]
    slack = 1e-6 * (1 + np.abs(scores_K).max())
    assert scores_K.min() - slack <= mixed <= scores_K.max() + slack
    assert law.of(np.eye(len(scores)), scores_K) == pytest.approx(scores_K, abs=slack)
