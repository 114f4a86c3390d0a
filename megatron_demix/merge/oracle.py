"""What a merge should give, slowly: float64, one element at a time if need be, by none of the code that is checked with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_demix.checkpoint.dtypes import ARRAY_DTYPES, ITEM_BYTES
from megatron_demix.checkpoint.metadata import Shape
from megatron_demix.checkpoint.payload import Payload
from megatron_demix.merge.components import Components

# Half a unit in the last place, relative; and the smallest positive number, of each type.
HALF_ULP = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
TINY = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}

# From here on a sum in float32 may overflow where one in float64 does not.
_OVERFLOW = 3.4e38


@dataclass(frozen=True)
class Expected:
    """[n] values, and how far a merge in float32 that rounds once to the output's type may lie from each."""

    values: np.ndarray
    bounds: np.ndarray


# What elements (indices [n, dims] in tensor `key`) should be. Where rounding may tip a decision, each outcome is listed.
Expectation = Callable[[str, np.ndarray], list[Expected]]


def elements(payload: Payload, indices: np.ndarray) -> np.ndarray:
    """Elements of a chunk as float64. indices: [n, dims] within the chunk."""
    item = ITEM_BYTES[payload.dtype]
    at = payload.offset_bytes + item * (indices @ np.array(payload.strides, np.int64).reshape(-1))
    raw = payload.record[(at[:, np.newaxis] + np.arange(item)).reshape(-1)].tobytes()
    return to_float64(raw, payload.dtype)


def to_float64(raw: bytes, dtype: str) -> np.ndarray:
    return _widened(np.frombuffer(raw, ARRAY_DTYPES[dtype]), dtype)


def _widened(stored: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float64)


def component_values(components: Components, key: str, indices: np.ndarray) -> np.ndarray:
    """[K, n] elements at global indices [n, dims]."""
    values = np.zeros((len(components.checkpoints), len(indices)))
    first, last = indices.min(axis=0).tolist(), indices.max(axis=0).tolist()
    for k, info in enumerate(components.infos(key)):
        for i in components.touching(k, key, first, last):
            chunk = info.chunks[i]
            lo = np.array(chunk.offset, np.int64)
            here = ((indices >= lo) & (indices < lo + np.array(chunk.shape, np.int64))).all(axis=1)
            if here.any():
                values[k, here] = elements(components.payload(k, info, i), indices[here] - lo)
    return values


def component_box(components: Components, k: int, key: str, lo: Shape, hi: Shape) -> np.ndarray:
    """The elements [lo, hi) of a tensor of component k, as a float64 array of that shape."""
    info = components.infos(key)[k]
    box = np.empty([b - a for a, b in zip(lo, hi, strict=True)])
    for i in components.touching(k, key, lo, [b - 1 for b in hi]):
        chunk = info.chunks[i]
        ends = [o + n for o, n in zip(chunk.offset, chunk.shape, strict=True)]
        first = [max(a, o) for a, o in zip(lo, chunk.offset, strict=True)]
        last = [min(b, e) for b, e in zip(hi, ends, strict=True)]
        if any(a >= b for a, b in zip(first, last, strict=True)):
            continue
        payload = components.payload(k, info, i)
        strides = [s * ITEM_BYTES[info.dtype] for s in payload.strides]
        stored = np.ndarray(chunk.shape, ARRAY_DTYPES[info.dtype], payload.record.data, payload.offset_bytes, strides)
        inside = tuple(slice(a - o, b - o) for a, b, o in zip(first, last, chunk.offset, strict=True))
        box[tuple(slice(a - o, b - o) for a, b, o in zip(first, last, lo, strict=True))] = _widened(stored[inside], info.dtype)
    return box


def linear(weights_K: np.ndarray, values_KN: np.ndarray) -> np.ndarray:
    """sum_k weights[k] * values[k] in float64; a weight of 0 leaves its component out."""
    used = weights_K != 0
    with np.errstate(invalid="ignore", over="ignore"):
        return weights_K[used] @ values_KN[used] if used.any() else np.zeros(values_KN.shape[1])


def error_bound(weights_K: np.ndarray, values_KN: np.ndarray, dtype: str) -> np.ndarray:
    """How far a merge that accumulates in float32 and rounds once may lie from the exact value, by element.

    Half a unit of the output type, plus what rounding the weights to float32 takes away, plus K * (2^-24 * sum |w x| + 2^-150)
    for K multiply-adds. Infinite where the sum may overflow.
    """
    used = weights_K != 0
    weights, sizes = weights_K[used], np.abs(values_KN[used])
    narrow = weights.astype(np.float32).astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        magnitude = np.abs(narrow) @ sizes
        sums = np.abs(weights - narrow) @ sizes + len(weights) * (2.0**-24 * 1.0001 * magnitude + 2.0**-150)
        return rounded_bound(linear(weights_K, values_KN), sums, magnitude, dtype)


def rounded_bound(values: np.ndarray, sums: np.ndarray, magnitude: np.ndarray, dtype: str) -> np.ndarray:
    """The bound after rounding to a type, from that of the float32 sums and the size of what was added."""
    bound = (np.abs(values) + sums) * HALF_ULP[dtype] * 1.0001 + TINY[dtype] + sums
    return np.where(magnitude >= _OVERFLOW, np.inf, bound)
