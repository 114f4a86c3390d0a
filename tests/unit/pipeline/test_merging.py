"""A study's merge method: which options each has, and that the search and the tool know the same."""

from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from megatron_demix.errors import ConfigError
from megatron_demix.merge.methods import Linear
from megatron_demix.merge.rules import Rule
from megatron_demix.merge.sparse import THINNINGS, Sparse
from megatron_demix.merge.spherical import COEFFICIENTS, Spherical
from megatron_demix.pipeline.merging import method_of
from megatron_demix.study.choices import MERGE_OPTIONS, MergeMethod
from megatron_demix.study.merging import MergeSpec

BASE = Path("base")


def test_every_method_there_is_can_be_named():
    assert set(get_args(MergeMethod)) == set(MERGE_OPTIONS) == {"linear", *COEFFICIENTS, *THINNINGS}


def test_rules_of_a_study():
    spec = MergeSpec(rules=[{"layers": "0-3", "scale": 1.2}, {"tensors": "embedding.*", "weights": {"code": 1.0}}])
    rules = (Rule("*", (0, 3), scale=1.2), Rule("embedding.*", weights=(("code", 1.0),)))
    assert method_of(spec, BASE, 7) == Linear(BASE, rules=rules)
    with pytest.raises(ConfigError, match=r"merge.rules of the study, rule 1: give either scale or weights"):
        method_of(MergeSpec(rules=[{"layers": 3}]), BASE, 7)


def test_the_base_is_used_where_deltas_are():
    assert method_of(MergeSpec(), BASE, 7) == Linear()
    assert method_of(MergeSpec(scale=1.5), BASE, 7) == Linear(BASE, 1.5)
    assert method_of(MergeSpec(method="karcher"), BASE, 7) == Spherical(None, "karcher")
    assert method_of(MergeSpec(method="multislerp", from_base=True), BASE, 7) == Spherical(BASE, "multislerp")
    assert method_of(MergeSpec(method="ties", density=0.3), BASE, 7) == Sparse(BASE, "ties", density=0.3)
    della = MergeSpec(method="della", density=0.5, epsilon=0.2, scale=1.2)
    assert method_of(della, BASE, 7) == Sparse(BASE, "della", density=0.5, epsilon=0.2, scale=1.2, seed=7)


@pytest.mark.parametrize(
    ("section", "match"),
    [
        ({"density": 0.5}, r"merge.density: method linear has no density; its options are scale"),
        ({"method": "karcher", "scale": 1.5}, r"merge.scale: method karcher has no scale"),
        ({"method": "linear", "from_base": True}, r"merge.from_base: method linear has no from_base"),
        (
            {"method": "dare_ties", "density": 0.5, "gamma": 0.1},
            r"has no gamma; its options are scale, density \[",
        ),
        ({"method": "ties"}, r"merge.density: method ties needs the share of each delta that stays"),
        ({"method": "della", "density": 0.9}, r"merge.epsilon: density 0.9 - 0.15 and \+ 0.15 must lie in"),
        ({"method": "della", "density": 0.9, "epsilon": 0.1}, r"merge.epsilon: density 0.9 - 0.1 and \+ 0.1 must lie in"),
        ({"method": "slerp"}, r"Input should be 'linear', 'multislerp'"),
    ],
)
def test_what_a_study_may_not_say(section, match):
    with pytest.raises(ValidationError, match=match):
        MergeSpec(**section)
