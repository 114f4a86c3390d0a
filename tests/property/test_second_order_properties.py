"""Merges to second order: what the coefficients have to be, whatever components and mixtures there are."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_demix.errors import ConfigError
from megatron_demix.merge.second_order import SecondOrder


def weights(num_domains: int) -> st.SearchStrategy[np.ndarray]:
    """One point of the simplex; some entries are 0."""
    return (
        st.lists(st.integers(0, 20), min_size=num_domains, max_size=num_domains).filter(any).map(lambda n: np.array(n) / sum(n))
    )


@st.composite
def studies(draw: st.DrawFn) -> tuple[list[str], dict[str, dict[str, float]]]:
    """Domains, and mixed components of which each corrects something."""
    domains = [f"d{k}" for k in range(draw(st.integers(2, 5)))]
    rows = draw(st.lists(weights(len(domains)), min_size=1, max_size=4))
    mixed = {f"mixed{r}": dict(zip(domains, row.tolist(), strict=True)) for r, row in enumerate(rows)}
    try:
        SecondOrder(domains, mixed)
    except ConfigError:
        assume(False)
    return domains, mixed


@given(studies(), st.data())
@settings(max_examples=60, deadline=None)
def test_coefficients_sum_to_one_and_are_exact_where_something_was_trained(study, data):
    domains, mixed = study
    order = SecondOrder(domains, mixed)
    assert order.names == [*domains, *mixed]
    weights_MK = np.array([data.draw(weights(len(domains))) for _ in range(3)])
    assert order.coefficients(weights_MK).sum(axis=1) == pytest.approx(1)
    # A component's own weights give it alone, bit for bit.
    trained_RK = np.vstack([np.eye(len(domains)), [[w[d] for d in domains] for w in mixed.values()]])
    assert (order.coefficients(trained_RK) == np.eye(len(order.names))).all()
    for name, weights_K in mixed.items():
        named = {domain: weight for domain, weight in weights_K.items() if weight}
        assert order.of(weights_K) == order.of(named) == {other: float(other == name) for other in order.names}


@given(st.integers(2, 5), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_pairs_reproduce_every_quadratic_function_of_the_weights(num_domains, seed):
    rng = np.random.default_rng(seed)
    domains = [f"d{k}" for k in range(num_domains)]
    curvature_KK = rng.normal(size=(num_domains, num_domains))
    linear_K = rng.normal(size=num_domains)

    def theta(weights_MK: np.ndarray) -> np.ndarray:
        return weights_MK @ linear_K + np.einsum("mj,jk,mk->m", weights_MK, curvature_KK, weights_MK)

    pairs = {f"{a}+{b}": {a: 0.5, b: 0.5} for a, b in combinations(domains, 2)}
    trained_CK = np.vstack([np.eye(num_domains), [[pair.get(d, 0.0) for d in domains] for pair in pairs.values()]])
    weights_MK = rng.dirichlet(np.ones(num_domains), 8)
    merged_M = SecondOrder(domains, pairs).coefficients(weights_MK) @ theta(trained_CK)
    assert merged_M == pytest.approx(theta(weights_MK), abs=1e-9)


@given(st.integers(2, 6), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_the_centroid_bends_all_pairs_alike(num_domains, seed):
    """The formula of benchmarks/rank_consistency.py: 0 at a corner, 1 at the centroid, quadratic in between."""
    domains = [f"d{k}" for k in range(num_domains)]
    order = SecondOrder(domains, {"centroid": dict.fromkeys(domains, 1 / num_domains)})
    weights_MK = np.random.default_rng(seed).dirichlet(np.ones(num_domains), 8)
    far_M1 = (1 - np.square(weights_MK).sum(axis=1, keepdims=True)) / (1 - 1 / num_domains)
    expected_MC = np.hstack([weights_MK - far_M1 / num_domains, far_M1])
    assert order.coefficients(weights_MK) == pytest.approx(expected_MC, abs=1e-9)
    assert order.centroid_K == pytest.approx(np.eye(num_domains + 1)[-1])


def test_without_mixed_components_the_weights_are_left_as_they_are():
    order = SecondOrder(["a", "b"], {})
    weights_MK = np.array([[0.1, 0.9], [1 / 3, 2 / 3]])
    assert order.coefficients(weights_MK) is weights_MK
    assert order.of({"b": 0.9, "a": 0.1}) == {"b": 0.9, "a": 0.1}
    assert order.centroid_K.tolist() == [0.5, 0.5]


def test_mixtures_that_correct_nothing_are_refused():
    half, third = {"a": 0.5, "b": 0.5}, {"a": 0.25, "b": 0.75}
    for domains, mixed, message in (
        (["a", "b"], {"a": half}, "'a' has the name of a domain's"),
        (["a", "b"], {"x": {"b": 1.0}}, "'x' is of one domain alone"),
        (["a", "b"], {"x": half, "y": third}, "'y' corrects nothing beside x: the products"),
        (["a", "b", "c"], {"x": half, "y": {"b": 0.5, "c": 0.5}, "z": half}, "'z' corrects nothing beside x, y"),
    ):
        with pytest.raises(ConfigError, match=message):
            SecondOrder(domains, mixed)
