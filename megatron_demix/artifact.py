"""Artifacts: folders that either exist whole, under the key of what made them, or do not exist.

An artifact is written into a temporary folder beside its target, every file is fsynced, `manifest.json` is written last, and
the folder is renamed into place. Its manifest holds the key, the settings, and each file's size and digest: nothing that
depends on the time, the machine or the path, so that two runs of one study can be compared byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megatron_demix.errors import ConfigError, CorruptInput, OutputExists, storage_errors
from megatron_demix.locks import open_lock, take_lock

MANIFEST = "manifest.json"
_TEMPORARY = ".tmp-"
_PIECE = 1 << 20


def fingerprint(value: Any) -> str:
    """12 hex digits naming a JSON-able value. Equal values (whatever the order of their keys) give equal fingerprints."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=_jsonable, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a {type(value).__name__} is not JSON")


def hash_file(path: Path, advance: Callable[[int], None] = lambda num_bytes: None) -> str:
    """BLAKE2b-128 of a file's bytes, as hex. advance: called with the bytes of each piece that is read."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            advance(len(piece))
    return digest.hexdigest()


@cache
def this_place() -> str:
    """Names the processes whose numbers mean something to this one: containers and machines may share a host name."""
    machine = b""
    with suppress(OSError):  # not every container has one
        machine = Path("/etc/machine-id").read_bytes()
    try:
        namespace = str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        namespace = secrets.token_hex(8)  # then nobody can tell: a name that nobody else has
    return f"{platform.node()}-{hashlib.sha256(machine + f' {namespace}'.encode()).hexdigest()[:6]}"


def temporary_beside(path: Path) -> Path:
    """A fresh hidden name in the folder of `path`; it says whose it is, so that remove_leftovers knows if its writer lives."""
    return path.with_name(f".{path.name}{_TEMPORARY}{this_place()}-{os.getpid()}-{secrets.token_hex(4)}")


def is_temporary(path: Path) -> bool:
    """Whether temporary_beside gave this name."""
    return path.name.startswith(".") and _TEMPORARY in path.name


def write_atomic(path: Path, text: str | bytes) -> None:
    """Replace one small file so that a reader sees the old text or the new, whatever happens. Raises StorageError, and
    OSError where the folder is not there or `path` is one."""
    path = Path(path)
    temporary = temporary_beside(path)
    try:
        with storage_errors(f"writing {path}"):
            with open(temporary, "wb") as file:
                file.write(text.encode() if isinstance(text, str) else text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_path(path.parent)
    except OSError as e:
        e.filename = str(path)  # the temporary name means nothing to whoever asked for this one
        raise
    finally:
        with suppress(OSError):  # a file system that takes nothing does not remove either, and has said so above
            temporary.unlink()


def write_new(contents: Mapping[Path, str | bytes]) -> None:
    """write_atomic of files that belong together, where none stands in their places: those that hold what they are to hold are
    left as they are. Raises OutputExists before any is written."""
    for path, content in contents.items():
        expected = content.encode() if isinstance(content, str) else content
        if os.path.lexists(path) and not (path.is_file() and path.read_bytes() == expected):
            raise OutputExists(
                f"{path} exists, and is not what this command writes there. Move it away or choose another output; nothing is "
                "overwritten."
            )
    for path, content in contents.items():
        if not path.exists():
            write_atomic(path, content)


def write_json(path: Path, value: Any) -> None:
    """write_atomic of json_text."""
    write_atomic(path, json_text(value))


def json_text(value: Any) -> str:
    """Indented JSON; NaN is refused rather than written."""
    return json.dumps(value, indent=1, default=_jsonable, allow_nan=False) + "\n"


class KeyGivenTwice(ValueError):
    """In one object of a JSON text, of which Python would take the last one silently."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """object_pairs_hook for json.loads. Raises KeyGivenTwice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for n, (key, _) in enumerate(pairs) if key in dict(pairs[:n]))
        raise KeyGivenTwice(f"{twice!r} is given twice. Keep one of them.")
    return found


