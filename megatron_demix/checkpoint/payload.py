"""One chunk's elements inside the torch.save archive that holds them, found without torch and without a copy.

torch stores a tensor's elements in the record `<archive>/data/0` and describes them in `<archive>/data.pkl`: a call that
rebuilds the tensor from its storage, offset, sizes and strides. A saved view or transpose keeps its strides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from megatron_demix.checkpoint.archive import check_entry, read_archive
from megatron_demix.checkpoint.dtypes import ITEM_BYTES, STORAGES
from megatron_demix.checkpoint.pickles import ordered_dict, plain_tuple, read_pickle
from megatron_demix.errors import CorruptInput
from megatron_demix.native import crc32


@dataclass(frozen=True, slots=True)
class Payload:
    """A tensor inside its record. record: uint8 view of the file; strides in elements; offset_bytes: of the first element.

    crc: what the archive promises of the record, or, where it was saved without checksums, what it has now.
    """

    record: np.ndarray
    crc: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset_bytes: int

    def at(self, index: int) -> Payload:
        """Its part at an index of the first dimension. The index must lie within it."""
        offset = self.offset_bytes + index * self.strides[0] * ITEM_BYTES[self.dtype]
        return replace(self, shape=self.shape[1:], strides=self.strides[1:], offset_bytes=offset)

    def stacked(self) -> Payload:
        """With a first dimension of size 1."""
        return replace(self, shape=(1, *self.shape), strides=(math.prod(self.shape), *self.strides))


def read_payload(blob: np.ndarray, what: object) -> Payload:
    """Find the tensor in a torch.save zip (uint8, [bytes]) without copying it. Raises CorruptInput naming `what`."""
    entries = read_archive(blob, what)
    names = [n for n in entries if n.endswith("/data.pkl")]
    if len(names) != 1:
        raise CorruptInput(f"{what}: not a torch.save archive (it has {len(names)} data.pkl records, expected 1).")
    archive = names[0].removesuffix("data.pkl")
    described, crc = entries[names[0]]
    pickled = check_entry(described.tobytes(), crc, "data.pkl", what)
    try:
        record_name, dtype, offset, shape, strides, num_elements = _describe(pickled)
    except CorruptInput as e:
        raise CorruptInput(f"{what}: {e}") from e
    if archive + "data/" + record_name not in entries:
        raise CorruptInput(f"{what}: its record data/{record_name} is missing.")
    if (order := entries.get(archive + "byteorder")) is not None and order[0].tobytes() != b"little":
        raise CorruptInput(f"{what}: was written on a big-endian machine, which is not supported.")
    record, crc = entries[archive + "data/" + record_name]
    item = ITEM_BYTES[dtype]
    extent = 0
    if all(shape):
        extent = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
    else:
        offset = 0  # a view of nothing may begin anywhere
    if record.nbytes < num_elements * item or (offset + extent) * item > record.nbytes:
        raise CorruptInput(
            f"{what}: its record has {record.nbytes} bytes, but its description needs "
            f"{max(num_elements, offset + extent) * item}."
        )
    return Payload(record, crc32(record) if crc is None else crc, dtype, shape, strides, offset * item)


@lru_cache(maxsize=4096)
def _describe(pickled: bytes) -> tuple[str, str, int, tuple[int, ...], tuple[int, ...], int]:
    """(record name, dtype, offset, shape, strides, elements in storage) from data.pkl. Cached: most chunks look alike."""

    def storage(pid: Any) -> tuple[str, str, int]:
        _, dtype, name, _, elements = pid
        return name, dtype, elements

    def rebuild(stored: tuple, offset: int, shape: tuple, strides: tuple, _grad: Any, _hooks: Any, *rest: Any) -> tuple:
        name, dtype, elements = stored
        if dtype == "untyped":
            dtype = rest[0]
            elements //= ITEM_BYTES[dtype] if isinstance(dtype, str) else 1
        return name, dtype, offset, tuple(shape), tuple(strides), elements

    allowed: dict[str, Any] = {
        "torch._utils._rebuild_tensor_v2": rebuild,
        "torch._utils._rebuild_tensor_v3": rebuild,
        "torch._utils._rebuild_parameter": lambda data, *_: data,
        "torch.Size": plain_tuple,
        "torch.storage.UntypedStorage": "untyped",
        "collections.OrderedDict": ordered_dict,
        **{f"torch.{name}": dtype for name, dtype in STORAGES.items()},
        **{f"torch.{dtype}": dtype for dtype in ITEM_BYTES},
    }
    found = read_pickle(pickled, allowed, "data.pkl", persistent=storage)
    try:
        name, dtype, offset, shape, strides, elements = found
        numbers = (offset, elements, *shape, *strides)
        if not (isinstance(name, str) and isinstance(dtype, str)) or dtype not in ITEM_BYTES or len(shape) != len(strides):
            raise ValueError
        if not all(isinstance(n, int) and 0 <= n < 1 << 62 for n in numbers):
            raise ValueError
    except (TypeError, ValueError) as e:
        raise CorruptInput("data.pkl describes something else than one dense tensor.") from e
    return name, dtype, offset, shape, strides, elements
