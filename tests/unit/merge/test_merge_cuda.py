"""The CUDA kernels: where they are built they load anywhere; where there is a GPU they give the CPU's bits."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_demix.errors import ConfigError
from megatron_demix.merge import cuda
from megatron_demix.native import MergePlan

DTYPES = ["float32", "bfloat16", "float16"]
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not cuda.available(), reason="needs a CUDA device and kernels")]


def test_asking_for_what_is_not_there(monkeypatch):
    monkeypatch.setenv("MEGATRON_DEMIX_CUDA", "0")
    assert not cuda.available()
    monkeypatch.setenv("MEGATRON_DEMIX_CUDA", "1")
    if torch.cuda.is_available() and cuda.LIBRARY.is_file():
        assert cuda.available()
    else:
        with pytest.raises(
            ConfigError, match=r"MEGATRON_DEMIX_CUDA is 1, but (no CUDA device|no NVIDIA driver|.* was not built)"
        ):
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


_OTHER_GPU = """
extern "C" int demix_cuda_device_count() { return 1; }
extern "C" int demix_cuda_runs_here() { return 209; }
extern "C" const char* demix_cuda_error(int) { return "no kernel image is available"; }
extern "C" int demix_cuda_weighted_sum() { return 209; }
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_kernels_built_for_another_gpu(tmp_path, monkeypatch):
    """A library that answers as the real one does there."""
    (tmp_path / "other.cpp").write_text(_OTHER_GPU)
    subprocess.run(["g++", "-shared", "-fPIC", "-o", tmp_path / "other.so", tmp_path / "other.cpp"], check=True)
    monkeypatch.setattr(cuda, "LIBRARY", tmp_path / "other.so")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    cuda._library.cache_clear()
    try:
        assert cuda.available()
        with pytest.warns(UserWarning, match=r"no kernel image is available\).*CUDA_ARCHS=75 .*merged on the CPU"):
            assert not cuda.runs_on(torch.device("cuda:0"))
        monkeypatch.setenv("MEGATRON_DEMIX_CUDA", "1")
        with pytest.raises(ConfigError, match="MEGATRON_DEMIX_CUDA is 1, but the CUDA kernels do not run on cuda:0"):
            cuda.runs_on(torch.device("cuda:0"))
    finally:
        cuda._library.cache_clear()


def test_other_settings_build_the_kernels_again(tmp_path):
    """setup.py with a core of one empty file and an nvcc that notes what it is told."""
    root = Path(__file__).parents[3]
    for file in ("setup.py", "csrc/cuda/merge.cu", "csrc/dtype.hpp"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / file, tmp_path / file)
    (tmp_path / "csrc" / "empty.cpp").write_text("")
    (tmp_path / "megatron_demix").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/said\nwhile [ "$1" != -o ]; do shift; done\ntouch "$2"\n')
    nvcc.chmod(0o755)

    on_path = {"PATH": f"{nvcc.parent}:{os.environ['PATH']}"}

    def build(archs: str, found: dict[str, str] = on_path) -> list[str]:
        environ = {k: v for k, v in os.environ.items() if k != "CUDA_HOME"} | found | {"MEGATRON_DEMIX_CUDA": "1"}
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        subprocess.run(
            command,
            cwd=tmp_path,
            env=environ | {"MEGATRON_DEMIX_CUDA_ARCHS": archs},
            check=True,
            capture_output=True,
            timeout=200,
        )
        return (tmp_path / "said").read_text().splitlines()

    assert len(build("90;80;120")) == len(build("90;80;120")) == 1
    (first, second) = build("75", {"CUDA_HOME": str(tmp_path)})
    assert first.count("code=compute_") == 1
    assert "arch=compute_80,code=compute_80" in first  # whatever the order, for all between and above
    assert "code=sm_75" in second


OLD_DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int* version) { return *version = 9000, 0; }
int cuGetProcAddress_v2(const char* name, void** found, int version, unsigned long flags, int* status) {
    *found = strcmp(name, "cuInit") ? strcmp(name, "cuDriverGetVersion") ? 0 : (void*)cuDriverGetVersion : (void*)cuInit;
    return *found ? 0 : 500;
}
int cuGetProcAddress(const char* name, void** found, int version, unsigned long flags) {
    return cuGetProcAddress_v2(name, found, version, flags, 0);
}
"""


@pytest.mark.skipif(not cuda.LIBRARY.is_file() or shutil.which("gcc") is None, reason="needs the kernels' library, and gcc")
def test_a_driver_that_is_too_old_is_called_so(tmp_path):
    (tmp_path / "driver.c").write_text(OLD_DRIVER)
    build = ["gcc", "-w", "-shared", "-fPIC", "-o", str(tmp_path / "libcuda.so.1"), str(tmp_path / "driver.c")]
    subprocess.run(build, check=True)
    asks = "from megatron_demix.merge import cuda; print(cuda.why_not())"
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", asks], env=environment, capture_output=True, text=True)
    assert "older than the CUDA" in done.stdout, done.stderr
