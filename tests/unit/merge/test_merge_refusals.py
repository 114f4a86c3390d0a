"""Merging checkpoints on disk: components, weights and settings that do not fit one another."""

import argparse
import pickle

import pytest
import torch
from dist_checkpoints import (
    parallel_cuts,
    small_model,
    three_components,
    write_checkpoint,
)
from refused_merges import refuse

from megatron_demix.errors import (
    ConfigError,
    CorruptInput,
    IncompatibleInputs,
    MixtureError,
)
from megatron_demix.merge.engine import merge_checkpoints

WEIGHTS = {"a": 0.5, "b": 0.25, "c": 0.25}


@pytest.fixture
def parts(tmp_path):
    return three_components(tmp_path)


def test_components_of_different_models(parts, tmp_path):
    model = small_model(3)
    narrow = write_checkpoint(tmp_path / "n", model | {"decoder.final_layernorm.weight": torch.ones(4).bfloat16()})
    refuse(
        IncompatibleInputs,
        r"shape \(8,\) in 'a' and \(4,\) in 'n'. Their architectures differ",
        parts | {"n": narrow},
        tmp_path,
    )
    vocabulary = write_checkpoint(tmp_path / "v", model | {"embedding.word_embeddings.weight": torch.ones(128, 8).bfloat16()})
    refuse(
        IncompatibleInputs,
        r"\(96, 8\) in 'a' and \(128, 8\) in 'v'. The vocabularies differ",
        parts | {"v": vocabulary},
        tmp_path,
    )
    wide = write_checkpoint(tmp_path / "f", small_model(3, torch.float32))
    refuse(
        IncompatibleInputs,
        "is bfloat16 in 'a' and float32 in 'f'. Say in which type the merge is to be written \\(--dtype\\), or save all",
        parts | {"f": wide},
        tmp_path,
    )
    more = write_checkpoint(tmp_path / "m", model | {"output_layer.weight": torch.ones(2)})
    refuse(IncompatibleInputs, "'output_layer.weight' is in 'm' but not in 'a'", parts | {"m": more}, tmp_path)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("name", ["adapter.linear_in.weight", "adapter.adapter_q.linear_out.weight"])
def test_adapters(tmp_path, alone, name):
    model = {} if alone else small_model(0)
    adapter = {f"decoder.layers.self_attention.linear_qkv.{name}": torch.ones(2, 4, 8).bfloat16()}
    parts = {n: write_checkpoint(tmp_path / n, model | adapter) for n in "ab"}
    refuse(IncompatibleInputs, "component 'a' holds adapters, .* Merge each into its base's weights first", parts, tmp_path)


def test_types_that_cannot_be_averaged(tmp_path):
    fp8 = write_checkpoint(tmp_path / "a", {"w": torch.ones(4).to(torch.float8_e4m3fn)})
    refuse(IncompatibleInputs, "'w' is stored as float8_e4m3fn.*Save the components' weights in bf16", {"a": fp8}, tmp_path)
    double = write_checkpoint(tmp_path / "b", {"w": torch.ones(4).double()})
    refuse(IncompatibleInputs, "'w' is float64; only float32, bfloat16, float16 are merged", {"b": double}, tmp_path)
    empty = write_checkpoint(tmp_path / "c", {"optimizer.w": torch.ones(4)})
    refuse(CorruptInput, "holds no model tensors", {"c": empty}, tmp_path)


def test_weights_are_never_normalised_silently(parts, tmp_path):
    refuse(MixtureError, "mixture m: weights sum to 0.9, expected 1", parts, tmp_path, {"m": {"a": 0.9}})
    refuse(MixtureError, "'d' is not a component; they are a, b, c", parts, tmp_path, {"m": {"d": 1.0}})
    refuse(MixtureError, "weight of 'a' is nan, expected a finite number", parts, tmp_path, {"m": {"a": float("nan")}})
    refuse(MixtureError, "a weight is negative", parts, tmp_path, {"m": {"a": 1.5, "b": -0.5}})
    refuse(MixtureError, "sum to 0 and cannot be normalised", parts, tmp_path, {"m": {}}, normalize="apply")
    with pytest.raises(MixtureError, match=r"no mixtures to merge"):
        merge_checkpoints(parts, {}, tmp_path / "out", progress=False)
    refuse(ConfigError, "normalize is 'always'", parts, tmp_path, normalize="always")
    refuse(ConfigError, "dtype is 'bfloat16', expected one of bf16, fp16, fp32", parts, tmp_path, dtype="bfloat16")
    with pytest.warns(UserWarning, match=r"weights sum to 0.5; divided by the sum"):
        merge_checkpoints(parts, {"w": {"a": 0.5}}, tmp_path / "ok", normalize="warn", progress=False)
    merge_checkpoints(parts, {"x": {"a": 1.5, "b": -0.5}}, tmp_path / "ok", normalize="off", progress=False, verify="full")
    merge_checkpoints(parts, {"y": {"a": 1.5, "b": -0.5}}, tmp_path / "ok", normalize="affine", progress=False, verify="full")
    refuse(MixtureError, "weights sum to 1.1, expected 1", parts, tmp_path, {"m": {"a": 1.5, "b": -0.4}}, normalize="affine")


