"""A written merge, read again: its archives and checksums, and its elements against the float64 oracle."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_demix.checkpoint.metadata import TensorInfo
from megatron_demix.checkpoint.reader import Checkpoint
from megatron_demix.errors import CorruptInput, VerificationFailed
from megatron_demix.merge import oracle
from megatron_demix.merge.components import Components
from megatron_demix.native import crc32

Verify = Literal["none", "sample", "full"]

_CHUNKS_SAMPLED = 8
_ELEMENTS_SAMPLED = 256


def verify_linear(folder: Path, components: Components, weights_K: np.ndarray, how: Verify, label: str) -> None:
    """Compare a merged checkpoint with its components. Raises VerificationFailed naming the tensor.

    sample: 8 chunks: checksum, and 256 elements against the oracle. full: every chunk's checksum, 256 elements of each, and a
    read of every chunk through torch's own loader.
    """
    if how == "none":
        return
    try:
        merged = Checkpoint(folder)
        chunks = [
            (info, i)
            for info in merged.model_tensors.values()
            for i in range(len(info.chunks))
            if info.key in components.tensors
        ]
        if {info.key for info, _ in chunks} != set(components.tensors):
            raise VerificationFailed(f"{label}: the merged checkpoint does not hold the components' tensors.")
        chosen = chunks if how == "full" else random.Random(0).sample(chunks, min(_CHUNKS_SAMPLED, len(chunks)))
        for info, index in chosen:
            _verify_chunk(merged, info, index, components, weights_K, label)
        if how == "full":
            _read_with_torch(merged, chunks, label)
    except CorruptInput as e:
        raise VerificationFailed(f"{label}: was written and cannot be read again: {e}") from e


def _verify_chunk(
    merged: Checkpoint, info: TensorInfo, index: int, components: Components, weights_K: np.ndarray, label: str
) -> None:
    chunk, payload = info.chunks[index], merged.payload(info, info.chunks[index])
    if crc32(payload.record) != payload.crc:
        raise VerificationFailed(f"{label}: {info.key!r} at {chunk.offset}: its bytes on disk differ from their checksum.")
    if 0 in chunk.shape:
        return
    rng = np.random.default_rng(0)
    n = _ELEMENTS_SAMPLED
    inside = np.stack([rng.integers(0, size, n) for size in chunk.shape], axis=1) if chunk.shape else np.zeros((1, 0), np.int64)
    expected_from = _component_values(components, info.key, inside + np.array(chunk.offset, np.int64))
    expected = oracle.linear(weights_K, expected_from)
    bound = oracle.error_bound(weights_K, expected_from, info.dtype)
    found = oracle.elements(payload, inside)
    limit = {"float32": 3.4028235677973366e38, "bfloat16": 3.3961775292304957e38, "float16": 65520.0}[info.dtype]
    with np.errstate(invalid="ignore"):
        same = (np.abs(found - expected) <= bound) | (np.isnan(found) & np.isnan(expected)) | (found == expected)
        # Beyond the largest number the rounded result is infinite; at the very edge either is right.
        same |= np.isinf(found) & (np.abs(expected) + bound >= limit) & (np.sign(found) == np.sign(expected))
        # An intermediate float32 sum can overflow where float64 does not, or meet infinities of both signs.
        same |= ~np.isfinite(bound) | (np.abs(weights_K) @ np.abs(expected_from) >= 3.4e38)
    if not same.all():
        i = int(np.flatnonzero(~same)[0])
        raise VerificationFailed(
            f"{label}: {info.key!r}, element {tuple((inside[i] + chunk.offset).tolist())} is {found[i]!r}, expected "
            f"{expected[i]!r} within {bound[i]:.3g}. Not published."
        )


def _component_values(components: Components, key: str, indices: np.ndarray) -> np.ndarray:
    """[K, n] elements at global indices [n, dims]."""
    values = np.zeros((len(components.checkpoints), len(indices)))
    first, last = indices.min(axis=0).tolist(), indices.max(axis=0).tolist()
    for k, info in enumerate(components.infos(key)):
        for i, chunk in enumerate(info.chunks):
            if any(o > b or o + n <= a for o, n, a, b in zip(chunk.offset, chunk.shape, first, last, strict=True)):
                continue
            lo = np.array(chunk.offset, np.int64)
            here = ((indices >= lo) & (indices < lo + np.array(chunk.shape, np.int64))).all(axis=1)
            if here.any():
                values[k, here] = oracle.elements(components.payload(k, info, i), indices[here] - lo)
    return values


def _read_with_torch(merged: Checkpoint, chunks: Sequence[tuple[TensorInfo, int]], label: str) -> None:
    import io

    import torch
    from torch.distributed.checkpoint import FileSystemReader

    listed = FileSystemReader(merged.location.path).read_metadata().state_dict_metadata
    for info, index in chunks:
        chunk = info.chunks[index]
        blob = merged.blob(chunk.location, info.key).tobytes()
        tensor = torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
        payload = merged.payload(info, chunk)
        bits = tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)
        if info.key not in listed or tuple(tensor.shape) != chunk.shape or bits.numpy().tobytes() != payload.record.tobytes():
            raise VerificationFailed(
                f"{label}: torch reads {info.key!r} at {chunk.offset} differently from how it was written."
            )
