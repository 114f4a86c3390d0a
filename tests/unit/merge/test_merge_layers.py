"""Components whose layers are stacked merge with components whose layers are stored by themselves; chunks can be cut anew."""

import json
import random

import pytest
import torch
from dist_checkpoints import bits, even_cuts, parallel_cuts, read_checkpoint, small_model, write_checkpoint

from megatron_demix.checkpoint.reader import Checkpoint
from megatron_demix.errors import ConfigError, IncompatibleInputs
from megatron_demix.merge.chunks import cut_anew
from megatron_demix.merge.components import Components
from megatron_demix.merge.engine import merge_checkpoints


def by_layer(tensors):
    """The same tensors, every layer under its own key."""
    found = {}
    for key, tensor in tensors.items():
        head, layers, tail = key.partition("decoder.layers.")
        found |= {f"{layers}{n}.{tail}": x for n, x in enumerate(tensor)} if layers else {head: tensor}
    return found


def cuts_by_layer(tensor_parallel):
    found = {}
    for key, cuts in parallel_cuts(tensor_parallel).items():
        head, layers, tail = key.partition("decoder.layers.")
        found |= {f"{layers}{n}.{tail}": cuts[1:] for n in range(2)} if layers else {head: cuts}
    return found


@pytest.fixture
def parts(tmp_path):
    return {
        "stacked": write_checkpoint(tmp_path / "stacked", small_model(0), parallel_cuts(2), odd=True),
        "single": write_checkpoint(tmp_path / "single", by_layer(small_model(1)), cuts_by_layer(4), num_files=2, odd=True),
        # Both layers in one chunk, stored transposed.
        "whole": write_checkpoint(
            tmp_path / "whole", small_model(2), transposed=["decoder.layers.self_attention.linear_proj.weight"]
        ),
    }


@pytest.mark.parametrize(("first", "layers_apart"), [(f, apart) for f in (False, True) for apart in ("", "a", "b", "ab")])
def test_the_norm_before_experts_is_one_with_and_without_transformer_engine(tmp_path, first, layers_apart):
    norm, te = "decoder.layers.mlp.linear_fc1.layer_norm_weight", "decoder.layers.pre_mlp_layernorm.weight"

    def named(seed, name):
        others = {key: tensor for key, tensor in small_model(seed).items() if key != norm}
        experts = {key: torch.full((2, 3, 4, 8), seed + 1.0, dtype=torch.bfloat16)}
        model = others | experts | {name: torch.full((2, 8), seed + 1.0, dtype=torch.bfloat16)}
        return by_layer(model) if "ab"[seed] in layers_apart else model

    key = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
    names = (te, norm) if first else (norm, te)
    parts = {n: write_checkpoint(tmp_path / n, named(i, name)) for i, (n, name) in enumerate(zip("ab", names, strict=True))}
    merge_checkpoints(parts, {"m": {"a": 0.5, "b": 0.5}}, tmp_path / "out", progress=False, verify="full")
    merged = read_checkpoint(tmp_path / "out" / "m" / "release")
    assert merged.keys() == named(0, names[0]).keys()
    for name in (names[0], key):
        for found in [name] if "a" not in layers_apart else by_layer({name: torch.zeros(2)}):
            assert (merged[found] == 1.5).all()
    both = write_checkpoint(tmp_path / "c", named(0, norm) | named(0, te))
    with pytest.raises(IncompatibleInputs, match=r"norm.*weight' is in 'c' but not in 'a'"):
        Components({"a": parts["a"], "c": both})


@pytest.mark.parametrize("first", ["stacked", "single", "whole"])
def test_chunks_are_found_by_their_place(parts, first):
    components = Components({first: parts[first]} | parts)
    draw = random.Random(0)
    for key, info in components.tensors.items():
        for _ in range(20):
            ends = [sorted(draw.choices(range(size), k=2)) for size in info.shape]
            first_one, last_one = [a for a, _ in ends], [b for _, b in ends]
            for k in range(len(parts)):
                found = [
                    i
                    for i, c in enumerate(components.infos(key)[k].chunks)
                    if all(o <= b and a < o + n for o, n, (a, b) in zip(c.offset, c.shape, ends, strict=True))
                ]
                assert components.touching(k, key, first_one, last_one) == found


