"""cpu_compat: what it redirects, and that nothing of it is left afterwards."""

import subprocess
import sys

import pytest
import torch

from megatron_demix.train.compat import cpu_compat, on_cpu

pytestmark = pytest.mark.skipif(not on_cpu(), reason="does nothing where there is a CUDA device")


def test_cuda_means_cpu_inside_and_nothing_outside():
    with cpu_compat():
        import megatron.core.tensor_parallel.random as core_random
        import megatron.core.transformer.moe.moe_utils as moe_utils
    places = [(torch.cuda, n) for n in ("current_device", "synchronize", "get_rng_state", "manual_seed", "current_stream")]
    places += [(torch.cuda.nvtx, "range_push"), (core_random, "_get_cuda_rng_state"), (torch._dynamo.config, "disable")]
    before = [getattr(module, name) for module, name in places]
    had_gemm = hasattr(moe_utils, "te_general_gemm")
    with cpu_compat():
        with cpu_compat():  # nesting is fine
            pass
        x = torch.zeros(2, device="cuda")
        assert x.device.type == "cpu"
        assert x.cuda() is x
        assert x.cuda(non_blocking=True) is x
        assert torch.ones(1, device=torch.device("cuda", 0)).device.type == "cpu"
        assert x.type() == "torch.cuda.FloatTensor"
        assert x.type(torch.float64).dtype is torch.float64
        assert torch.cuda.current_device() == torch.device("cpu")
        torch.cuda.manual_seed(3)
        state = torch.cuda.get_rng_state()
        first = torch.rand(2)
        torch.cuda.set_rng_state(state)
        assert torch.equal(torch.rand(2), first)
    assert [getattr(module, name) for module, name in places] == before
    assert hasattr(moe_utils, "te_general_gemm") == had_gemm
    assert x.type() == "torch.FloatTensor"
    with pytest.raises((RuntimeError, AssertionError), match=r"CUDA|NVIDIA"):
        torch.zeros(2, device="cuda")


def test_a_router_needs_no_transformer_engine_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr("megatron_demix.train.compat.on_cpu", lambda: False)
    with cpu_compat():
        from megatron.core.transformer.moe.moe_utils import RouterGatingLinearFunction

        weight = torch.eye(2, requires_grad=True)
        scores = RouterGatingLinearFunction.apply(torch.ones(1, 2), weight, None, torch.float32)
        scores.sum().backward()
        assert scores.tolist() == [[1.0, 1.0]]
        assert weight.grad is not None
        with pytest.raises((RuntimeError, AssertionError), match=r"CUDA|NVIDIA"):
            torch.zeros(2, device="cuda")  # nothing is redirected


def test_it_is_left_on_an_error_too():
    with pytest.raises(ValueError, match="mine"), cpu_compat():
        raise ValueError("mine")
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_core_is_imported_where_a_cuda_build_of_torch_finds_nvcc_and_no_gpu():
    """megatron.core 0.15 compiles for GPUs when it is imported; later versions when they are asked to."""
    program = """
import torch.utils.cpp_extension as cpp_extension

def compiles(*_, **__):
    raise IndexError("list index out of range")  # what torch says where it finds no GPU

cpp_extension.load_inline = compiles
from megatron_demix.train.compat import cpu_compat

with cpu_compat():
    from megatron.core.inference import unified_memory

assert cpp_extension.load_inline is compiles
try:
    unified_memory.load_inline()
except RuntimeError as e:
    print(e)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "there is no CUDA device to compile for\n"


def test_what_was_compiled_outside_runs_inside():
    """megatron.core may have been imported, and compiled, before."""
    compiled = torch.compile(lambda x: x + 1, backend="eager")
    try:
        with cpu_compat():
            torch._dynamo.trace_rules.clear_lru_cache()  # as torch does where a process group is made
            assert compiled(torch.ones(1)).item() == 2
    finally:
        torch._dynamo.trace_rules.clear_lru_cache()
