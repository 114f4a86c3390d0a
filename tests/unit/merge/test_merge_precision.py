"""Merges of components of several precisions, and merges written in another one than the components'."""

import json

import numpy as np
import pytest
import torch
from dist_checkpoints import bits, parallel_cuts, read_checkpoint, small_model, write_checkpoint

from megatron_demix.checkpoint.live import LiveTensor
from megatron_demix.errors import CorruptInput, IncompatibleInputs, OutputExists
from megatron_demix.merge.command import main
from megatron_demix.merge.engine import merge_checkpoints
from megatron_demix.merge.logical_tensors import FusedLayout
from megatron_demix.merge.methods_by_name import make_method
from megatron_demix.merge.proxies import ProxyMerger

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WEIGHTS = {"a": 0.5, "b": 0.25, "c": 0.25}  # products with them are exact
BIAS = "decoder.layers.mlp.router.expert_bias"


def component(folder, seed, dtype, tp=1, **settings):
    return write_checkpoint(folder, small_model(seed, dtype), parallel_cuts(tp), num_files=tp, **settings)


@pytest.fixture
def parts(tmp_path):
    """One of each precision, cut and laid out differently."""
    last = ["decoder.layers.self_attention.linear_proj.weight", "decoder.layers.mlp.linear_fc2.weight"]
    return {
        "a": component(tmp_path / "a", 0, torch.bfloat16, 1, odd=True),
        "b": component(tmp_path / "b", 1, torch.float32, 2, odd=True, transposed=last),
        "c": component(tmp_path / "c", 2, torch.float16, 4, spread=last),
    }


def summed(weights):
    """In float32 and in order, as the merge is said to be."""
    models = [small_model(k, dtype) for k, dtype in enumerate((torch.bfloat16, torch.float32, torch.float16))]
    result = {}
    for key in models[0]:
        terms = [w * model[key].float() for w, model in zip(weights, models, strict=True) if w]
        result[key] = sum(terms[1:], terms[0])
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ["scalar", None])
def test_each_component_is_read_as_it_is_and_the_sum_rounded_once(parts, tmp_path, dtype, isa, monkeypatch):
    if isa:
        monkeypatch.setenv("MEGATRON_DEMIX_ISA", isa)
    mixtures = {"m": WEIGHTS} | {f"m{k}": WEIGHTS for k in range(4)} | {f"only_{name}": {name: 1.0} for name in parts}
    written = merge_checkpoints(parts, mixtures, tmp_path / "out", progress=False, verify="full", dtype=dtype)
    for path, weights in zip(written, mixtures.values(), strict=True):
        merged = read_checkpoint(path / "release")
        for key, expected in summed([weights.get(name, 0) for name in parts]).items():
            assert merged[key].dtype == DTYPES[dtype]
            assert bits(merged[key]) == bits(expected.to(DTYPES[dtype])), key


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "options"), [
    ("multislerp", {}),
    ("karcher", {}),
    ("linear", {"scale": 1.5}),
    ("ties", {"density": 0.5}),
    ("della", {"density": 0.5, "epsilon": 0.2}),
    ("breadcrumbs", {"density": 0.5, "gamma": 0.1}),
])  # fmt: skip
def test_every_method_agrees_with_its_oracle(parts, tmp_path, dtype, name, options):
    base = component(tmp_path / "base", 9, torch.bfloat16, 2)
    layout = None if name == "linear" else FusedLayout(2, 4, True)
    method = make_method(name, base, layout=layout, **options)
    mixtures = {"m": WEIGHTS, "n": {"a": 0.25, "b": 0.75}}
    merge_checkpoints(parts, mixtures, tmp_path / "out", progress=False, verify="full", method=method, dtype=dtype)


def test_the_same_bytes_however_it_is_cut_and_threaded(parts, tmp_path):
    def made(name, **settings):
        (path,) = merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / name, progress=False, dtype="bf16", **settings)
        return {key: bits(tensor) for key, tensor in read_checkpoint(path / "release").items()}

    expected = made("one", threads=1)
    assert made("more", threads=3) == expected
    assert made("anew", max_chunk=100) == expected
    for worker in (0, 1):
        merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "shared", progress=False, dtype="bf16", worker=(worker, 2))
    found = read_checkpoint(tmp_path / "shared" / "m" / "release")
    assert {key: bits(tensor) for key, tensor in found.items()} == expected


