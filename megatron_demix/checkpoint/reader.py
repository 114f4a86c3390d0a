"""An opened checkpoint: its metadata, and its bytes mapped into memory (nothing is copied or unpickled as tensors)."""

from __future__ import annotations

import errno
import math
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_demix.checkpoint.archive import check_archive
from megatron_demix.checkpoint.layout import CheckpointDir, find_checkpoint, unreadable
from megatron_demix.checkpoint.maps import out_of_maps
from megatron_demix.checkpoint.metadata import CheckpointMetadata, Chunk, Location, Shape, TensorInfo, read_metadata
from megatron_demix.checkpoint.objects import check_object
from megatron_demix.checkpoint.payload import Payload, read_payload
from megatron_demix.errors import CorruptInput
from megatron_demix.native import MappedFile

# What a training checkpoint holds beside the model. Distributed optimizers, chained optimizers, schedulers, random states.
# Whole names: a model may have a tensor `rng_state_embedding`.
_NOT_MODEL = re.compile(
    r"((chained_\d+\.)?optimizer|opt_param_scheduler|rng_state|rerun_state_machine(_state)?|common_state|modelopt_state)(\.|/|$)"
)
_EXTRA_STATE = "_extra_state"

# The name of one of the objects that layers, experts or ranks saved under one key: <key>/shard_<index>_<how many, by axis>.
_SHARD = re.compile(r"(.+)/shard_[\d.]+_(\d+(?:\.\d+)*)")


def is_model_key(key: str) -> bool:
    """Whether a key of `.metadata` belongs to the model, and not to optimizer, scheduler, random or rerun state."""
    return _NOT_MODEL.match(key) is None


_MOST_STACKED = 2
"""Dimensions that chunks of with_keys() may have before those that are stored: layers and experts."""
_TAIL = 1 << 10
"""Bytes at the end of an archive that hold its directory, and its last small entries."""


class _Item(NamedTuple):
    """What messages call a chunk: written out only where there is one."""

    folder: Path
    file: str
    key: str
    offset: Shape

    def __str__(self) -> str:
        return f"{self.folder}/{self.file} ({self.key!r} at {self.offset})"