def test_settings_that_make_no_sense(parts, tmp_path):
    refuse(ConfigError, "layout is 'flat', expected one of release, iter", parts, tmp_path, layout="flat")
    refuse(ConfigError, "verify is 'maybe'", parts, tmp_path, verify="maybe")
    refuse(ConfigError, "--max-memory 1 KiB is less than 2 threads need", parts, tmp_path, max_memory=1024, threads=2)
    refuse(ConfigError, "2 mixtures cannot be written", parts, tmp_path, {"m": {"a": 1}, "n": {"b": 1}}, into_output=True)
    refuse(ConfigError, "no components to merge", {}, tmp_path, {"m": {}})


def test_missing_ranks_are_noticed(tmp_path):
    folder = write_checkpoint(tmp_path / "a", small_model(0), parallel_cuts(2))
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    del metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks[1]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    refuse(CorruptInput, "was not saved by all ranks", {"a": folder}, tmp_path)
    metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks.append(
        metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks[0]
    )
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    refuse(CorruptInput, "or saves some elements twice", {"a": folder}, tmp_path)


def test_chunks_with_a_hole(tmp_path):
    a = write_checkpoint(tmp_path / "a", {"w": torch.ones(4, 4)})
    b = write_checkpoint(tmp_path / "b", {"w": torch.ones(4, 4)}, {"w": [[2, 4], [4]]})
    metadata = pickle.loads((b / ".metadata").read_bytes())
    first, second = metadata.state_dict_metadata["w"].chunks
    first.sizes, second.sizes = torch.Size((1, 4)), torch.Size((2, 4))
    metadata.state_dict_metadata["w"].chunks.append(type(first)(torch.Size((2, 1)), torch.Size((2, 2))))
    index, stored = next(iter(metadata.storage_data.items()))
    metadata.storage_data[type(index)("w", (2, 1))] = type(stored)("__1_0.distcp", 0, stored.length)
    (b / ".metadata").write_bytes(pickle.dumps(metadata))
    refuse(CorruptInput, "chunks of 'w' have 16 elements.* or saves some elements twice", {"a": a, "b": b}, tmp_path)


# --- faults ---------------------------------------------------------------------------------------------------------


def test_a_component_without_common_state(tmp_path):
    parts = {name: write_checkpoint(tmp_path / name, small_model(0), common={"iteration": 1}) for name in "abc"}
    (parts["b"] / "common.pt").unlink()
    with pytest.warns(UserWarning, match=r"component 'b': no common.pt in .*/b, so that arguments cannot be compared\."):
        merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "out", progress=False)


def test_components_without_common_state_are_warned_of_at_once(tmp_path):
    parts = {name: write_checkpoint(tmp_path / name, small_model(0), common={"iteration": 1}) for name in "abc"}
    for name in "ac":
        (parts[name] / "common.pt").unlink()
    together = (
        r"components 'a', 'c': no common.pt in .*/a, nor in the others, so that arguments cannot be compared, nor be carried"
    )
    with pytest.warns(UserWarning, match=together) as said:
        merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "out", progress=False)
    assert len(said) == 1


@pytest.mark.parametrize("change", [{"rotary_base": 500_000}, {"num_attention_heads": 8}, {"swiglu": False}])
def test_equal_shapes_that_mean_different_functions_are_refused(tmp_path, change):
    arguments = {"rotary_base": 10_000, "num_attention_heads": 4, "num_query_groups": 1, "swiglu": True}
    parts = {}
    for name, own in {"a": {}, "b": {"num_query_groups": 4}, "c": change}.items():
        common = {"args": argparse.Namespace(**arguments | own), "iteration": 1}
        parts[name] = write_checkpoint(tmp_path / name, small_model(0), {}, common=common)
    merge_checkpoints({k: parts[k] for k in "ab"}, {"m": {"a": 1.0}}, tmp_path / "out", progress=False)
    ((name, value),) = change.items()
    with pytest.raises(IncompatibleInputs, match=f"'a' and 'c': {name} is {arguments[name]!r} in the one and {value!r}"):
        merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "out2", progress=False)


@pytest.mark.parametrize(
    "change",
    [
        {"window_size": (128, 0)},
        {"softmax_type": "off-by-one"},
        {"rotary_percent": 0.5},
        {"layernorm_zero_centered_gamma": True},
        {"layernorm_epsilon": 1e-6},
        {"use_mup": True},
        {"activation_func_clamp_value": 7.0},
        {"use_rope_scaling": True},
    ],
)
def test_an_argument_that_only_one_component_has_is_compared_too(tmp_path, change):
    """A component saved by an older Megatron does not have it at all: there it is its plain value."""
    whole = {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 4, "seq_length": 64}
    whole |= {"norm_epsilon": 1e-5, "rope_scaling_factor": 8.0, "moe_router_topk": 2}
    idle = {"rope_scaling_factor": 32.0, "moe_router_topk": 4, "mscale": 2.0, "window_size": None}  # nothing here uses them
    parts = {}
    for name, own in {"a": {}, "b": idle, "c": change}.items():
        common = {"args": argparse.Namespace(**whole | own), "iteration": 1}
        parts[name] = write_checkpoint(tmp_path / name, small_model(0), {}, common=common)
    merge_checkpoints({k: parts[k] for k in "ab"}, {"m": {"a": 1.0}}, tmp_path / "out", progress=False)
    with pytest.raises(IncompatibleInputs, match=r"'a' and 'c': .* in the other: equal weights would be different functions"):
        merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "out2", progress=False)
