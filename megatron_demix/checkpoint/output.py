"""One checkpoint on its way to disk: a temporary folder that is filled, then published by one rename.

<target>/latest_checkpointed_iteration.txt
<target>/release/ or iter_<n>/     .metadata  metadata.json  common.pt  <provenance>.json  __0_<n>.distcp
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_demix.artifact import read_json, temporary_beside, write_json
from megatron_demix.checkpoint.common_state import write_common_state
from megatron_demix.checkpoint.layout import COMMON, TRACKER
from megatron_demix.checkpoint.writer import CopiedItem, Placement, TensorItem, write_metadata
from megatron_demix.errors import CorruptInput, OutputExists, storage_errors
from megatron_demix.native import crc32


def is_published(target: Path, folder: str, provenance: Mapping[str, Any], described_in: str) -> bool:
    """True if target already holds this very checkpoint. Raises OutputExists if it holds anything else.

    provenance: what was, or would be, written to the file `described_in` beside the checkpoint.
    """
    target = Path(target)
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    described = target / folder / described_in
    held = read_json(described) if described.is_file() else None
    if not isinstance(held, dict) or {k: v for k, v in held.items() if k != "checksums"} != dict(provenance):
        what = "a checkpoint made from other inputs or settings" if held else "something else"
        raise OutputExists(f"{target} already holds {what}. Nothing is overwritten: move it away or choose another output.")
    for file, facts in held.get("checksums", {}).get("files", {}).items():
        path = target / folder / file
        if not path.is_file() or path.stat().st_size != facts:
            raise CorruptInput(
                f"{path}: missing or not {facts} bytes long, as {described} says. Delete {target} and make it again."
            )
    return True


class Output:
    """The files of one checkpoint. Use: create, write elements at `descriptors`, seal with their CRCs, publish; or discard."""

    def __init__(self, target: Path, folder: str, described_in: str) -> None:
        """target: a run's root. folder: "release" or "iter_0001000". described_in: name of the file for the provenance."""
        self.target = Path(target)
        self._described_in = described_in
        self.temporary = temporary_beside(self.target)
        self.folder = self.temporary / folder
        self.descriptors: dict[str, int] = {}
        self.direct: dict[str, int] = {}
        self._sizes: dict[str, int] = {}

    def create(self, placements: Sequence[Placement]) -> None:
        """Make the files at their full size. Raises StorageError."""
        with storage_errors(f"writing {self.target}"):
            self.folder.mkdir(parents=True)
            for p in placements:
                self._sizes[p.file] = max(self._sizes.get(p.file, 0), p.position + p.length)
            for file, size in self._sizes.items():
                path = self.folder / file
                self.descriptors[file] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
                _reserve(self.descriptors[file], size)
                self.direct[file] = _open_direct(path)

    def write_elements(self, placement: Placement, elements: np.ndarray) -> int:
        """Write a tensor item's elements where they belong, and return their CRC-32, which seal() wants."""
        assert isinstance(placement.item, TensorItem)
        data = np.ascontiguousarray(elements).reshape(-1).view(np.uint8)
        frame = placement.item.frame(placement.position)
        with storage_errors(f"writing {self.target}"):
            _write(self.descriptors[placement.file], data.data, placement.position + frame.record_at)
        return crc32(data)

    def seal(
        self,
        placements: Sequence[Placement],
        crcs: Sequence[int],
        common: Mapping[str, Any],
        provenance: Mapping[str, Any],
        tracker: str,
    ) -> None:
        """Write all that is not elements, and put everything on stable storage. crcs: of the tensor items, in order."""
        remaining = iter(crcs)
        with storage_errors(f"writing {self.target}"):
            for p in placements:
                descriptor = self.descriptors[p.file]
                if isinstance(p.item, TensorItem):
                    frame = p.item.frame(p.position, next(remaining))
                    _write(descriptor, frame.head, p.position)
                    _write(descriptor, frame.tail, p.position + frame.record_at + frame.record_bytes)
                else:
                    assert isinstance(p.item, CopiedItem)
                    _write(descriptor, p.item.data, p.position)
            write_metadata(self.folder, placements)
            write_common_state(self.folder / COMMON, common)
            checksums = {"files": self._sizes, "tensors_crc32": _combined(placements, crcs)}
            write_json(self.folder / self._described_in, dict(provenance) | {"checksums": checksums})
            (self.temporary / TRACKER).write_text(tracker)
            for descriptor in self.descriptors.values():
                os.fsync(descriptor)
            self._close()
            for path in (*self.folder.iterdir(), self.folder, *self.temporary.iterdir(), self.temporary):
                if path.name not in self._sizes:
                    _fsync(path)

    def publish(self) -> None:
        """Rename into place. Raises OutputExists if something else has appeared there."""
        with storage_errors(f"publishing {self.target}"):
            if self.target.is_dir() and not any(self.target.iterdir()):
                self.target.rmdir()
            try:
                os.rename(self.temporary, self.target)
            except OSError as e:
                if self.target.exists():
                    raise OutputExists(f"{self.target} has appeared meanwhile. Nothing was published.") from e
                raise
            _fsync(self.target.parent)

    def discard(self) -> None:
        """Remove everything that was not published."""
        self._close()
        shutil.rmtree(self.temporary, ignore_errors=True)

    def _close(self) -> None:
        for descriptor in (*self.descriptors.values(), *self.direct.values()):
            if descriptor >= 0:
                os.close(descriptor)
        self.descriptors, self.direct = {}, {}


def _reserve(descriptor: int, size: int) -> None:
    """Take the space now, so that a full disk is noticed before the work; where a file system cannot, only set the size."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as e:
        if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, size)


def _open_direct(path: Path) -> int:
    """A descriptor whose writes bypass the page cache, which then keeps the components; -1 where there is none."""
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    except (OSError, AttributeError):
        return -1


def _combined(placements: Sequence[Placement], crcs: Sequence[int]) -> str:
    """One digest of every tensor's CRC, to compare two merges without reading them."""
    from hashlib import blake2b

    keys = [p.item.key for p in placements if isinstance(p.item, TensorItem)]
    return blake2b(repr(sorted(zip(keys, crcs, strict=True))).encode(), digest_size=16).hexdigest()


def _write(descriptor: int, data: bytes | memoryview, position: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, position)
        view, position = view[written:], position + written


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
