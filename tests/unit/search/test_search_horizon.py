"""Lines in the logarithm of the length, on scores that lie on one."""

import numpy as np
import pytest

from megatron_demix.search.horizon import NOISY, Line


@pytest.mark.parametrize("lengths_P", [[500, 1000], [125, 500, 1000], [10, 20, 40, 80]])
def test_what_lies_on_a_line_is_continued_on_it(lengths_P):
    values_PM = np.outer(np.log(lengths_P), [-0.3, 0.2]) + np.array([4.0, 1.0])
    line = Line(lengths_P, 5000)
    assert line.coefficients_P @ values_PM == pytest.approx(np.log(5000) * np.array([-0.3, 0.2]) + [4.0, 1.0])
    assert line.coefficients_P.sum() == pytest.approx(1)


def test_two_scores_give_the_line_through_both():
    # To four times the length from half of it: two doublings, each of which adds the last difference.
    assert Line([50, 100], 400).coefficients_P == pytest.approx([-2, 3])
    assert Line([50, 100], 100).coefficients_P == pytest.approx([0, 1])


def test_noise_is_that_of_the_coefficients():
    line = Line([50, 100], 400)
    draws = np.random.default_rng(0).normal(size=(2, 100_000))
    assert line.noise == pytest.approx(np.sqrt(13))
    assert (line.coefficients_P @ draws).std() == pytest.approx(line.noise, rel=0.02)
    assert "with 3.6 times the noise" in str(line)
    assert "multiplies the noise of scores by 3.6" in line.warning
    # Parts farther from the end are quieter.
    quiet = Line([10, 100], 200)
    assert quiet.noise < NOISY
    assert quiet.warning is None
