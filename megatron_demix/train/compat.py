"""What megatron.core needs where there is no CUDA device: everything it addresses to "cuda" lands on the CPU.

This is the one place for it. On a machine with CUDA, cpu_compat() replaces nothing; it only gives the router of experts a name
that some versions lack.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


class _CudaMeansCpu(TorchFunctionMode):
    """Redirects `device="cuda"` to the CPU, makes `.cuda()` the identity and lets `.type()` say torch.cuda.*, which
    megatron.core's optimizer compares with."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if kwargs:
            device = kwargs.get("device")
            if device is not None and str(device).startswith("cuda"):
                kwargs = {**kwargs, "device": _CPU}
            return func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1:
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args)


def _does_nothing() -> Callable:
    """Another one each time: torch's compiler refuses one function that it has two rules for."""
    return lambda *_, **__: None


def _compile_nothing(*_: Any, **__: Any) -> None:
    raise RuntimeError("there is no CUDA device to compile for")


def _seed_cpu(seed: int) -> None:
    torch.manual_seed(seed)


def _get_cpu_rng_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_cpu_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(state)


_CUDA_STAND_INS: dict[str, Callable] = {
    "current_device": lambda: _CPU,
    "current_stream": _does_nothing(),
    "empty_cache": _does_nothing(),
    "set_device": _does_nothing(),
    "synchronize": _does_nothing(),
    "manual_seed": _seed_cpu,
    "get_rng_state": _get_cpu_rng_state,
    "set_rng_state": _set_cpu_rng_state,
    "get_device_capability": lambda device=None: (0, 0),
}


def on_cpu() -> bool:
    """True where torch sees no CUDA device, so that gloo and the local layer spec are used."""
    return not torch.cuda.is_available()


_active = False


@contextmanager
def cpu_compat() -> Iterator[None]:
    """megatron.core works on this machine inside this context; everything replaced is restored at its end.

    Import megatron.core inside it where possible: its fusers then stay plain functions on a CPU, which spares each process
    the import of torch's compiler. Nesting is fine.
    """
    global _active
    if _active:
        yield
        return
    if not on_cpu():
        with _router_without_te():
            yield
        return
    _import_core_uncompiled()
    import megatron.core.tensor_parallel.random as random
    import torch._dynamo  # torch.optim does anyway

    with ExitStack() as stack:
        for name, stand_in in _CUDA_STAND_INS.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        for name in ("range_push", "range_pop"):
            stack.enter_context(mock.patch.object(torch.cuda.nvtx, name, _does_nothing()))
        stack.enter_context(mock.patch.object(random, "_get_cuda_rng_state", _get_cpu_rng_state))
        stack.enter_context(mock.patch.object(random, "_set_cuda_rng_state", _set_cpu_rng_state))
        stack.enter_context(_router_without_te())
        stack.enter_context(mock.patch.object(torch._dynamo.config, "disable", True))
        # With one generator for both, it would warn at each dropout that "the CPU's" has changed.
        stack.enter_context(mock.patch.object(logging.getLogger(random.__name__), "disabled", True))
        stack.enter_context(_CudaMeansCpu())
        _active = True
        try:
            yield
        finally:
            _active = False


@contextmanager
def _router_without_te() -> Iterator[None]:
    """megatron.core 0.15 and 0.16 ask whether Transformer Engine's product is None, and define it only where that is there."""
    import megatron.core.transformer.moe.moe_utils as moe_utils

    if hasattr(moe_utils, "te_general_gemm"):
        yield
        return
    with mock.patch.object(moe_utils, "te_general_gemm", None, create=True):
        yield


def _import_core_uncompiled() -> None:
    """Import megatron.core so that its `jit_fuser` is the identity, as its own disable_jit_fuser() would make it.

    Decorating with torch.compile imports inductor, which takes longer than all the rest of megatron.core. Version 0.15 compiles
    an allocator for the GPUs that torch sees when it is imported: with a CUDA build of torch, nvcc and no GPU, that is an
    IndexError. A RuntimeError it takes for an answer.
    """
    if "megatron.core" in sys.modules:
        return
    import torch.utils.cpp_extension as cpp_extension

    with warnings.catch_warnings(), ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "compile", lambda model=None, **_: model or (lambda f: f)))
        stack.enter_context(mock.patch.object(cpp_extension, "load_inline", _compile_nothing))
        warnings.simplefilter("ignore")  # one warning for every package that it can do without
        import megatron.core
        import megatron.core.models.gpt.gpt_layer_specs
        import megatron.core.optimizer
        import megatron.core.transformer.moe.moe_utils  # noqa: F401