@pytest.mark.parametrize("first", ["stacked", "single", "whole"])
def test_the_first_component_names_the_keys(parts, tmp_path, first):
    ordered = {first: parts[first]} | parts
    mixtures = {name: {name: 1.0} for name in parts} | {"mixed": {"stacked": 0.5, "single": 0.25, "whole": 0.25}}
    merge_checkpoints(ordered, mixtures, tmp_path / "out", progress=False, verify="full")
    layout = by_layer if first == "single" else dict
    for seed, name in enumerate(parts):
        merged, expected = read_checkpoint(tmp_path / "out" / name / "release"), layout(small_model(seed))
        assert merged.keys() == expected.keys()
        assert all(bits(merged[k]) == bits(expected[k]) for k in expected)
    mixed = read_checkpoint(tmp_path / "out" / "mixed" / "release")
    exact = [layout(small_model(seed)) for seed in range(3)]
    for key, tensor in mixed.items():
        want = 0.5 * exact[0][key].double() + 0.25 * exact[1][key].double() + 0.25 * exact[2][key].double()
        assert torch.equal(tensor, want.to(torch.bfloat16))


def test_a_damaged_stack_of_layers_is_seen_from_any_layer(parts, tmp_path):
    info = Checkpoint(parts["whole"]).metadata.tensors["decoder.layers.mlp.linear_fc2.weight"]
    payload = Checkpoint(parts["whole"]).payload(info, info.chunks[0])
    file = parts["whole"] / info.chunks[0].location.file
    data = bytearray(file.read_bytes())
    at = data.find(payload.record.tobytes())
    data[at + payload.record.nbytes - 1] ^= 1
    file.write_bytes(data)
    both = {name: parts[name] for name in ("single", "whole")}
    with pytest.raises(Exception, match=r"differ from their checksum"):
        merge_checkpoints(both, {"m": {"single": 0.5, "whole": 0.5}}, tmp_path / "out", progress=False)
    assert not (tmp_path / "out" / "m").exists()


@pytest.mark.parametrize("first", ["a", "b"])
def test_another_number_of_layers_is_another_model(tmp_path, first):
    three = {k: torch.cat([v, v[:1]]) if "layers" in k else v for k, v in small_model(0).items()}
    parts = {"a": write_checkpoint(tmp_path / "a", three), "b": write_checkpoint(tmp_path / "b", by_layer(small_model(1)))}
    with pytest.raises(IncompatibleInputs, match=r"not versions of one model|has shape"):
        merge_checkpoints({first: parts[first]} | parts, {"m": {"a": 0.5, "b": 0.5}}, tmp_path / "out", progress=False)


def test_experts_of_any_expert_parallelism(tmp_path):
    key = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
    tensors = [
        {key: torch.randn(2, 4, 6, 8).bfloat16(), "decoder.layers.mlp.router.weight": torch.randn(2, 4, 8)} for _ in "ab"
    ]
    cuts = [{key: even_cuts((2, 4, 6, 8), grid)} for grid in ((2, 4, 1, 1), (1, 2, 2, 1))]
    parts = {n: write_checkpoint(tmp_path / n, t, c) for n, t, c in zip("ab", tensors, cuts, strict=True)}
    (path,) = merge_checkpoints(parts, {"m": {"a": 0.5, "b": 0.5}}, tmp_path / "out", progress=False, verify="full")
    merged = read_checkpoint(path / "release")[key]
    assert torch.equal(merged, (0.5 * tensors[0][key].double() + 0.5 * tensors[1][key].double()).bfloat16())


FC1 = "decoder.layers.mlp.experts.experts.linear_fc1."


def by_expert(tensors):
    """As megatron.core stores them with singleton_local_shards: layers, experts, gate and up by themselves."""
    found = {}
    for key, tensor in tensors.items():
        for layer, experts in enumerate(tensor):
            for expert, one in enumerate(experts):
                name = key.replace("layers.", f"layers.{layer}.").replace("experts.experts.", f"experts.experts.{expert}.")
                found |= dict(zip((f"{name}_w", f"{name}_v"), one.chunk(2), strict=True)) if "fc1" in key else {name: one}
    return found


