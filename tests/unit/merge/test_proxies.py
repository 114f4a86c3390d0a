"""Proxies in memory: a live model's parameters on any rank, and what does not fit."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from dist_checkpoints import bits, parallel_cuts, small_model, write_checkpoint

from megatron_demix.checkpoint.live import LiveTensor
from megatron_demix.checkpoint.reader import Checkpoint
from megatron_demix.errors import CorruptInput, IncompatibleInputs, MixtureError
from megatron_demix.merge.proxies import ProxyMerger


@pytest.fixture
def parts(tmp_path):
    return {n: write_checkpoint(tmp_path / n, small_model(i), parallel_cuts(i + 1)) for i, n in enumerate("ab")}


def live_rank(rank, ranks, dtype=torch.bfloat16):
    """What tensor-parallel rank `rank` of `ranks` holds of two tensors: rows of fc1 of layer 1, columns of fc2 of layer 0."""
    rows, columns = 64 // ranks, 32 // ranks
    fc1 = torch.zeros(rows, 8, dtype=dtype)
    fc2 = torch.zeros(8, columns, dtype=dtype)
    return [
        LiveTensor("decoder.layers.mlp.linear_fc1.weight", (2, 64, 8), (1, rank * rows, 0), fc1),
        LiveTensor("decoder.layers.mlp.linear_fc2.weight", (2, 8, 32), (0, 0, rank * columns), fc2),
    ]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_each_rank_gets_its_part(parts, ranks):
    a, b = small_model(0), small_model(1)
    for rank in range(ranks):
        fc1, fc2 = live_rank(rank, ranks)
        merger = ProxyMerger(parts, [fc1, fc2])
        assert merger.num_bytes == 2 * (fc1.tensor.numel() + fc2.tensor.numel())
        for weights, model in (({"a": 1.0}, a), ({"b": 1.0}, b), ({"a": 1.0, "b": 0.0}, a)):
            merger.merge(weights)
            rows, columns = 64 // ranks, 32 // ranks
            expected = model[fc1.key][1, rank * rows : (rank + 1) * rows]
            assert bits(fc1.tensor) == bits(expected)
            assert bits(fc2.tensor) == bits(model[fc2.key][0, :, rank * columns : (rank + 1) * columns])


def test_the_model_may_be_wider_than_the_components(parts):
    (fc1, fc2) = live_rank(0, 1, torch.float32)
    ProxyMerger(parts, [fc1, fc2]).merge({"a": 0.5, "b": 0.5})
    a, b = small_model(0)[fc1.key][1].float(), small_model(1)[fc1.key][1].float()
    assert torch.equal(fc1.tensor, 0.5 * a + 0.5 * b)


def test_parameters_that_are_views(parts):
    whole = torch.zeros(96, 20, dtype=torch.bfloat16)
    key = "embedding.word_embeddings.weight"
    view = LiveTensor(key, (96, 8), (0, 0), whole[:, 3:11])
    parameter = torch.nn.Parameter(torch.zeros(96, 8, dtype=torch.bfloat16))
    ProxyMerger(parts, [view, LiveTensor(key, (96, 8), (0, 0), parameter)]).merge({"b": 1.0})
    expected = small_model(1)[key]
    assert bits(whole[:, 3:11]) == bits(expected) == bits(parameter.detach())
    assert whole[:, :3].abs().sum() == whole[:, 11:].abs().sum() == 0


def test_what_does_not_fit(parts):
    with pytest.raises(IncompatibleInputs, match=r"has parameter 'decoder.w', the components .* do not"):
        ProxyMerger(parts, [LiveTensor("decoder.w", (4,), (0,), torch.zeros(4))])
    with pytest.raises(IncompatibleInputs, match=r"global shape \(4,\) in the live model and \(8,\) in component 'a'"):
        ProxyMerger(parts, [LiveTensor("decoder.final_layernorm.weight", (4,), (0,), torch.zeros(4))])
    with pytest.raises(IncompatibleInputs, match=r"is float64 in the live model"):
        ProxyMerger(parts, [LiveTensor("decoder.final_layernorm.weight", (8,), (0,), torch.zeros(8).double())])
    merger = ProxyMerger(parts, live_rank(0, 1))
    with pytest.raises(MixtureError, match=r"mixture proxy: weights sum to 0.5"):
        merger.merge({"a": 0.5})


def test_a_damaged_component_is_noticed(parts):
    checkpoint = Checkpoint(parts["b"])
    info = checkpoint.metadata.tensors["decoder.layers.mlp.linear_fc2.weight"]
    file = parts["b"] / info.chunks[0].location.file
    data = bytearray(file.read_bytes())
    data[bytes(data).find(checkpoint.payload(info, info.chunks[0]).record.tobytes())] ^= 4
    file.write_bytes(data)
    with pytest.raises(CorruptInput, match=r"fc2.weight' at .*: its bytes differ from their checksum"):
        ProxyMerger(parts, live_rank(0, 1)).merge({"a": 1.0})


def test_a_component_cut_short_while_it_is_mapped(tmp_path):
    large = {"decoder.final_layernorm.weight": torch.ones(1 << 20, dtype=torch.bfloat16)}
    parts = {n: write_checkpoint(tmp_path / n, large, {}) for n in "ab"}
    live = LiveTensor("decoder.final_layernorm.weight", (1 << 20,), (0,), torch.zeros(1 << 20, dtype=torch.bfloat16))
    merger = ProxyMerger(parts, [live])
    merger.merge({"a": 0.5, "b": 0.5})
    (file,) = parts["b"].glob("*.distcp")
    os.truncate(file, 1 << 19)
    for _ in range(2):
        with pytest.raises(CorruptInput, match=rf"{file}: became unreadable while it was read"):
            merger.merge({"a": 0.5, "b": 0.5})
    with pytest.raises(CorruptInput, match=r"The file is truncated"):
        ProxyMerger(parts, [live])


def test_other_bus_errors_end_the_process_as_ever(parts, tmp_path):
    """Also where a map that was watched is gone, and its addresses may be another's."""
    code = f"""
import mmap, os
from megatron_demix.checkpoint.reader import Checkpoint
checkpoint = Checkpoint({str(parts["a"])!r})
info = next(iter(checkpoint.model_tensors.values()))
checkpoint.payload(info, info.chunks[0])
del checkpoint
path = {str(tmp_path / "other")!r}
open(path, "wb").write(bytes(1 << 16))
with open(path, "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
os.truncate(path, 0)
mapped[4096]
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGBUS


def test_several_models_at_once(parts):
    models = [live_rank(0, 2) for _ in range(3)]
    mixtures = {"x": {"a": 1.0}, "y": {"a": 0.5, "b": 0.5}, "z": {"b": 1.0}}
    merger = ProxyMerger(parts, models[0])
    merger.merge_all(mixtures, [[t.tensor for t in model] for model in models])
    for model, weights in zip(models, mixtures.values(), strict=True):
        alone = live_rank(0, 2)
        ProxyMerger(parts, alone).merge(weights)
        assert all(bits(a.tensor) == bits(b.tensor) for a, b in zip(model, alone, strict=True))
    with pytest.raises(ValueError, match=r"3 mixtures need as many models"):
        merger.merge_all(mixtures, [[t.tensor for t in models[0]]])
    with pytest.raises(ValueError, match=r"tensors like the live ones"):
        merger.merge_all({"x": {"a": 1.0}}, [[t.tensor.float() for t in models[0]]])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("room", [True, False])
def test_on_a_gpu(parts, room, monkeypatch):
    from megatron_demix.merge import device, resident

    monkeypatch.setenv("MEGATRON_DEMIX_CUDA", "1")
    if not room:
        monkeypatch.setattr(resident, "_FREE_SHARE", 0.0)
    live = [
        LiveTensor(key, tuple(t.shape), (0,) * t.dim(), torch.zeros_like(t, device="cuda")) for key, t in small_model(0).items()
    ]
    merger = ProxyMerger(parts, live)
    for weights in ({"a": 0.25, "b": 0.75}, {"b": 1.0}, {"a": 0.9, "b": 0.1}):
        merger.merge(weights)
        expected = [LiveTensor(t.key, t.global_shape, t.global_offset, torch.zeros_like(t.tensor.cpu())) for t in live]
        ProxyMerger(parts, expected).merge(weights)
        assert all(bits(a.tensor.cpu()) == bits(b.tensor) for a, b in zip(live, expected, strict=True))
    wanted = device.ResidentComponents if room else device.StreamedComponents
    assert isinstance(merger._device._method, wanted)
