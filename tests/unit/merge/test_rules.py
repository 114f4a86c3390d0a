"""Weights and scales of certain tensors and layers: which rule counts, on disk and in memory, and what is refused."""

from dataclasses import replace

import pytest
import torch
import yaml
from dist_checkpoints import bits, read_checkpoint
from merge_models import model, per_layer, write_components

from megatron_demix.checkpoint.live import LiveTensor
from megatron_demix.errors import ConfigError
from megatron_demix.merge.engine import merge_checkpoints
from megatron_demix.merge.methods import Linear
from megatron_demix.merge.proxies import ProxyMerger
from megatron_demix.merge.rules import Rule, parse_rules, read_rules

RULES = """
- {tensors: "*.mlp.*", scale: 1.5}
- {tensors: "*", layers: 1, weights: {b: 1}}
- {tensors: "*.linear_fc2.weight", layers: 0-1, scale: 0.5}
- {tensors: "embedding.*", weights: {a: 0.25, c: 0.75}}
"""
WEIGHTS = {"even": {"a": 0.5, "b": 0.3, "c": 0.2}, "two": {"a": 0.6, "c": 0.4}}


def expected(weights):
    """The model by hand, layer by layer."""
    parts = {name: per_layer(model(i, torch.float32)) for i, name in enumerate("abc")}
    base = per_layer(model(None, torch.float32))
    result = {}
    for key, start in base.items():
        chosen, scale = weights, 1.0
        if ".mlp." in key:
            scale = 0.5 if "linear_fc2" in key else 1.5
        if "layers.1." in key:
            chosen = {"b": 1.0}
        if key.startswith("embedding"):
            chosen = {"a": 0.25, "c": 0.75}
        result[key] = start.double() + scale * sum(w * (parts[n][key].double() - start.double()) for n, w in chosen.items())
    return result


def test_the_last_rule_that_matches_counts(tmp_path):
    (tmp_path / "rules.yaml").write_text(RULES)
    parts, base = write_components(tmp_path)
    method = Linear(base, rules=read_rules(tmp_path / "rules.yaml"))
    paths = merge_checkpoints(parts, WEIGHTS, tmp_path / "out", method=method, progress=False, verify="full")
    for name, path in zip(WEIGHTS, paths, strict=True):
        stacked = read_checkpoint(path / "release")
        found = per_layer(stacked)
        for key, wanted in expected(WEIGHTS[name]).items():
            assert (found[key].double() - wanted).abs().max() < 2e-6, key
        # A pipeline stage with the second layer, in memory.
        live = [
            LiveTensor(k, tuple(v.shape), (1, *(0 for _ in v.shape[1:])), torch.zeros_like(v[1]))
            for k, v in stacked.items()
            if "layers." in k
        ]
        ProxyMerger(parts, live, method=method).merge(WEIGHTS[name])
        assert all(bits(t.tensor) == bits(stacked[t.key][1]) for t in live)


def test_components_read_by_some_layers_only_are_checked_whole(tmp_path):
    """One chunk holds both layers, and a rule takes one of them from components that the other does not use."""
    parts, _ = write_components(tmp_path, layouts=(1, 1, 1, 1))
    method = Linear(rules=(Rule("*", (1, 1), weights=(("c", 1.0),)),))
    (path,) = merge_checkpoints(parts, {"m": {"a": 1.0}}, tmp_path / "out", method=method, progress=False, verify="full")
    found, a, c = (per_layer(m) for m in (read_checkpoint(path / "release"), model(0, torch.float32), model(2, torch.float32)))
    assert all(bits(found[k]) == bits((c if "layers.1." in k else a)[k]) for k in found)


def test_rules_of_layers_leave_multi_token_prediction_alone(tmp_path):
    def with_prediction(tensors):
        return tensors | {"mtp.layers.1.enorm.weight": tensors["decoder.layers.mlp.linear_fc2.weight"][1].clone()}

    parts, base = write_components(tmp_path, change=with_prediction)
    method = Linear(base, rules=(Rule(layers=(0, 1), scale=2.0),))
    (path,) = merge_checkpoints(parts, {"m": {"a": 1.0}}, tmp_path / "out", method=method, progress=False, verify="full")
    found, a = read_checkpoint(path / "release"), with_prediction(model(0, torch.float32))
    assert bits(found["mtp.layers.1.enorm.weight"]) == bits(a["mtp.layers.1.enorm.weight"])