class Checkpoint:
    """Read-only view of one torch_dist checkpoint. Files are mapped when first used and stay mapped with their arrays."""

    def __init__(self, path: Path, *, read_ahead: bool = True, place: int = 0, model_only: bool = False) -> None:
        """path: anything find_checkpoint accepts. Raises as find_checkpoint and read_metadata do.

        read_ahead: False while a few scattered bytes are read of what is not in the page cache: a disk may otherwise read
        megabytes around each of them. prefetch() then fetches what is needed whole, and start_read_ahead() ends it.
        place: another one for each checkpoint whose elements are read side by side (csrc/mapped_file.hpp).
        model_only: metadata has no tensors of optimizers, which are most of what a training checkpoint lists.
        """
        self.location: CheckpointDir = find_checkpoint(path)
        self.metadata: CheckpointMetadata = read_metadata(self.location.path, is_model_key if model_only else None)
        self._read_ahead = read_ahead
        self._place = place
        self._files: dict[str, MappedFile] = {}

    @property
    def model_tensors(self) -> dict[str, TensorInfo]:
        return {key: info for key, info in self.metadata.tensors.items() if is_model_key(key)}

    @property
    def model_objects(self) -> dict[str, Location]:
        """Pickled objects of the model's layers (`_extra_state`). Raises CorruptInput if shards of one are missing."""
        found = {k: v for k, v in self.metadata.objects.items() if is_model_key(k) and _EXTRA_STATE in k}
        shards: dict[tuple[str, str], int] = {}
        for key in found:
            if match := _SHARD.fullmatch(key):
                shards[match[1], match[2]] = shards.get((match[1], match[2]), 0) + 1
        for (name, shape), num in shards.items():
            if num != (expected := math.prod(map(int, shape.split(".")))):
                raise CorruptInput(
                    f"{self.location.path}: {num} of {expected} shards of {name!r} are there. The checkpoint was not saved by "
                    "all ranks, or its .metadata is damaged."
                )
        return found

    @property
    def unknown_objects(self) -> list[str]:
        """Names of objects that are neither these nor known state of training; one name for all shards of an object."""
        names = (k for k in self.metadata.objects if is_model_key(k) and _EXTRA_STATE not in k)
        return sorted({match[1] if (match := _SHARD.fullmatch(name)) else name for name in names})

    def blob(self, location: Location, key: str) -> np.ndarray:
        """The bytes of one stored item, uint8. Raises CorruptInput if the file is missing or too short."""
        data = self._mapped(location.file).data
        if location.position + location.length > data.nbytes:
            raise CorruptInput(
                f"{self.location.path / location.file}: has {data.nbytes} bytes, but {key!r} lies at bytes "
                f"{location.position} to {location.position + location.length}. The file is truncated: copy or save the "
                "checkpoint again."
            )
        return data[location.position : location.position + location.length]

    def sound_blob(self, location: Location, key: str) -> np.ndarray:
        """The same, compared with the checksums in it, which are those of a torch.save archive. Raises CorruptInput."""
        data = self.blob(location, key)
        check_archive(data, f"{self.location.path / location.file} ({key!r})")
        return data

    def harmless_blob(self, location: Location, key: str) -> np.ndarray:
        """The same of one of model_objects, looked at. Raises UnsafeInput where loading it would run something."""
        data = self.sound_blob(location, key)
        check_object(data, f"{self.location.path / location.file} ({key!r})")
        return data

    def prefetch(self, location: Location, key: str) -> None:
        """Have one stored item read from disk in one go. Raises as blob() does."""
        self.blob(location, key)
        self._files[location.file].want(location.position, location.position + location.length)

    def touch_frames(self, chunks: Iterable[Chunk]) -> None:
        """Have what describes these chunks' elements read from the disk: the ends of their archives. Files that are not
        there, or too short, are left to blob()."""
        positions: dict[str, list[int]] = {}
        for chunk in chunks:
            begin, end = chunk.location.position, chunk.location.position + chunk.location.length
            positions.setdefault(chunk.location.file, []).extend((begin, max(begin, end - _TAIL), end - 1))
        for name, places in positions.items():
            with suppress(CorruptInput):
                self._mapped(name).touch(places)

    def unmap(self) -> None:
        """Give back the maps that no array is left of. Raises as check_still_there() does, of what was read until now."""
        self.check_still_there()
        self._files = {}

    def check_still_there(self) -> None:
        """Raises CorruptInput if a file was cut short, or its disk failed, since it was opened: zeros may have been read."""
        for name, file in self._files.items():
            if file.lost:
                raise CorruptInput(
                    f"{self.location.path / name}: became unreadable while it was read: it was cut short, or its disk failed. "
                    "Copy or save the checkpoint again, and leave it alone while it is in use; nothing was made of it."
                )

    @property
    def shows_cached(self) -> bool:
        """Whether the kernel tells this user which pages of the files are in memory: of those that are theirs, or that they may
        write. Of others it says that all are."""
        paths = [self.location.path / name for name in self._files]
        return all(
            os.access(path, os.W_OK, effective_ids=True) or path.stat().st_uid == os.geteuid()
            for path in paths
            if path.exists()
        )

    @property
    def files(self) -> list[MappedFile]:
        """Those that are mapped."""
        return list(self._files.values())

    def start_read_ahead(self) -> None:
        """From now on items are read whole, one after another."""
        if not self._read_ahead:
            self._read_ahead = True
            for file in self._files.values():
                file.expect_scattered_reads(False)

    def payload(self, info: TensorInfo, chunk: Chunk) -> Payload:
        """The elements of one chunk (also of with_keys(), layers.py). Raises CorruptInput if they are not what it promises."""
        what = _Item(self.location.path, chunk.location.file, info.key, chunk.offset)
        payload = read_payload(self.blob(chunk.location, info.key), what)
        if chunk.layer is not None and payload.shape and chunk.layer < payload.shape[0]:
            payload = payload.at(chunk.layer)
        for _ in range(_MOST_STACKED):
            if (missing := len(chunk.shape) - len(payload.shape)) > 0 and chunk.shape[missing - 1] == 1:
                payload = payload.stacked()
        if payload.dtype != info.dtype or payload.shape != chunk.shape:
            raise CorruptInput(
                f"{what}: holds {payload.dtype} {payload.shape}, but .metadata promises {info.dtype} {chunk.shape}."
            )
        return payload

    def _mapped(self, name: str) -> MappedFile:
        if name not in self._files:
            path = self.location.path / name
            try:
                file = MappedFile(path, self._place)
            except OSError as e:
                if e.errno == errno.ENOMEM:
                    raise out_of_maps(path) from e
                raise unreadable(path, e, ", but .metadata refers to it") from e
            if not self._read_ahead:
                file.expect_scattered_reads(True)
            self._files[name] = file
        return self._files[name]