def read_json(path: Path) -> Any:
    """Parsed JSON of `path`, without a key given twice. Raises CorruptInput naming the file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except KeyGivenTwice as e:
        raise CorruptInput(f"{path}: {e}") from e
    except (OSError, ValueError, RecursionError) as e:
        raise CorruptInput(f"{path}: not readable as JSON ({e}).") from e


@dataclass(frozen=True)
class Manifest:
    """What an artifact says of itself. `files` maps a relative path to {"bytes": int, "blake2b": hex}."""

    key: str
    kind: str
    settings: dict[str, Any]
    files: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """The manifest of a finished artifact, or None where there is none. Raises CorruptInput where it is damaged."""
        path = Path(folder) / MANIFEST
        if not path.is_file():
            return None
        data = read_json(path)
        try:
            return cls(data["key"], data["kind"], data["settings"], data["files"])
        except (KeyError, TypeError) as e:
            raise CorruptInput(f"{path}: not an artifact manifest ({e!r}).") from e

    def problems(self, folder: Path, *, digests: bool = False) -> list[str]:
        """What is wrong with the files on disk; empty if they are all there with the right size (and digest, if asked)."""
        found = []
        for name, facts in self.files.items():
            path = Path(folder) / name
            if not path.is_file():
                found.append(f"{path} is missing")
            elif path.stat().st_size != facts["bytes"]:
                found.append(f"{path} has {path.stat().st_size} bytes, expected {facts['bytes']}")
            elif digests and hash_file(path) != facts["blake2b"]:
                found.append(f"{path} has other bytes than when it was published")
        return found


def is_done(folder: Path, key: str | None = None) -> bool:
    """True if and only if `folder` holds a whole artifact (of this key, if one is given).

    Raises CorruptInput if its manifest or a file's size is wrong, OutputExists if it holds something else.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    if manifest is None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputExists(
                f"{folder} exists and is not an artifact of this project. Move it away or choose another output."
            )
        return False
    if key is not None and manifest.key != key:
        raise OutputExists(
            f"{folder} holds an artifact with key {manifest.key}, expected {key}: it was made from other inputs or settings. "
            "Move it away or choose another output; nothing is overwritten."
        )
    if found := manifest.problems(folder):
        raise CorruptInput(f"artifact {folder} is damaged: {found[0]}. Delete the folder to have it made again.")
    return True


@contextmanager
def publish(target: Path, key: str, kind: str, settings: Mapping[str, Any], *, work: Path | None = None) -> Iterator[Path]:
    """Yield a temporary folder to fill; on success publish it as `target`, on any error remove it and leave nothing.

    `work`: a folder that already holds the files (a trainer's working folder), used instead of a fresh temporary one; it is
    kept when an error occurs. Files whose names start with a dot and temporary ending are not expected. Raises OutputExists
    if another writer published a different artifact meanwhile; if it published the same one, ours is dropped.
    """
    target = Path(target)
    if is_done(target, key):
        raise OutputExists(f"{target} is already done (key {key}); check is_done() before making it.")
    with storage_errors(f"writing {target}", under=target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = work or temporary_beside(target)
        temporary.mkdir(exist_ok=work is not None)
        try:
            yield temporary
            _seal(temporary, key, kind, settings)
            _rename_into_place(temporary, target, key)
        except BaseException:
            if work is None:
                shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextmanager
def only_maker(target: Path) -> Iterator[None]:
    """One process at a time, of all that share the disk, puts together what is published at `target`; the others wait."""
    path = _lock_of(target)
    while True:
        with open_lock(path) as file:
            take_lock(file, f"another process that makes {target}")
            # Whoever held it before may have removed the file that this is a lock on.
            try:
                if os.fstat(file.fileno()).st_ino != path.stat().st_ino:
                    continue
            except FileNotFoundError:
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)  # where a file system has no locks, another one may have been in here, too
            return


def remove_lock(target: Path) -> None:
    """Of a target that is published: the lock of a process that was killed once it had published it."""
    with suppress(OSError):  # it may be another user's
        if _lock_of(target).exists():
            with only_maker(target):
                pass


def _lock_of(target: Path) -> Path:
    return target.parent / f".{target.name}.lock"


def _seal(folder: Path, key: str, kind: str, settings: Mapping[str, Any]) -> None:
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "blake2b": hash_file(path)}
    for path in sorted(p for p in folder.rglob("*") if p.is_dir()):
        sync_path(path)
    write_json(folder / MANIFEST, {"kind": kind, "key": key, "settings": dict(settings), "files": files})


def _rename_into_place(temporary: Path, target: Path, key: str) -> None:
    try:
        os.rename(temporary, target)
    except OSError:
        # Someone else's folder is there: the same artifact is as good as ours, anything else is refused by is_done.
        if not is_done(target, key):
            raise
        shutil.rmtree(temporary, ignore_errors=True)
    sync_path(target.parent)


def own_folder(path: Path) -> None:
    """Make a hidden folder to work in, or go on in the one that is there. Raises ConfigError where that is a link, or another
    user's: its name can be known beforehand, and what lies in it would be taken for our own, programs to run among it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir()
        return
    except FileExistsError:
        found = path.lstat()
    if found.st_uid != os.geteuid() or not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"{path} is a link, or belongs to another user. Move it away, or choose another output.")


def rename_new(temporary: Path, target: Path) -> None:
    """Put a complete folder at `target`, durably, where nothing or an empty folder is. Raises OutputExists, OSError."""
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()
    try:
        os.rename(temporary, target)
    except OSError as e:
        if target.exists():
            raise OutputExists(f"{target} has appeared meanwhile. Nothing was published.") from e
        raise
    sync_path(target.parent)


def sync_path(path: Path) -> None:
    """Put a file, or a folder's entries, on stable storage."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary folders and files that killed processes of this machine left directly in `folder`.

    Those of other machines and containers, which may share the disk, are left: whether their writers live cannot be seen.
    """
    for path in Path(folder).glob(f".*{_TEMPORARY}*"):
        where, _, pid = path.name.rsplit(_TEMPORARY, 1)[1].rpartition("-")[0].rpartition("-")
        if where == this_place() and pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