@pytest.mark.parametrize("stored", DTYPES.values())
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_component_is_cast(tmp_path, stored, dtype, capsys):
    model = small_model(3, stored)
    path = write_checkpoint(tmp_path / "a", model)
    command = [f"{path}:1", "--output", str(tmp_path / "cast"), "--dtype", dtype, "--quiet", "--verify", "full"]
    assert main([*command, "--dry-run"]) == 0
    assert f"written as {dtype}\n" in capsys.readouterr().out
    assert not (tmp_path / "cast").exists()
    assert main(command) == 0
    merged = read_checkpoint(tmp_path / "cast" / "release")
    assert all(bits(merged[key]) == bits(tensor.to(DTYPES[dtype])) for key, tensor in model.items())


def test_it_is_said_in_the_checkpoint(parts, tmp_path):
    (path,) = merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "out", progress=False, dtype="fp32")
    assert json.loads((path / "release" / "demix_merge.json").read_text())["dtype"] == "fp32"
    state = torch.load(path / "release" / "common.pt", weights_only=False)
    assert state["args"].params_dtype == torch.float32
    assert not hasattr(state["args"], "bf16")  # as little as the components'
    assert merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "out", progress=False, dtype="fp32") == [path]
    with pytest.raises(OutputExists, match=r"made from other inputs or settings"):
        merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "out", progress=False, dtype="fp16")


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_what_every_model_has_in_float32_stays_so(tmp_path, stored, capsys):
    scale = "decoder.layers.mixer.A_log"
    kept = {BIAS: torch.rand(2, 4), scale: torch.rand(2, 4)}
    path = write_checkpoint(tmp_path / "a", small_model(0, stored) | kept)
    command = [f"{path}:1", "--output", str(tmp_path / "out"), "--dtype", "fp16", "--quiet"]
    assert main([*command, "--dry-run"]) == 0
    num_kept = 1 if stored == torch.float32 else 2  # there A_log is as all others
    assert f"written as fp16, {num_kept} tensors as fp32" in capsys.readouterr().out
    assert main(command) == 0
    merged = read_checkpoint(tmp_path / "out" / "release")
    assert bits(merged[BIAS]) == bits(kept[BIAS])
    assert merged[scale].dtype == (torch.float16 if stored == torch.float32 else torch.float32)
    assert merged["decoder.final_layernorm.weight"].dtype == torch.float16


def test_too_large_for_half_precision_is_said(tmp_path):
    path = write_checkpoint(tmp_path / "a", {"decoder.final_layernorm.weight": torch.tensor([1.0, 70000.0])})
    with pytest.warns(UserWarning, match=r"but in no component: a sum is too large for its type"):
        merge_checkpoints({"a": path}, {"m": {"a": 1.0}}, tmp_path / "out", progress=False, dtype="fp16")


def test_damage_is_found_in_components_of_several_types(parts, tmp_path):
    value = small_model(2, torch.float16)["embedding.word_embeddings.weight"][:24].numpy().tobytes()
    (file,) = [file for file in (tmp_path / "c").glob("*.distcp") if value in file.read_bytes()]
    file.write_bytes(file.read_bytes().replace(value, bytes([value[0] ^ 1]) + value[1:]))
    with pytest.raises(CorruptInput, match=r"word_embeddings.weight.*its bytes differ from their checksum"):
        merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "out", progress=False, dtype="bf16")


def test_a_tensor_that_is_no_number_with_a_fraction_in_one_of_them(tmp_path):
    paths = {
        n: write_checkpoint(tmp_path / n, {"w": torch.ones(4).to(t)}) for n, t in (("a", torch.float32), ("b", torch.int32))
    }
    with pytest.raises(IncompatibleInputs, match=r"'w' is float32 in 'a' and int32 in 'b'. Save all components alike"):
        merge_checkpoints(paths, {"m": {"a": 0.5, "b": 0.5}}, tmp_path / "out", progress=False, dtype="fp32")


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_a_live_model_is_of_its_own_precision(parts, dtype):
    live = [LiveTensor(k, tuple(t.shape), (0,) * t.dim(), torch.zeros_like(t, dtype=dtype)) for k, t in small_model(0).items()]
    ProxyMerger(parts, live).merge(WEIGHTS)
    expected = summed(list(WEIGHTS.values()))
    assert all(bits(tensor.tensor) == bits(expected[tensor.key].to(dtype)) for tensor in live)
    assert np.isfinite(live[0].tensor.float().numpy()).all()
