"""Writing a torch_dist checkpoint: where every item lies in which file, and the files around the elements.

The layout is a function of the items alone, so equal inputs give equal bytes whatever the machine and the number of threads.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from megatron_demix.checkpoint.archive import Frame, frame_archive
from megatron_demix.checkpoint.dtypes import ITEM_BYTES, STORAGE_OF
from megatron_demix.checkpoint.layout import BACKEND, METADATA
from megatron_demix.checkpoint.metadata import Shape
from megatron_demix.checkpoint.pickles import Global, Inert, Pickled, inert, instance, pickled, write_pickle

_FILE_BYTES = 512 << 20  # several files let threads, and several workers, write side by side


@dataclass(frozen=True, slots=True)
class TensorItem:
    """One chunk of a global tensor to be written; its elements come from the merge."""

    key: str
    dtype: str
    global_shape: Shape
    offset: Shape
    shape: Shape

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def frame(self, position: int, crc: int = 0) -> Frame:
        small = {
            "archive/data.pkl": _describe_tensor(self.dtype, self.shape),
            "archive/byteorder": b"little",
            "archive/version": b"3\n",
        }
        return frame_archive(small, "archive/data/0", self.num_bytes, crc, position)


@dataclass(frozen=True, slots=True)
class CopiedItem:
    """A stored item taken over byte for byte: a pickled object (no shape), or a chunk of a tensor that is not merged."""

    key: str
    data: memoryview
    dtype: str | None = None
    global_shape: Shape = ()
    offset: Shape | None = None
    shape: Shape = ()

    @property
    def num_bytes(self) -> int:
        return len(self.data)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where an item's archive begins, and how long it is. record_at: where a tensor item's elements begin in the file."""

    item: TensorItem | CopiedItem
    file: str
    position: int
    length: int
    record_at: int | None = None


def place(items: Sequence[TensorItem | CopiedItem]) -> list[Placement]:
    """Lay items out in files of about 512 MiB, in the order given within each file."""
    num_files = max(1, round(sum(item.num_bytes for item in items) / _FILE_BYTES))
    filled = [0] * num_files
    chosen: dict[int, int] = {}
    for i in sorted(range(len(items)), key=lambda i: (-items[i].num_bytes, i)):
        chosen[i] = filled.index(min(filled))
        filled[chosen[i]] += items[i].num_bytes
    ends = [0] * num_files
    placements = []
    for i, item in enumerate(items):
        n = chosen[i]
        length, record_at = item.num_bytes, None
        if isinstance(item, TensorItem):
            frame = item.frame(ends[n])
            length, record_at = frame.length, ends[n] + frame.record_at
        placements.append(Placement(item, f"__0_{n}.distcp", ends[n], length, record_at))
        ends[n] += length
    return placements


def metadata_files(placements: Sequence[Placement]) -> dict[str, bytes]:
    """`.metadata` and metadata.json, by name, for items that lie as placed."""
    entries: dict[str, Inert] = {}
    chunks: dict[str, list[Inert]] = {}
    stored: dict[Any, Inert] = {}
    for p in placements:
        item = p.item
        place_info = {"relative_path": p.file, "offset": p.position, "length": p.length}
        index: dict[str, Any] = {"fqn": item.key, "index": None}
        if item.offset is None:
            entries[item.key] = instance(f"{_DCP}.metadata.BytesStorageMetadata", state={})
        else:
            assert item.dtype is not None
            index["offset"] = _size(item.offset)
            if item.key not in entries:
                chunks[item.key] = []
                entries[item.key] = instance(
                    f"{_DCP}.metadata.TensorStorageMetadata",
                    state={"properties": _properties(item.dtype), "size": _size(item.global_shape), "chunks": chunks[item.key]},
                )
            chunks[item.key].append(
                instance(
                    f"{_DCP}.metadata.ChunkStorageMetadata", state={"offsets": _size(item.offset), "sizes": _size(item.shape)}
                )
            )
        stored[instance(f"{_DCP}.metadata.MetadataIndex", state=index)] = instance(
            f"{_DCP}.filesystem._StorageInfo", state=place_info
        )
    root = {
        "state_dict_metadata": entries,
        "planner_data": None,
        "storage_data": stored,
        "storage_meta": None,
        "version": "1.0.0",
    }
    backend = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    metadata = write_pickle(instance(f"{_DCP}.metadata.Metadata", state=root))
    return {METADATA: metadata, BACKEND: json.dumps(backend).encode()}


_DCP = "torch.distributed.checkpoint"


@lru_cache(maxsize=4096)
def _size(shape: Shape) -> Pickled:
    return pickled(instance("torch.Size", tuple(shape)))


def _properties(dtype: str) -> Inert:
    layout = instance("torch.serialization._get_layout", "torch.strided")
    contiguous = instance(f"{_DCP}.metadata._MEM_FORMAT_ENCODING", 0)
    return instance(f"{_DCP}.metadata.TensorProperties", state=(Global(f"torch.{dtype}"), layout, False, contiguous, False))


@lru_cache(maxsize=4096)
def _describe_tensor(dtype: str, shape: Shape) -> bytes:
    """data.pkl of a contiguous tensor, as torch.save writes it. Cached: most chunks look alike."""
    elements, strides = 1, []
    for size in reversed(shape):
        strides.append(elements)
        elements *= size
    storage = pickled(("storage", Global(f"torch.{STORAGE_OF[dtype]}"), "0", "cpu", elements))
    # write_pickle has no persistent ids: the one that is needed is spelled out.
    persistent = Pickled(storage + pickle.BINPERSID)
    hooks = inert("collections.OrderedDict")()
    tensor = (persistent, 0, tuple(shape), tuple(reversed(strides)), False, hooks)
    return write_pickle(instance("torch._utils._rebuild_tensor_v2", *tensor))
