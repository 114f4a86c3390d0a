"""What a merge should give, slowly: float64, one element at a time if need be, by none of the code that is checked with it."""

from __future__ import annotations

import numpy as np

from megatron_demix.checkpoint.dtypes import ITEM_BYTES
from megatron_demix.checkpoint.payload import Payload

# Half a unit in the last place, relative; and the smallest positive number, of each type.
HALF_ULP = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
_TINY = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}


def elements(payload: Payload, indices: np.ndarray) -> np.ndarray:
    """Elements of a chunk as float64. indices: [n, dims] within the chunk."""
    item = ITEM_BYTES[payload.dtype]
    at = payload.offset_bytes + item * (indices @ np.array(payload.strides, np.int64).reshape(-1))
    raw = payload.record[(at[:, np.newaxis] + np.arange(item)).reshape(-1)].tobytes()
    return to_float64(raw, payload.dtype)


def to_float64(raw: bytes, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.frombuffer(raw, {"float32": "<f4", "float16": "<f2"}[dtype]).astype(np.float64)


def linear(weights_K: np.ndarray, values_KN: np.ndarray) -> np.ndarray:
    """sum_k weights[k] * values[k] in float64; a weight of 0 leaves its component out."""
    used = weights_K != 0
    with np.errstate(invalid="ignore", over="ignore"):
        return weights_K[used] @ values_KN[used] if used.any() else np.zeros(values_KN.shape[1])


def error_bound(weights_K: np.ndarray, values_KN: np.ndarray, dtype: str) -> np.ndarray:
    """How far a merge that accumulates in float32 and rounds once may lie from the exact value, by element.

    Half a unit of the output type, plus (K + 1) * 2^-24 * sum |w x| for rounded weights and K multiply-adds.
    """
    used = weights_K != 0
    with np.errstate(invalid="ignore", over="ignore"):
        magnitude = np.abs(weights_K[used]) @ np.abs(values_KN[used])
        sums = (int(used.sum()) + 1) * 2.0**-24 * magnitude
        return (np.abs(linear(weights_K, values_KN)) + sums) * HALF_ULP[dtype] * 1.0001 + _TINY[dtype] + sums
