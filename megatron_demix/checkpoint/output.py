"""One checkpoint on its way to disk: a temporary folder that is filled, then published by one rename.

<target>/latest_checkpointed_iteration.txt
<target>/release/ or iter_<n>/     .metadata  metadata.json  common.pt  <provenance>.json  __0_<n>.distcp
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from glob import escape
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from megatron_demix import __version__
from megatron_demix.artifact import (
    is_temporary,
    only_maker,
    read_json,
    remove_leftovers,
    rename_new,
    sync_path,
    temporary_beside,
    write_json,
)
from megatron_demix.checkpoint.common_state import write_common_state
from megatron_demix.checkpoint.layout import BACKEND, COMMON, METADATA, TRACKER, find_checkpoint
from megatron_demix.checkpoint.writer import CopiedItem, Placement, TensorItem
from megatron_demix.errors import ConfigError, CorruptInput, OutputExists, storage_errors
from megatron_demix.native import crc32, reserve

_SEALED = ("software", "checksums")
"""What Output.seal adds to the provenance: not which checkpoint it is, so that a later version finds what is there."""


def is_published(
    target: Path,
    folder: str,
    provenance: Mapping[str, Any],
    described_in: str,
    identity: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
) -> bool:
    """True if target already holds this very checkpoint. Raises OutputExists if it holds anything else.

    provenance: what was, or would be, given to Output.seal for the file `described_in` beside the checkpoint. identity: what of
    it says which checkpoint it is; of what is found there as well, whatever that is.
    """
    target = Path(target)
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    described = target / folder / described_in
    held = read_json(described) if described.is_file() else None
    found = {k: v for k, v in held.items() if k not in _SEALED} if isinstance(held, dict) else {}
    if not isinstance(held, dict) or identity(found) != identity(provenance):
        what = "a checkpoint made from other inputs or settings" if held else "something else"
        raise OutputExists(f"{target} already holds {what}. Nothing is overwritten: move it away or choose another output.")
    for file, facts in held.get("checksums", {}).get("files", {}).items():
        path = target / folder / file
        if not path.is_file() or path.stat().st_size != facts:
            raise CorruptInput(
                f"{path}: missing or not {facts} bytes long, as {described} says. Delete {target} and make it again."
            )
    if not (target / TRACKER).is_file() or find_checkpoint(target).path.name != folder:
        raise CorruptInput(f"{target / TRACKER}: does not name {folder}, which is there. Delete {target} and make it again.")
    return True


def resolved(target: Path) -> Path:
    """An output's path without links. Raises ConfigError where a folder cannot be renamed to: the one that this process is in,
    and where another file system begins."""
    found = Path(os.path.realpath(target))
    if found == Path.cwd() or found.is_mount():
        what = "the current folder" if found == Path.cwd() else "a mount point"
        raise ConfigError(f"output {str(target)!r} is {what}, and outputs are whole folders. Choose a new folder in it.")
    return found


# Beside a finished file while others are not: the CRCs of its tensor items.
_RECORD = ".finished.json"


class Output:
    """The files of one checkpoint. Use: create, write elements at `descriptors`, complete, finish, seal, publish; or discard.

    Several processes may share the work: each creates, writes and finishes some of the files, and whoever finds all of them
    finished seals and publishes. A file counts when it is whole, so a killed process's files can be made by any other one.
    create, finish, seal and publish are then called within `turn`.
    """

    def __init__(self, target: Path, folder: str, described_in: str, *, shared_key: str | None = None) -> None:
        """target: a run's root. folder: "release" or "iter_0001000". described_in: name of the file for the provenance.

        shared_key: names the work that processes share: equal if and only if the checkpoint is.
        """
        self.target = Path(target)
        self._described_in = described_in
        self._shared = shared_key is not None
        work = self.target.with_name(f"{_work(self.target)}{shared_key}")
        self.temporary = work if self._shared else temporary_beside(self.target)
        self.folder = self.temporary / folder
        self.descriptors: dict[str, int] = {}
        self.direct: dict[str, int] = {}
        self._written: dict[str, Path] = {}
        self._crcs: dict[str, list[int]] = {}

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Only one of the processes that share the work is in here at a time."""
        if not self._shared:
            yield
            return
        with only_maker(self.target):
            yield

    def create(self, placements: Sequence[Placement]) -> None:
        """Make the files that the placements are in, at their full size. Raises StorageError."""
        with storage_errors(f"writing {self.target}"):
            self.folder.mkdir(parents=True, exist_ok=self._shared)
            remove_leftovers(self.folder)
            for file, size in _sizes(placements).items():
                path = self.folder / file
                if self._shared:
                    path = temporary_beside(path)
                self._written[file] = path
                self.descriptors[file] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
                reserve(self.descriptors[file], size)
                self.direct[file] = _open_direct(path)

    def write_elements(self, placement: Placement, elements: np.ndarray) -> int:
        """Write a tensor item's elements where they belong, and return their CRC-32, which complete() wants."""
        assert placement.record_at is not None
        data = np.ascontiguousarray(elements).reshape(-1).view(np.uint8)
        with storage_errors(f"writing {self.target}"):
            _write(self.descriptors[placement.file], data.data, placement.record_at)
        return crc32(data)

    def complete(self, placements: Sequence[Placement], crcs: Sequence[int]) -> None:
        """Write what is not elements into the created files, and put them on stable storage. crcs: of their tensor items."""
        remaining = iter(crcs)
        self._crcs |= {file: [] for file in self._written}
        with storage_errors(f"writing {self.target}"):
            for p in placements:
                descriptor = self.descriptors[p.file]
                if isinstance(p.item, TensorItem):
                    crc = next(remaining)
                    self._crcs[p.file].append(crc)
                    frame = p.item.frame(p.position, crc)
                    _write(descriptor, frame.head, p.position)
                    _write(descriptor, frame.tail, p.position + frame.record_at + frame.record_bytes)
                else:
                    assert isinstance(p.item, CopiedItem)
                    _copy(descriptor, p.item, p.position)
            for descriptor in self.descriptors.values():
                os.fsync(descriptor)
            self._close()

    def finish(self) -> None:
        """Count the completed files as whole."""
        if not self._shared:
            return
        with storage_errors(f"writing {self.target}"):
            for file, path in self._written.items():
                try:
                    os.rename(path, self.folder / file)
                except FileNotFoundError:  # removed by who sealed the same work, or found it wrong: not finished, then
                    del self._crcs[file]
                    continue
                write_json(self._record(file), {"crcs": self._crcs[file]})
            self._written = {}

    def finished(self, file: str) -> list[int] | None:
        """The CRCs of a file's tensor items if some process has finished it."""
        if file not in self._crcs and self._shared and self._record(file).is_file() and (self.folder / file).is_file():
            self._crcs[file] = [int(crc) for crc in read_json(self._record(file))["crcs"]]
        return self._crcs.get(file)

    def _record(self, file: str) -> Path:
        return self.folder / f"{file}{_RECORD}"

    def seal(
        self,
        placements: Sequence[Placement],
        common: Mapping[str, Any],
        provenance: Mapping[str, Any],
        tracker: str,
        beside: Mapping[str, bytes],
    ) -> None:
        """Write what is beside the files of `placements`, all of which must be finished. beside: metadata_files(placements),
        and what else there is, by name."""
        sizes = _sizes(placements)
        per_file = {file: iter(self.finished(file) or ()) for file in sizes}
        crcs = [next(per_file[p.file]) for p in placements if isinstance(p.item, TensorItem)]
        with storage_errors(f"writing {self.target}"):
            write_common_state(self.folder / COMMON, common)
            for name, data in beside.items():
                (self.folder / name).write_bytes(data)
            small = {name: (self.folder / name).stat().st_size for name in (METADATA, BACKEND, COMMON)}
            checksums = {"files": sizes | small, "tensors_crc32": _combined(placements, crcs)}
            sealed = {"software": f"megatron_demix {__version__}", "checksums": checksums}
            write_json(self.folder / self._described_in, dict(provenance) | sealed)
            (self.temporary / TRACKER).write_text(tracker)
            for path in (*self.folder.iterdir(), self.folder, *self.temporary.iterdir(), self.temporary):
                # A file that another process is still writing, for a second time, is of no use to anyone.
                if self._shared and is_temporary(path):
                    path.unlink(missing_ok=True)
                elif path.name not in sizes and not path.name.endswith(_RECORD):
                    sync_path(path)

    def publish(self) -> None:
        """Rename into place. Raises OutputExists if something else has appeared there."""
        with storage_errors(f"publishing {self.target}"):
            for path in self.folder.glob(f"*{_RECORD}"):
                path.unlink()
            rename_new(self.temporary, self.target)
            for path in self.target.parent.glob(f"{escape(_work(self.target))}*"):
                shutil.rmtree(path, ignore_errors=True)  # shared work that was given up: there is nothing left to make

    def discard(self) -> None:
        """Remove what this process made; what others finished stays for the next attempt."""
        self._close()
        for path in self._written.values():
            path.unlink(missing_ok=True)
        if not self._shared:
            self.discard_all()

    def discard_all(self) -> None:
        """Remove everything that was not published."""
        self._close()
        shutil.rmtree(self.temporary, ignore_errors=True)

    def _close(self) -> None:
        for descriptor in (*self.descriptors.values(), *self.direct.values()):
            if descriptor >= 0:
                os.close(descriptor)
        self.descriptors, self.direct = {}, {}


def _work(target: Path) -> str:
    return f".{target.name}.work-"


def _sizes(placements: Sequence[Placement]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for p in placements:
        sizes[p.file] = max(sizes.get(p.file, 0), p.position + p.length)
    return sizes


def _open_direct(path: Path) -> int:
    """A descriptor whose writes bypass the page cache, which then keeps the components; -1 where there is none."""
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    except (OSError, AttributeError):
        return -1


def _combined(placements: Sequence[Placement], crcs: Sequence[int]) -> str:
    """One digest of every tensor's CRC, to compare two merges without reading them."""
    keys = [p.item.key for p in placements if isinstance(p.item, TensorItem)]
    return blake2b(repr(sorted(zip(keys, crcs, strict=True))).encode(), digest_size=16).hexdigest()


def _write(descriptor: int, data: bytes | memoryview, position: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, position)
        view, position = view[written:], position + written


def _copy(descriptor: int, item: CopiedItem, position: int) -> None:
    try:
        _write(descriptor, item.data, position)
    except OSError as e:
        if e.errno != errno.EFAULT:
            raise
        raise CorruptInput(f"{item.key!r}: its file has become shorter while it was read. Copy the component again.") from e
