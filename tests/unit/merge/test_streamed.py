"""Components streamed through a device: batches, buffers and copies as on a GPU; without one, the sums are the CPU's."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dist_checkpoints import bits, parallel_cuts, small_model, write_checkpoint

from megatron_demix.checkpoint.grid import Grid
from megatron_demix.checkpoint.live import LiveTensor
from megatron_demix.errors import ConfigError, VerificationFailed
from megatron_demix.merge import cuda, device, resident
from megatron_demix.merge.components import Components
from megatron_demix.merge.device import Staged
from megatron_demix.merge.proxies import ProxyMerger
from megatron_demix.merge.streamed import StreamedComponents, make_batches
from megatron_demix.native import MergePlan

WEIGHTS = [{"a": 0.25, "b": 0.75, "c": 0.0}, {"a": 0.0, "b": 1.0, "c": 0.0}, {"a": 0.5, "b": 0.25, "c": 0.25}]
WEIGHTS_MK = np.array([[row[k] for k in "abc"] for row in WEIGHTS])

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not cuda.available(), reason="needs a GPU and kernels")]),
]


@pytest.fixture
def parts(tmp_path):
    return {
        n: write_checkpoint(tmp_path / n, small_model(i), parallel_cuts(i + 1), odd=True, transposed=["output_layer.weight"])
        for i, n in enumerate("abc")
    }


def live_model(dtype=torch.bfloat16, device="cpu"):
    return [
        LiveTensor(key, tuple(t.shape), (0,) * t.dim(), torch.full(t.shape, 7.0, dtype=dtype, device=device))
        for key, t in small_model(0).items()
    ]


def sum_on_cpu(sources, outs, weights_MK):
    plan, n = MergePlan(len(sources)), sources[0].numel()
    records = [plan.add_record(s.view(torch.uint8).numpy().reshape(-1), 0) for s in sources]
    plan.add_target([n], str(sources[0].dtype).removeprefix("torch."), str(outs[0].dtype).removeprefix("torch."))
    plan.add_region(0, [0], [n], records, [0] * len(sources), [[1]] * len(sources))
    plan.run(np.array(weights_MK)[None], addresses_TM=np.array([[o.data_ptr() for o in outs]]))


def tensors(model):
    return [t.tensor for t in model]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("batch_bytes", [1, 2000, 1 << 20])
@pytest.mark.parametrize("device", DEVICES)
def test_streamed_is_the_merge_in_place(parts, device, batch_bytes, dtype):
    models = [live_model(dtype, device) for _ in WEIGHTS]
    expected = [live_model(dtype) for _ in WEIGHTS]
    sums = cuda.weighted_sum if device == "cuda" else sum_on_cpu
    streamed = StreamedComponents(
        Components(parts), models[0], 2, torch.device(device), batch_bytes=batch_bytes, weighted_sum=sums
    )
    for _ in range(2):
        streamed.merge(WEIGHTS_MK, [tensors(model) for model in models])
    ProxyMerger(parts, expected[0]).merge_all(dict(zip("xyz", WEIGHTS, strict=True)), [tensors(m) for m in expected])
    for got, want in zip(models, expected, strict=True):
        assert all(bits(a.tensor.cpu()) == bits(b.tensor) for a, b in zip(got, want, strict=True))


def test_batches_tile_every_tensor(parts):
    live = live_model()
    for source_bytes in (1, 256, 700, 5000, 1 << 20):
        batches = make_batches(Components(parts), live, source_bytes)
        for index, tensor in enumerate(live):
            pieces = [p for batch in batches for p in batch.pieces if p.tensor == index]
            ends = [p.start + p.count for p in pieces]
            assert [p.start for p in pieces] == [0, *ends[:-1]]
            assert ends[-1] == tensor.tensor.numel()
        for batch in batches:
            assert batch.source_bytes <= max(source_bytes, 256) or len(batch.pieces) == 1
            spans = sorted(
                (a, a + p.count * 2) for p, row in zip(batch.pieces, batch.addresses(0, 3), strict=True) for a in row
            )
            assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
            assert spans[-1][1] <= 3 * batch.source_bytes


def test_no_weight_at_all_is_zero(parts):
    model = live_model()
    StreamedComponents(Components(parts), model, 1, torch.device("cpu"), weighted_sum=sum_on_cpu).merge(
        np.zeros((1, 3)), [tensors(model)]
    )
    assert all(not t.tensor.any() for t in model)


def test_a_plan_for_each_batch_looks_at_the_chunks_once(parts, monkeypatch):
    """With experts a tensor has thousands of chunks, and streaming thousands of batches."""
    made = []
    init = Grid.__init__
    monkeypatch.setattr(Grid, "__init__", lambda self, info: (made.append(info.key), init(self, info))[1])
    assert len(make_batches(Components(parts), live_model(), 256)) > 2 * len(small_model(0))
    assert sorted(made) == sorted([*small_model(0)] * len(parts))


@pytest.mark.parametrize("staged", [1, 3000, 1 << 28])
def test_what_is_kept_on_a_device_are_the_components(parts, monkeypatch, staged):
    """However many tensors are put through the buffer at a time."""
    monkeypatch.setattr(resident, "_STAGED", staged)
    live = live_model()
    kept = resident.ResidentComponents(Components(parts), live, 2)
    for k in range(3):
        for tensor, sources in zip(live, kept._sources, strict=True):
            assert bits(sources[k]) == bits(small_model(k)[tensor.key])


def cuda_fails():
    raise RuntimeError("CUDA error: unspecified launch failure")


class WrongSums:
    """A device that copies, and cannot add."""

    def merge(self, weights_MK, models):
        for row, tensors in zip(weights_MK, models, strict=True):
            source = small_model(int(np.argmax(row)))
            for tensor, key in zip(tensors, small_model(0), strict=True):
                tensor.copy_(source[key])


def test_a_device_is_compared_with_the_cpu_in_a_merge_that_sums(parts, monkeypatch):
    """Mixtures of one component come first in a study: they are copies, and no kernel runs."""
    monkeypatch.setattr(
        Staged, "__init__", lambda self, target, pinned: vars(self).update(_target=target, written=target.clone())
    )
    merger = ProxyMerger(parts, live_model())
    merger.merge({"a": 1.0})
    merger._device._method = WrongSums()
    for name in "abc":
        merger.merge({name: 1.0})
    with pytest.raises(VerificationFailed, match="differ"):
        merger.merge({"a": 0.5, "b": 0.5})


def device_that_raises(monkeypatch, error, *, fits):
    """Where components are to be kept on it, or streamed to it."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(device, "_one_device", lambda live: torch.device("cuda:0"))
    monkeypatch.setattr(device, "fits_on_device", lambda *_: fits)
    monkeypatch.setattr(device, "ResidentComponents" if fits else "StreamedComponents", fail)
    for name in ("available", "runs_on"):
        monkeypatch.setattr(cuda, name, lambda *_: True)
    monkeypatch.delenv("MEGATRON_DEMIX_CUDA", raising=False)


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
def test_a_device_without_room_leaves_merges_to_the_cpu(parts, monkeypatch, error, fits):
    """Another process may have taken the memory, or no more of the host's may be pinned."""
    full = error("CUDA out of memory. Tried to allocate 20 GiB.\nSee the documentation")
    device_that_raises(monkeypatch, full, fits=fits)
    got, expected = live_model(), live_model()
    merger = ProxyMerger(parts, got)
    said = r"cuda:0 has no room to merge proxies \(CUDA out of memory. Tried to allocate 20 GiB.\)"
    with pytest.warns(UserWarning, match=rf"^{said}. They are merged on the CPU.$"):
        merger.merge(WEIGHTS[0])
    monkeypatch.setenv("MEGATRON_DEMIX_CUDA", "1")
    with pytest.raises(ConfigError, match=f"MEGATRON_DEMIX_CUDA is 1, but {said}. Free memory there"):
        ProxyMerger(parts, got).merge(WEIGHTS[0])
    monkeypatch.setattr(device, "_one_device", lambda live: None)
    ProxyMerger(parts, expected).merge(WEIGHTS[0])
    assert all(bits(a.tensor) == bits(b.tensor) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("fits", [True, False])
def test_a_device_that_fails_is_not_taken_for_a_full_one(parts, monkeypatch, fits):
    device_that_raises(monkeypatch, RuntimeError("CUDA error: an illegal memory access was encountered"), fits=fits)
    with pytest.raises(RuntimeError, match=r"^CUDA error: an illegal memory access was encountered$"):
        ProxyMerger(parts, live_model()).merge(WEIGHTS[0])


def test_results_that_cannot_be_pinned_are_staged_all_the_same(monkeypatch):
    empty, asked = torch.empty, []

    def none_pinned(*sizes, pin_memory=False, **options):
        asked.append(pin_memory)
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*sizes, **options)

    monkeypatch.setattr(torch, "empty", none_pinned)
    target = SimpleNamespace(device=torch.device("cuda:0"), shape=(2, 3), dtype=torch.bfloat16)
    assert Staged(target, pinned=True).written.shape == (2, 3)
    assert asked == [True, False]
    monkeypatch.setattr(torch, "empty", lambda *_, **__: cuda_fails())
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        Staged(target, pinned=True)
