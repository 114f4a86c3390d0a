"""The CUDA kernels, loaded only where they were built and a device is present (csrc/cuda/merge.cu)."""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_demix.errors import ConfigError

if TYPE_CHECKING:
    import torch

MAX_SOURCES = 64
_INSUFFICIENT_DRIVER = 35  # cudaErrorInsufficientDriver

LIBRARY = Path(__file__).parents[1] / "libmerge_cuda.so"
_DTYPES = {"torch.float32": 0, "torch.bfloat16": 1, "torch.float16": 2}


@cache
def _library() -> ctypes.CDLL | None:
    if not LIBRARY.is_file():
        return None
    library = ctypes.CDLL(str(LIBRARY))
    library.demix_cuda_error.restype = ctypes.c_char_p
    pointers = ctypes.POINTER(ctypes.c_void_p)
    floats = ctypes.POINTER(ctypes.c_float)
    library.demix_cuda_weighted_sum.argtypes = [
        pointers, pointers, floats, ctypes.c_int, ctypes.c_int, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_void_p
    ]  # fmt: skip
    return library


def available() -> bool:
    """Whether the kernels can run here. MEGATRON_DEMIX_CUDA=0 says no; =1 raises ConfigError where they cannot."""
    wanted = os.environ.get("MEGATRON_DEMIX_CUDA", "auto")
    if wanted == "0":
        return False
    if wanted == "1" and (why := why_not()):
        raise ConfigError(f"MEGATRON_DEMIX_CUDA is 1, but {why}. Build where nvcc is and run where a GPU is, or unset it.")
    return why_not() is None


def why_not() -> str | None:
    """Why the kernels cannot run here, or None if they can."""
    library = _library()
    if library is None:
        return f"{LIBRARY} was not built"
    count = library.demix_cuda_device_count()
    if count == -_INSUFFICIENT_DRIVER:
        return "no NVIDIA driver is loaded, or it is older than the CUDA that the kernels were built with"
    if count < 0:
        return f"CUDA says of this machine: {library.demix_cuda_error(-count).decode()}"
    return None if count else "no CUDA device is visible"


def runs_on(device: torch.device) -> bool:
    """Whether the kernels were built for this GPU; warns where they were not. MEGATRON_DEMIX_CUDA=1: raises ConfigError then.

    Only where available()."""
    import torch

    library = _library()
    assert library is not None
    with torch.cuda.device(device):
        code = library.demix_cuda_runs_here()
    if not code:
        return True
    said = (
        f"the CUDA kernels do not run on {device} ({library.demix_cuda_error(code).decode()}). Build them for it: "
        f"MEGATRON_DEMIX_CUDA_ARCHS={''.join(map(str, torch.cuda.get_device_capability(device)))} with setup.py or pip."
    )
    if required():
        raise ConfigError(f"MEGATRON_DEMIX_CUDA is 1, but {said}")
    warnings.warn(f"{said} Until then proxies are merged on the CPU.", stacklevel=2)
    return False


def required() -> bool:
    """Whether MEGATRON_DEMIX_CUDA asks for the device whatever it costs."""
    return os.environ.get("MEGATRON_DEMIX_CUDA") == "1"


def weighted_sum(sources: Sequence[torch.Tensor], outs: Sequence[torch.Tensor], weights_MK: np.ndarray) -> None:
    """outs[m] = sum_k weights_MK[m, k] * sources[k], on the tensors' device, in its current stream, without waiting.

    sources: 1 <= K <= 64; sources and outs are contiguous, of one size and each of one dtype. The bits are those of the CPU
    kernels. Raises ValueError where the tensors do not fit, RuntimeError with CUDA's own message where the launch fails.
    """
    import torch

    library = _library()
    everything = [*sources, *outs]
    first_in, first_out = sources[0], outs[0]
    same = all(t.is_contiguous() and t.numel() == first_in.numel() and t.device == first_in.device for t in everything)
    if not same or first_in.device.type != "cuda" or library is None or len(sources) > MAX_SOURCES:
        raise ValueError("sources and outs must be contiguous tensors of one size on one CUDA device, at most 64 sources")
    if any(t.dtype != first_in.dtype for t in sources) or any(t.dtype != first_out.dtype for t in outs):
        raise ValueError("sources must have one dtype, and outs one dtype")
    weights = np.ascontiguousarray(weights_MK, np.float32)
    if weights.shape != (len(outs), len(sources)):
        raise ValueError(f"weights have shape {weights.shape}, expected {(len(outs), len(sources))}")
    with torch.cuda.device(first_in.device):
        code = library.demix_cuda_weighted_sum(
            (ctypes.c_void_p * len(sources))(*(t.data_ptr() for t in sources)),
            (ctypes.c_void_p * len(outs))(*(t.data_ptr() for t in outs)),
            weights.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
            len(sources),
            len(outs),
            first_in.numel(),
            _DTYPES[str(first_in.dtype)],
            _DTYPES[str(first_out.dtype)],
            torch.cuda.current_stream().cuda_stream,
        )
    if code:
        raise RuntimeError(f"CUDA merge: {library.demix_cuda_error(code).decode()}")