@pytest.mark.parametrize("single_layers", [True, False])
def test_experts_and_halves_by_themselves(tmp_path, single_layers):
    shapes = {FC1 + "weight": (2, 3, 8, 4), FC1 + "bias": (2, 3, 8), FC1.replace("fc1", "fc2") + "weight": (2, 3, 4, 4)}
    tensors = [{key: torch.randn(shape) for key, shape in shapes.items()} for _ in "ab"]
    single = by_expert(tensors[1])
    halves = {key: [[2, 4], *([n] for n in tensor.shape[1:])] for key, tensor in single.items() if "fc1" in key}
    whole = by_layer(tensors[0]) if single_layers else tensors[0]
    parts = {
        "a": write_checkpoint(tmp_path / "a", whole),
        "b": write_checkpoint(
            tmp_path / "b", single, halves, odd=True, num_files=3, transposed=[k for k in single if k.endswith("weight_v")]
        ),
    }
    mixtures = {"m": {"a": 0.5, "b": 0.5}, "b": {"b": 1.0}}
    mixed, alone = merge_checkpoints(parts, mixtures, tmp_path / "out", progress=False, verify="full")
    expected = by_layer(tensors[1]) if single_layers else tensors[1]
    assert {k: bits(v) for k, v in read_checkpoint(alone / "release").items()} == {k: bits(v) for k, v in expected.items()}
    for key, tensor in read_checkpoint(mixed / "release").items():
        assert torch.equal(tensor, (0.5 * whole[key].double() + 0.5 * expected[key].double()).float())


@pytest.mark.parametrize("lost", ["layers.1.mlp.experts.experts.1.linear_fc1.weight_v", "experts.0.linear_fc1.weight_w"])
def test_a_half_that_is_missing_is_noticed(tmp_path, lost):
    tensors = {FC1 + "weight": torch.randn(2, 3, 8, 4)}
    single = {key: tensor for key, tensor in by_expert(tensors).items() if lost not in key}
    parts = {"a": write_checkpoint(tmp_path / "a", tensors), "b": write_checkpoint(tmp_path / "b", single)}
    with pytest.raises(IncompatibleInputs, match="not versions of one model"):
        merge_checkpoints(parts, {"m": {"a": 0.5, "b": 0.5}}, tmp_path / "out", progress=False)
    with pytest.raises(IncompatibleInputs, match=r"'b' was saved with singleton_local_shards .*, 'a' without: give 'a' first"):
        merge_checkpoints({n: parts[n] for n in "ba"}, {"m": {"a": 0.5, "b": 0.5}}, tmp_path / "out", progress=False)


# --- cutting anew ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_chunk", [1, 100, 1 << 20])
def test_other_chunks_same_elements(parts, tmp_path, max_chunk):
    both = {name: parts[name] for name in ("stacked", "single")}
    weights = {"m": {"stacked": 0.75, "single": 0.25}}
    (as_first,) = merge_checkpoints(both, weights, tmp_path / "as_first", progress=False)
    (anew,) = merge_checkpoints(both, weights, tmp_path / "anew", progress=False, verify="full", max_chunk=max_chunk)
    a, b = read_checkpoint(as_first / "release"), read_checkpoint(anew / "release")
    assert a.keys() == b.keys()
    assert all(bits(a[k]) == bits(b[k]) for k in a)
    for info in Checkpoint(anew).model_tensors.values():
        assert all(torch.Size(c.shape).numel() * 2 <= max(2, max_chunk) for c in info.chunks)
        if ".layers." in info.key:
            assert {c.shape[0] for c in info.chunks} == {1}
    assert json.loads((anew / "release" / "demix_merge.json").read_text())["max_chunk"] == max_chunk


def test_boxes_tile_every_shape(tmp_path):
    shapes = {"w": (), "x": (0, 5), "y": (7,), "z": (3, 5, 2), "decoder.layers.mlp.experts.experts.fc.weight": (2, 3, 4, 5)}
    path = write_checkpoint(tmp_path / "a", {k: torch.zeros(s) for k, s in shapes.items()})
    for key, info in Checkpoint(path).model_tensors.items():
        for max_bytes in (1, 8, 24, 80, 1 << 20):
            filled = torch.zeros(shapes[key])
            for offset, shape in cut_anew(info, max_bytes):
                filled[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))] += 1
                assert torch.Size(shape).numel() * 4 <= max(4, max_bytes)
            assert (filled == 1).all()


def test_a_chunk_holds_something(parts, tmp_path):
    with pytest.raises(ConfigError, match=r"max_chunk is 0 bytes, expected at least 1"):
        merge_checkpoints(parts, {"m": {"stacked": 1.0}}, tmp_path / "out", progress=False, max_chunk=0)
