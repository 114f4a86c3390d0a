"""A written merge, read again: its archives and checksums, and its elements against the float64 oracle."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_demix.checkpoint.metadata import Shape, TensorInfo
from megatron_demix.checkpoint.payload import Payload
from megatron_demix.checkpoint.reader import Checkpoint
from megatron_demix.errors import CorruptInput, VerificationFailed
from megatron_demix.merge import oracle
from megatron_demix.merge.components import Components
from megatron_demix.merge.oracle import Expectation, Expected
from megatron_demix.native import crc32

Verify = Literal["none", "sample", "full"]

_CHUNKS_SAMPLED = 8
_CHECKSUMS_SAMPLED_BYTES = 16 << 20
# Elements next to each other share a page: what was written past the page cache comes from the disk page by page.
_SPOTS, _ELEMENTS_A_SPOT = 16, 16


def verify_merge(folder: Path, components: Components, expected: Expectation, how: Verify, label: str) -> None:
    """Compare a merged checkpoint with what the oracle expects of its elements. Raises VerificationFailed naming the tensor.

    sample: 8 chunks: 256 elements of each against the oracle, and the checksums of as many of them as fit into 16 MiB. full:
    every chunk's checksum, 256 elements of each, and a read of every chunk through torch's own loader.
    """
    if how == "none":
        return
    try:
        merged = Checkpoint(folder, read_ahead=how == "full")
        chunks = [
            (info, i)
            for info in merged.model_tensors.values()
            for i in range(len(info.chunks))
            if info.key in components.tensors
        ]
        if {info.key for info, _ in chunks} != set(components.tensors):
            raise VerificationFailed(f"{label}: the merged checkpoint does not hold the components' tensors.")
        chosen = chunks if how == "full" else random.Random(0).sample(chunks, min(_CHUNKS_SAMPLED, len(chunks)))
        whole, left = set(), _CHECKSUMS_SAMPLED_BYTES
        for info, index in chosen:
            location = info.chunks[index].location
            if how == "full" or location.length <= left:
                whole.add(location)
                left -= location.length
            if how == "sample" and location in whole:
                merged.prefetch(location, info.key)  # all of them at once, while elements are compared
        for info, index in chosen:
            location = info.chunks[index].location
            if how == "full":
                merged.prefetch(location, info.key)
            payload = merged.payload(info, info.chunks[index])
            _verify_elements(payload, info, index, expected, label)
            if location in whole:
                _verify_checksum(payload, info, index, label)
        if how == "full":
            _read_with_torch(merged, chunks, label)
    except CorruptInput as e:
        raise VerificationFailed(f"{label}: was written and cannot be read again: {e}") from e


def _verify_checksum(payload: Payload, info: TensorInfo, index: int, label: str) -> None:
    if crc32(payload.record) != payload.crc:
        offset = info.chunks[index].offset
        raise VerificationFailed(f"{label}: {info.key!r} at {offset}: its bytes on disk differ from their checksum.")


def _verify_elements(payload: Payload, info: TensorInfo, index: int, expected: Expectation, label: str) -> None:
    chunk = info.chunks[index]
    if 0 in chunk.shape:
        return
    inside = _spots(chunk.shape)
    outcomes = expected(info.key, inside + np.array(chunk.offset, np.int64))
    found = oracle.elements(payload, inside)
    same = np.zeros(len(found), bool)
    for outcome in outcomes:
        same |= _agree(found, outcome, info.dtype)
    if not same.all():
        i = int(np.flatnonzero(~same)[0])
        raise VerificationFailed(
            f"{label}: {info.key!r}, element {tuple((inside[i] + chunk.offset).tolist())} is {float(found[i])!r}, "
            f"expected {float(outcomes[0].values[i])!r} within {outcomes[0].bounds[i]:.3g}. Not published."
        )


def _spots(shape: Shape) -> np.ndarray:
    """[256, dims] places in a box: runs of neighbours along the last dimension from random places on."""
    if not shape:
        return np.zeros((1, 0), np.int64)
    draw = random.Random(0)
    places = np.array([[draw.randrange(size) for size in shape] for _ in range(_SPOTS)], np.int64)
    places = places.repeat(_ELEMENTS_A_SPOT, axis=0)
    places[:, -1] = (places[:, -1] + np.tile(np.arange(_ELEMENTS_A_SPOT), _SPOTS)) % shape[-1]
    return places


def _agree(found: np.ndarray, expected: Expected, dtype: str) -> np.ndarray:
    limit = {"float32": 3.4028235677973366e38, "bfloat16": 3.3961775292304957e38, "float16": 65520.0}[dtype]
    values, bounds = expected.values, expected.bounds
    with np.errstate(invalid="ignore"):
        same = (np.abs(found - values) <= bounds) | (np.isnan(found) & np.isnan(values)) | (found == values)
        # Beyond the largest number the rounded result is infinite; at the very edge either is right.
        same |= np.isinf(found) & (np.abs(values) + bounds >= limit) & (np.sign(found) == np.sign(values))
        # An intermediate float32 sum can overflow where float64 does not, or meet infinities of both signs.
        return np.asarray(same | ~np.isfinite(bounds))


def _read_with_torch(merged: Checkpoint, chunks: Sequence[tuple[TensorInfo, int]], label: str) -> None:
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
