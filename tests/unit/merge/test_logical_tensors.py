"""Logical tensors: what a fused or stacked tensor falls into, how boxes are cut by them, and when that cannot be known."""

import argparse
import math
import shutil

import numpy as np
import pytest
import torch
from dist_checkpoints import even_cuts, read_checkpoint, write_checkpoint
from merge_models import saved_arguments, write_components

from megatron_demix.checkpoint.metadata import TensorInfo
from megatron_demix.errors import ConfigError, CorruptInput, IncompatibleInputs, MixtureError
from megatron_demix.merge.engine import merge_checkpoints
from megatron_demix.merge.logical_tensors import UNKNOWN, FusedLayout, Partition
from megatron_demix.merge.methods_by_name import OPTIONS, make_method
from megatron_demix.merge.rules import Rule
from megatron_demix.merge.spherical import karcher, multislerp

KNOWN = FusedLayout(num_query_groups=2, kv_channels=3, swiglu=True)


def partition(layout=KNOWN, **shapes):
    return Partition({k: TensorInfo(k, "float32", v, ()) for k, v in shapes.items()}, layout)


def names(layout=KNOWN, **shapes):
    return [p.name for p in partition(layout, **shapes).parts()]


def test_names_are_those_of_single_layers_and_experts():
    assert names(**{"decoder.layers.mlp.linear_fc2.weight": (2, 4, 4)}) == [
        "decoder.layers.0.mlp.linear_fc2.weight",
        "decoder.layers.1.mlp.linear_fc2.weight",
    ]
    assert names(**{"decoder.layers.7.mlp.linear_fc2.weight": (4, 4)}) == ["decoder.layers.7.mlp.linear_fc2.weight"]
    experts = "decoder.layers.{}mlp.experts.experts.{}linear_fc1.weight"
    stacked = names(**{experts.format("", ""): (2, 3, 8, 4)})
    assert stacked[:2] == [experts.format("0.", "0.") + "[gate]", experts.format("0.", "0.") + "[up]"]
    assert stacked[-1] == experts.format("1.", "2.") + "[up]"
    assert names(**{experts.format("5.", "1."): (8, 4)}) == [experts.format("5.", "1.") + f"[{n}]" for n in ("gate", "up")]


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("decoder.layers.self_attention.linear_qkv.weight", (2, 24, 5)),
        ("decoder.layers.1.self_attention.linear_qkv.bias", (24,)),
        ("decoder.layers.mlp.experts.experts.linear_fc1.weight", (2, 2, 6, 3)),
        ("decoder.layers.scale", (3,)),
        ("output_layer.weight", (7, 4)),
        ("scalar", ()),
    ],
)
def test_every_element_is_numbered_once_in_its_part(key, shape):
    """Any tiling by boxes covers each part's elements exactly once, and numbers them in the order of the gathered rows."""
    split = partition(**{key: shape})
    whole = np.arange(math.prod(shape)).reshape(shape)
    expected = {}
    for number, part in enumerate(split.parts()):
        gathered = [whole[tuple(slice(o, o + n) for o, n in zip(o, n, strict=True))].ravel() for o, n, _ in part.boxes()]
        expected[number] = np.concatenate(gathered)
        assert len(expected[number]) == math.prod(part.shape)
    found = {number: np.full(len(e), -1) for number, e in expected.items()}
    step = 5 if shape else 1
    for corner in np.ndindex(tuple((n + step - 1) // step for n in shape)):
        offset = tuple(c * step for c in corner)
        size = tuple(min(step, n - o) for n, o in zip(shape, offset, strict=True))
        for cut in split.cut(key, offset, size):
            for at in np.ndindex(tuple(b - a for a, b in zip(cut.lo, cut.hi, strict=True))):
                index = cut.index + sum(i * s for i, s in zip(at, cut.index_strides, strict=True))
                assert found[cut.part][index] == -1
                found[cut.part][index] = whole[tuple(a + i for a, i in zip(cut.lo, at, strict=True))]
    assert all(np.array_equal(found[n], e) for n, e in expected.items())


def test_what_megatrons_arguments_say():
    arguments = {"num_attention_heads": 8, "hidden_size": 64, "num_query_groups": 1, "swiglu": False}
    assert FusedLayout.of_arguments(arguments) == FusedLayout(8, 8, False)
    grouped = arguments | {"group_query_attention": True, "num_query_groups": 2, "kv_channels": 16, "swiglu": True}
    assert FusedLayout.of_arguments(grouped) == FusedLayout(2, 16, True)
    assert FusedLayout.of_arguments({"num_query_groups": True, "hidden_size": "64"}) == UNKNOWN
    assert FusedLayout(8, None, False).with_known(FusedLayout(kv_channels=4)) == FusedLayout(8, 4, False)


def test_what_is_unknown_or_does_not_fit_is_refused():
    qkv, fc1 = "decoder.layers.self_attention.linear_qkv.weight", "decoder.layers.mlp.linear_fc1.weight"
    with pytest.raises(ConfigError, match=r"linear_qkv.weight': how its rows interleave .* Give --num-query-groups"):
        partition(UNKNOWN, **{qkv: (2, 24, 8)})
    with pytest.raises(ConfigError, match=r"linear_fc1.weight': whether its rows .* Say --swiglu or --no-swiglu"):
        partition(UNKNOWN, **{fc1: (2, 24, 8)})
    with pytest.raises(IncompatibleInputs, match=r"has 25 rows, which are not 2 query groups"):
        partition(**{qkv: (2, 25, 8)})
    with pytest.raises(IncompatibleInputs, match=r"has 7 rows, which are no gate and up halves"):
        partition(**{fc1: (2, 7, 8)})
    assert len(names(None, **{qkv: (2, 25, 8), fc1: (2, 7, 8)})) == 4


def test_what_is_given_may_add_to_what_was_saved_and_not_contradict_it():
    saved = FusedLayout(num_query_groups=2, swiglu=True)
    assert saved.with_known(FusedLayout(kv_channels=3)) == KNOWN
    with pytest.raises(ConfigError, match="num_query_groups is 1 as given, but the components were saved with 2"):
        saved.with_known(FusedLayout(num_query_groups=1))
    with pytest.raises(ConfigError, match="kv_channels is 0, expected at least 1"):
        FusedLayout(kv_channels=0)


def test_attention_with_an_output_gate_cannot_be_told_apart(tmp_path):
    arguments = saved_arguments()
    arguments["args"].attention_output_gate = True
    parts, _ = write_components(tmp_path, common=arguments)
    with pytest.raises(IncompatibleInputs, match="output gate"):
        merge_checkpoints(parts, {"m": {"a": 1.0}}, tmp_path / "out", method=make_method("karcher"), progress=False)
    merge_checkpoints(parts, {"m": {"a": 1.0}}, tmp_path / "out", progress=False)


def test_a_merge_that_needs_the_layout_says_so_and_takes_it(tmp_path):
    parts, base = write_components(tmp_path, common={"iteration": 1})
    mixture = {"m": {"a": 0.5, "b": 0.25, "c": 0.25}}
    for name in ("multislerp", "ties", "della"):
        options = {"density": 0.5} if "density" in OPTIONS[name] else {}
        with pytest.raises(ConfigError, match=r"does not hold Megatron's arguments"):
            merge_checkpoints(parts, mixture, tmp_path / name, method=make_method(name, base, **options), progress=False)
        method = make_method(name, base, layout=KNOWN, **options)
        merge_checkpoints(parts, mixture, tmp_path / name, method=method, progress=False)
    for name in ("linear", "dare_ties"):
        options = {"density": 0.5} if "density" in OPTIONS[name] else {}
        merge_checkpoints(parts, mixture, tmp_path / name, method=make_method(name, base, **options), progress=False)


def test_options_that_a_method_does_not_have_or_needs():
    with pytest.raises(ConfigError, match=r"method 'slerp' is not one of linear, multislerp"):
        make_method("slerp")
    with pytest.raises(ConfigError, match=r"method linear has no density: its options are scale"):
        make_method("linear", density=0.5)
    with pytest.raises(ConfigError, match=r"method karcher has no seed: it has no options"):
        make_method("karcher", seed=1)
    with pytest.raises(ConfigError, match=r"method ties needs a density"):
        make_method("ties", "x")
    with pytest.raises(ConfigError, match=r"ties needs a base"):
        make_method("ties", density=0.5)
    with pytest.raises(ConfigError, match=r"density is 1.5, expected a share in \(0, 1\]"):
        make_method("ties", "x", density=1.5)
    with pytest.raises(ConfigError, match=r"gamma is -1"):
        make_method("breadcrumbs", "x", density=0.5, gamma=-1)
    with pytest.raises(ConfigError, match=r"epsilon is 0.3: .* it must be below 0.2"):
        make_method("della", "x", density=0.8, epsilon=0.3)
    with pytest.raises(ConfigError, match=r"scale is inf"):
        make_method("ties", "x", density=0.5, scale=math.inf)


def test_means_that_do_not_exist(tmp_path):
    opposite = np.array([[1.0, -1.0], [-1.0, 1.0]])
    assert multislerp(np.array([0.5, 0.5]), opposite).tolist() == [0.5, 0.5]  # the line between two

    def negated(tensors):
        return {k: -v for k, v in tensors.items()}

    parts, _ = write_components(tmp_path / "x")
    other, _ = write_components(tmp_path / "y", change=negated)
    pairs = parts | {f"minus_{n}": p for n, p in other.items()}
    even = dict.fromkeys(pairs, 1 / 6)
    for name in ("multislerp", "karcher"):
        with pytest.raises(MixtureError, match=rf"{name} of '.*': the components, at these weights, cancel. Use the linear"):
            merge_checkpoints(pairs, {"m": even}, tmp_path / name, method=make_method(name), progress=False)
    negative = {"m": {"a": 1.5, "b": -0.5}}
    with pytest.raises(MixtureError, match=r"karcher of '.*': a weight is negative"):
        merge_checkpoints(parts, negative, tmp_path / "n", method=make_method("karcher"), normalize="off", progress=False)

    def spoil(tensors):
        tensors["decoder.final_layernorm.weight"][0] = math.nan
        return tensors

    spoiled, _ = write_components(tmp_path / "z", change=spoil)
    with pytest.raises(CorruptInput, match=r"component 'b': 'decoder.final_layernorm.weight' holds NaN or infinity"):
        merge_checkpoints(
            parts | {"b": spoiled["b"]},
            {"m": {"a": 0.5, "b": 0.5}},
            tmp_path / "o",
            method=make_method("multislerp"),
            progress=False,
        )


@pytest.mark.parametrize("name", ["multislerp", "karcher"])
def test_opposite_numbers_are_merged_as_numbers(tmp_path, name):
    """A tensor of one element has no direction but its sign, and must not keep all others from being merged."""
    numbers = iter([2.0, -0.5, -3.0, 0.0])

    def with_a_number(tensors):
        return tensors | {"decoder.gate": torch.tensor([next(numbers)])}

    parts, _ = write_components(tmp_path / "x", change=with_a_number)
    mixture = {"a": 0.5, "b": 0.25, "c": 0.25}
    method = make_method(name)
    (path,) = merge_checkpoints(parts, {"m": mixture}, tmp_path / "o", method=method, progress=False, verify="full")
    assert read_checkpoint(path / "release")["decoder.gate"].item() == 0.5 * 2 - 0.25 * 0.5 - 0.25 * 3
    alike = np.outer([2.0, 3.0], [2.0, 3.0])
    assert karcher(np.array([0.25, 0.75]), alike).tolist() == [0.25, 0.75]


def test_tensors_without_a_direction():
    """Zero vectors (biases, deltas of frozen tensors) have nothing to turn: all methods give zero, and one vector is itself."""
    zero = np.zeros((2, 2))
    weights = np.array([0.25, 0.75])
    assert multislerp(weights, zero).tolist() == karcher(weights, zero).tolist() == weights.tolist()
    for mean in (multislerp, karcher):
        assert mean(np.array([0.0, 1.0]), np.array([[4.0, 1.0], [1.0, 9.0]])).tolist() == [0.0, 1.0]
    half = karcher(weights, np.array([[4.0, 0.0], [0.0, 0.0]]))
    assert half[0] == pytest.approx(0.25)


def test_half_precision_components_are_compared_as_they_are_stored(tmp_path):
    """Thresholds of bf16 deltas have many equals; those equal to the threshold all stay."""
    parts, base = write_components(tmp_path, torch.bfloat16)
    method = make_method("ties", base, density=0.2)
    merge_checkpoints(parts, {"m": {"a": 1.0}}, tmp_path / "out", method=method, progress=False, verify="full")


LATENT = {"multi_latent_attention": True, "qk_head_dim": 3, "v_head_dim": 2, "kv_lora_rank": 4}
UP, DOWN = (f"decoder.layers.self_attention.linear_kv_{which}_proj.weight" for which in ("up", "down"))


def latent_components(tmp_path, arguments=LATENT):
    """Two components and their base, with 4 heads, cut by 2 ranks."""
    common = {"args": argparse.Namespace(num_attention_heads=4, swiglu=False, **arguments)}
    draw = torch.Generator().manual_seed(1)
    return {
        name: write_checkpoint(
            tmp_path / name,
            {UP: torch.randn(2, 20, 4, generator=draw), DOWN: torch.randn(2, 6, 8, generator=draw)},
            {UP: even_cuts((2, 20, 4), (2, 2, 1)), DOWN: even_cuts((2, 6, 8), (1, 2, 1))},
            common=common,
        )
        for name in ("a", "b", "origin")
    }


@pytest.mark.parametrize("method", ["multislerp", "ties"])
def test_keys_and_values_of_latent_attention(tmp_path, method):
    """With the oracle, and with heads and rows cut out by hand: a layer's keys alone are what they would be by themselves."""
    parts = latent_components(tmp_path)
    models = {name: read_checkpoint(path) for name, path in parts.items()}
    options = {"density": 0.5} if method == "ties" else {}
    chosen = make_method(method, parts.pop("origin"), layout=FusedLayout(), **options)
    mixture = {"m": {"a": 0.5, "b": 0.5}}
    (path,) = merge_checkpoints(parts, mixture, tmp_path / "out", method=chosen, progress=False, verify="full")
    merged = read_checkpoint(path / "release")
    cut = {
        "k": lambda model: model[UP].view(2, 4, 5, 4)[1, :, :3].reshape(12, 4),
        "v": lambda model: model[UP].view(2, 4, 5, 4)[1, :, 3:].reshape(8, 4),
        "kv": lambda model: model[DOWN][1, :4],
        "k_pos": lambda model: model[DOWN][1, 4:],
    }
    alone = {
        name: write_checkpoint(tmp_path / "alone" / name, {f"{part}.weight": of(model).clone() for part, of in cut.items()})
        for name, model in models.items()
    }
    chosen = make_method(method, alone.pop("origin"), layout=FusedLayout(), **options)
    (path,) = merge_checkpoints(alone, mixture, tmp_path / "parts", method=chosen, progress=False)
    expected = read_checkpoint(path / "release")
    for part, of in cut.items():
        assert torch.equal(of(merged), expected[f"{part}.weight"]), part


def test_methods_that_tell_no_tensors_apart_need_no_sizes_of_latent_attention(tmp_path):
    parts = latent_components(tmp_path, {})
    base = parts.pop("origin")
    rules = [Rule(tensors="*_up_proj.*", scale=0.5)]
    for name, options in {"dare_ties": {"density": 0.5}, "linear": {"rules": rules}}.items():
        method = make_method(name, base, **options)
        merge_checkpoints(parts, {"m": {"a": 0.5, "b": 0.5}}, tmp_path / name, method=method, progress=False, verify="full")


def test_latent_attention_whose_sizes_are_not_known_or_do_not_fit(tmp_path):
    base = tmp_path / "x" / "origin"
    for arguments, error, says in (
        ({}, ConfigError, "how its rows fuse keys and values is not known"),
        (LATENT | {"v_head_dim": 4}, IncompatibleInputs, "has 20 rows, which do not fit qk_head_dim 3, v_head_dim 4"),
        (LATENT | {"kv_lora_rank": 6}, IncompatibleInputs, "has 6 rows, which do not fit .* kv_lora_rank 6"),
    ):
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        parts = latent_components(tmp_path / "x", arguments)
        parts.pop("origin")
        with pytest.raises(error, match=says):
            merge_checkpoints(
                parts, {"m": {"a": 1.0}}, tmp_path / "out", method=make_method("ties", base, density=0.5), progress=False
            )
        merge_checkpoints(parts, {"m": {"a": 1.0}}, tmp_path / f"linear{says[4:6]}", progress=False)
