"""What a linear merge must write, bit for bit, by other means: fused multiply-adds in float32, made of exact float64 steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

_NAN = {torch.float32: 0x7FC00000, torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}


def linear_merge(sources: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """sum_k weights[k] * sources[k] in the sources' type.

    Weights are rounded to float32 and those that are then zero left out; one source of weight 1 is copied; else terms are added
    in order, each by one fused multiply-add, and the sum is rounded once, to nearest even. A NaN that is computed is the
    positive quiet one.
    """
    dtype = sources[0].dtype
    terms = [(np.float32(w), s) for w, s in zip(weights, sources, strict=True) if np.float32(w) != 0]
    if not terms:
        return torch.zeros_like(sources[0])
    if len(terms) == 1 and terms[0][0] == 1:
        return terms[0][1].clone()
    with np.errstate(all="ignore"):
        total: np.ndarray | None = None
        for weight, source in terms:
            values = source.float().numpy().astype(np.float64)
            product = np.float64(weight) * values  # exact: two 24-bit significands
            total = (product if total is None else _add_to_odd(product, total.astype(np.float64))).astype(np.float32)
    assert total is not None
    merged = torch.from_numpy(np.ascontiguousarray(total)).reshape(sources[0].shape).to(dtype)
    merged.view(torch.int32 if dtype == torch.float32 else torch.int16)[merged.isnan()] = _NAN[dtype]
    return merged


def _add_to_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b rounded to odd: rounding this again, to fewer bits, gives what rounding the exact sum would."""
    a, b = np.broadcast_arrays(a, b)
    total = a + b
    from_b = total - a
    error = (a - (total - from_b)) + (b - from_b)
    even = (np.ascontiguousarray(total).view(np.int64) & 1) == 0
    inexact = np.isfinite(total) & (error != 0) & even
    return np.where(inexact, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)
