"""What a linear surrogate computes without a table of its features is what the table gives."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_demix.search.linear import Features, _Curve


@settings(max_examples=100, deadline=None)
@given(st.booleans(), st.booleans(), st.integers(2, 40), st.integers(1, 30), st.floats(0.02, 5), st.integers(0, 2**32 - 1))
def test_products_and_sums_are_those_of_the_features(pairs, logs, domains, num, concentration, seed) -> None:
    rng, features = np.random.default_rng(seed), Features(pairs, logs)
    left_ND, right_MD = (rng.dirichlet(np.full(domains, concentration), rows) for rows in (50, num))
    weights_M = rng.standard_normal(num)
    left_NP, right_MP = features(left_ND), features(right_MD)
    # Rounding grows with the summed magnitudes, not with the sums, in which logarithms cancel.
    bound = 1e-14 * np.abs(left_NP).max() * np.abs(right_MP).max() * left_NP.shape[1]
    np.testing.assert_allclose(features.products(left_ND, right_MD), left_NP @ right_MP.T, rtol=0, atol=bound)
    np.testing.assert_allclose(features.squares(left_ND), np.square(left_NP).sum(axis=1), rtol=1e-12)
    expected_N = left_NP @ (right_MP.T @ weights_M)
    np.testing.assert_allclose(
        _Curve(features, right_MD, weights_M)(left_ND), expected_N, rtol=0, atol=bound * np.abs(weights_M).sum()
    )
