"""Mixtures: what is refused, and the arithmetic between merge weights, actual shares and whole units."""

import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_demix.errors import MixtureError
from megatron_demix.mixture import Mixture, actual_shares, apportion

amounts = st.lists(st.floats(0, 1e9), min_size=1, max_size=8).filter(lambda a: sum(a) > 1e-3)


def mixture(values: list[float]) -> Mixture:
    return Mixture.proportional({f"d{i}": v for i, v in enumerate(values)})


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, r"^r2_017: no domains\."),
        ("x", r"^r2_017: weights are .x., expected a share for each domain by name"),
        ({"a": 0.5, "b": 0.43}, r"^r2_017: weights sum to 0\.93, expected 1 \(tolerance 1e-06\): a 0\.5, b 0\.43\."),
        ({"a": 1.5, "b": -0.5}, r"^r2_017: weight of domain 'b' is -0\.5, expected a finite number >= 0"),
        ({"a": math.nan, "b": 1.0}, "weight of domain 'a' is nan"),
        ({"a": math.inf}, "weight of domain 'a' is inf"),
        ({"a": "1"}, "weight of domain 'a' is '1'"),
        ({"a": True}, "weight of domain 'a' is True"),
        ({"a": 10**400}, "weight of domain 'a' is 1000"),
        ({"a": 1e308, "b": 1e308}, r"weight of domain 'a' is 1e\+308"),
        ({"a": None, "b": 1}, "weight of domain 'a' is None"),
    ],
)
def test_malformed_mixtures_are_refused(weights, message):
    with pytest.raises(MixtureError, match=message):
        Mixture(weights, label="r2_017")


def test_a_mixture_is_an_ordered_immutable_mapping():
    m = Mixture({"b": 0.25, "a": 0.75})
    assert list(m) == ["b", "a"]
    assert len(m) == 2
    assert m["a"] == 0.75
    assert str(m) == "b=0.25 a=0.75"
    assert repr(m) == "Mixture(b=0.25 a=0.75)"
    with pytest.raises(TypeError, match="item assignment"):
        m["a"] = 1.0
    assert pickle.loads(pickle.dumps(m)) == m


def test_equal_mixtures_have_equal_hashes_whatever_their_order():
    one, other = Mixture({"a": 0.25, "b": 0.75}), Mixture({"b": 0.75, "a": 0.25})
    assert one == other == {"a": 0.25, "b": 0.75}
    assert hash(one) == hash(other)


def test_weights_of_any_real_type_are_read():
    assert Mixture({"a": np.float32(0.25), "b": np.float64(0.75)}) == {"a": 0.25, "b": 0.75}
    assert Mixture({"a": 1, "b": Fraction(0)}) == {"a": 1.0, "b": 0.0}


def test_constructors():
    assert Mixture.uniform("ab") == {"a": 0.5, "b": 0.5}
    assert Mixture.one_hot("ab", "b") == {"a": 0.0, "b": 1.0}
    assert Mixture.proportional({"a": 3, "b": 1}) == {"a": 0.75, "b": 0.25}
    with pytest.raises(MixtureError, match=r"domain 'c' is not among \['a', 'b'\]"):
        Mixture.one_hot("ab", "c")
    for bad in ({}, {"a": 0}, {"a": math.inf}):
        with pytest.raises(MixtureError, match=r"natural: amounts .* have no positive finite sum"):
            Mixture.proportional(bad, label="natural")
    with pytest.raises(MixtureError, match=r"weight of domain 'b' is -0\.5"):
        Mixture.proportional({"a": 3, "b": -1})


def test_over_lists_all_domains_and_refuses_others():
    m = Mixture({"b": 1.0}).over(["a", "b"])
    assert list(m.items()) == [("a", 0.0), ("b", 1.0)]
    with pytest.raises(MixtureError, match="anchor: unknown domain 'b'; the domains are a, c"):
        Mixture({"b": 1.0}, label="anchor").over(["a", "c"])


@given(amounts)
def test_weights_sum_to_one(values):
    assert math.fsum(mixture(values).values()) == pytest.approx(1, abs=1e-15 * len(values))


def test_actual_shares_as_in_the_paper():
    """b = 0.5, one general domain as the anchor: domain i gets a_i / 2, general gets 1/2 + a_general / 2."""
    shares = actual_shares(Mixture({"general": 0.2, "math": 0.8}), Mixture({"general": 1.0}), 0.5)
    assert shares == {"general": pytest.approx(0.6), "math": pytest.approx(0.4)}
    alone = Mixture({"general": 0.2, "math": 0.8})
    assert actual_shares(alone, Mixture({"general": 1.0}), 0) == alone


@pytest.mark.parametrize("share", [1.0, -0.1, math.nan])
def test_anchor_shares_outside_the_range_are_refused(share):
    with pytest.raises(MixtureError, match=r"anchor share is .*, expected 0 <= share < 1"):
        actual_shares(Mixture.uniform("ab"), Mixture.uniform("ab"), share)


@given(st.integers(0, 10**13), st.lists(st.floats(0, 1e6), min_size=1, max_size=12).filter(lambda w: sum(w) > 0))
def test_apportionment_is_exact(total, weights):
    parts = apportion(total, weights)
    whole = sum(Fraction(w) for w in weights)
    assert sum(parts) == total
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part - Fraction(weight) * total / whole) < 1
        if weight == 0:
            assert part == 0


def test_apportionment_breaks_ties_in_order():
    assert apportion(5, [1, 1, 1]) == [2, 2, 1]
    assert apportion(10, [0.6, 0.3, 0.1]) == [6, 3, 1]


@pytest.mark.parametrize(
    ("total", "weights", "message"),
    [
        (-1, [1], "cannot apportion -1 units"),
        (3, [], r"by weights \[\]"),
        (3, [0, 0], "a positive sum"),
        (3, [1, -1], "all finite and >= 0"),
        (3, [math.nan, 1], "all finite"),
        (3, [math.inf], "all finite"),
    ],
)
def test_what_cannot_be_apportioned(total, weights, message):
    with pytest.raises(MixtureError, match=message):
        apportion(total, weights)