def test_mixtures_of_one_pass_have_rules_of_their_own(tmp_path):
    parts, base = write_components(tmp_path, layouts=(1, 2, 4, 1))
    even = {"a": 0.5, "b": 0.25, "c": 0.25}
    given = """
    - {tensors: "*.mlp.*", scale: 1.5}
    - {tensors: "*.mlp.*", mixtures: "front_*", layers: 0, weights: {b: 1}}
    - {tensors: "embedding.*", mixtures: front_2, scale: 0.5}
    """
    rules = parse_rules(yaml.safe_load(given), "x")
    assert parse_rules([rule.describe() for rule in rules], "y") == rules
    mixtures = {"plain": even, "front_1": even, "front_2": {"c": 1.0}}
    method = Linear(base, rules=rules)
    paths = merge_checkpoints(parts, mixtures, tmp_path / "out", method=method, progress=False, verify="full")

    # The same, each by itself with rules for all mixtures, byte for byte: no provenance holds the rules of others.
    own = {"plain": rules[:1], "front_1": rules[:2], "front_2": rules}
    for name, path in zip(mixtures, paths, strict=True):
        alone = Linear(base, rules=tuple(replace(rule, mixtures="*") for rule in own[name]))
        (other,) = merge_checkpoints(parts, {name: mixtures[name]}, tmp_path / "alone", method=alone, progress=False)
        files = [p.relative_to(path) for p in path.rglob("*") if p.is_file()]
        assert all((path / file).read_bytes() == (other / file).read_bytes() for file in files)
    front, plain = (per_layer(read_checkpoint(path / "release")) for path in (paths[1], paths[0]))
    assert {key for key in front if bits(front[key]) != bits(plain[key])} == {k for k in front if "layers.0.mlp." in k}

    misspelt = Linear(base, rules=(Rule(scale=2.0, mixtures="fornt_*"),))
    with pytest.raises(ConfigError, match=r"'mixtures': 'fornt_\*'.* is for none of the mixtures, such as 'plain'"):
        merge_checkpoints(parts, mixtures, tmp_path / "o", method=misspelt, progress=False)


def test_rules_survive_being_described():
    rules = parse_rules(yaml.safe_load(RULES), "x")
    assert parse_rules([rule.describe() for rule in rules], "y") == rules


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        ({"tensor": "*", "scale": 1}, r"rule 1: unknown key 'tensor'; a rule has tensors, layers, mixtures, scale, weights"),
        ("x", r"rule 1: 'x'; a rule has"),
        ({"tensors": 3, "scale": 1}, r"rule 1: tensors is 3"),
        ({"tensors": "*"}, r"rule 1: give either scale or weights"),
        ({"scale": 1, "weights": {"a": 1}}, r"rule 1: give either scale or weights"),
        ({"scale": "big"}, r"rule 1: scale is 'big'"),
        ({"scale": 1e39}, r"rule 1: scale is 1e\+39, expected a finite number"),
        ({"weights": {"a": 10**400}}, r"rule 1: weights are "),
        ({"scale": 1, "mixtures": 3}, r"rule 1: mixtures is 3, expected a pattern"),
        ({"weights": {}}, r"rule 1: weights are \{\}"),
        ({"weights": {"a": 0.5}}, r"rule 1: weights sum to 0.5, expected 1"),
        ({"scale": 1, "layers": "4-2"}, r"rule 1: layers is '4-2', expected a number or a range such as 0-11"),
    ],
)
def test_rules_that_are_refused(rule, match):
    with pytest.raises(ConfigError, match=match):
        parse_rules([rule], "rules.yaml")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("- {scale: 1, scale: 2}", r"'scale' is given twice"),
        ("- {weights: {a: 0.5, b: 0.5, a: 0.5}}", r"'a' is given twice"),
        ("- {scale: " + "9" * 5000 + "}", r"cannot be read"),
        ("[" * 5000, r"cannot be read"),
    ],
)
def test_files_that_are_refused(tmp_path, text, match):
    (tmp_path / "rules.yaml").write_text(text)
    with pytest.raises(ConfigError, match=match):
        read_rules(tmp_path / "rules.yaml")


def test_rules_that_do_not_fit_the_components(tmp_path):
    with pytest.raises(ConfigError, match=r"expected a list of rules"):
        parse_rules({"scale": 1}, "rules.yaml")
    (tmp_path / "twice.yaml").write_text("- {scale: 1, scale: 2}\n")
    with pytest.raises(ConfigError, match=r"twice.yaml: cannot be read.*'scale' is given twice"):
        read_rules(tmp_path / "twice.yaml")
    with pytest.raises(ConfigError, match=r"nowhere.yaml: cannot be read"):
        read_rules(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match=r"a rule with a scale needs a base"):
        Linear(rules=(Rule(scale=2.0),))
    parts, base = write_components(tmp_path)
    for rule, match in (
        (Rule("*.moe.*", scale=2.0), r"matches no tensor of the components, such as 'embedding.word_embeddings.weight'"),
        (Rule("*", (1, 2), scale=2.0), r"'layers': '1-2'.* is for layers that the components have not: theirs are 0-1"),
        (Rule(weights=(("d", 1.0),)), r"'d' is not a component; they are a, b, c"),
    ):
        with pytest.raises(ConfigError, match=match):
            merge_checkpoints(parts, {"m": {"a": 1.0}}, tmp_path / "o", method=Linear(base, rules=(rule,)), progress=False)


@pytest.mark.parametrize(
    ("name", "matched"),
    [
        ("decoder.layers.1.mlp.linear_fc1.weight", True),
        ("layers.1.weight", True),
        ("decoder.layers.2.mlp.linear_fc1.weight", False),
        ("decoder.final_layernorm.weight", False),
        ("mtp.layers.1.transformer_layer.mlp.linear_fc1.weight", False),
    ],
)
def test_layers_are_the_models_own(name, matched):
    assert Rule(layers=(0, 1), scale=0.5).matches(name) == matched
