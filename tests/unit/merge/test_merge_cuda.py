"""The CUDA kernels: where they are built they load anywhere; where there is a GPU they give the CPU's bits."""

import numpy as np
import pytest
import torch

from megatron_demix.errors import ConfigError
from megatron_demix.merge import cuda
from megatron_demix.native import MergePlan

DTYPES = ["float32", "bfloat16", "float16"]
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_asking_for_what_is_not_there(monkeypatch):
    monkeypatch.setenv("MEGATRON_DEMIX_CUDA", "0")
    assert not cuda.available()
    monkeypatch.setenv("MEGATRON_DEMIX_CUDA", "1")
    if torch.cuda.is_available():
        assert cuda.available()
    else:
        with pytest.raises(ConfigError, match=r"MEGATRON_DEMIX_CUDA is 1, but (no CUDA device is visible|.* was not built)"):
            cuda.available()
    monkeypatch.delenv("MEGATRON_DEMIX_CUDA")
    if not torch.cuda.is_available():
        assert not cuda.available()
        with pytest.raises(ValueError, match="on one CUDA device"):
            cuda.weighted_sum([torch.zeros(4)], [torch.zeros(4)], np.ones((1, 1)))


def on_cpu(sources, weights, out):
    plan, n = MergePlan(len(sources)), sources[0].numel()
    records = [plan.add_record(s.contiguous().view(torch.uint8).numpy().reshape(-1), 0) for s in sources]
    plan.add_target([n], str(sources[0].dtype).removeprefix("torch."), str(out).removeprefix("torch."))
    plan.add_region(0, [0], [n], records, [0] * len(sources), [[1]] * len(sources))
    outs = [torch.empty(n, dtype=out) for _ in weights]
    plan.run(np.array(weights)[None], addresses_TM=np.array([[o.data_ptr() for o in outs]]))
    return outs


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
class TestOnDevice:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("num", [1, 7, 40])
    def test_bits_of_the_cpu(self, dtype, out, shift, num):
        dtype, out = getattr(torch, dtype), getattr(torch, out)
        generator = torch.Generator().manual_seed(num)
        n = 100_003
        sources = [(torch.randn(n + shift, generator=generator) * 100).to(dtype) for _ in range(num)]
        special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-40, 6e-8, 65519.0]).to(dtype)
        for k, source in enumerate(sources):
            source[k * 3 : k * 3 + len(special)] = special
        rng = np.random.default_rng(num)
        weights = rng.dirichlet(np.ones(num), 13) * (rng.random((13, num)) > 0.3)
        weights[0] = 0
        weights[1] = np.eye(num)[0]
        expected = on_cpu([s[shift:] for s in sources], weights, out)
        device = [s.cuda()[shift:] for s in sources]
        got = [torch.empty(n + shift, dtype=out, device="cuda")[shift:] for _ in weights]
        cuda.weighted_sum(device, got, weights)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a.cpu().clone().view(torch.uint8), b.view(torch.uint8))
