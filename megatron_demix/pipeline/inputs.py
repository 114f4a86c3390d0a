"""What a study's text consists of: its files, and a digest of their bytes for the keys of what is made from them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from megatron_demix.artifact import fingerprint, hash_file, write_json
from megatron_demix.errors import ConfigError, DemixError, StorageError
from megatron_demix.progress import Advance, progress_bar
from megatron_demix.study.study import Study

Absent = Literal["refused", "remembered", "allowed"]
"""What becomes of inputs that are not there. refused: an error. remembered: they are as they were when they were last read, an
error if they never were. allowed: something stands for them, so that all is as it will be but the keys."""
_WORTH_A_BAR = 4 << 30
_KEEP_EVERY_S = 60


def check_apart(study: Study, inputs: Mapping[str, list[Path]]) -> None:
    """Raises ConfigError where two domains read one field of one file, under whatever names. inputs: by domain, as resolved."""
    seen: dict[tuple[Any, str], tuple[str, Path]] = {}
    for domain in study.domains:
        for path in inputs[domain.name] if domain.prefixes is None else ():
            facts = path.stat() if path.exists() else None
            identity = (facts.st_dev, facts.st_ino) if facts else str(path.resolve())
            other, first = seen.setdefault((identity, domain.json_key), (domain.name, path))
            if other != domain.name:
                also = "" if first == path else f", there as {first}"
                raise ConfigError(
                    f"domains: {path} is an input of {domain.name!r}, and of {other!r}{also}. Nobody could tell the two by it: "
                    "name it in one of them, or write patterns that keep them apart."
                )


def _digest(path: Path, advance: Advance) -> str:
    """BLAKE2b-128; of a .bin or .safetensors, which may be terabytes, the 64-bit hash that is as fast as memory."""
    if path.suffix not in (".bin", ".safetensors"):
        return hash_file(path, advance)
    from megatron_demix import native
    from megatron_demix.data.source_digest import hash_bin

    return hash_bin(path, path.stat().st_size, threads=native.default_threads(), advance=advance)[0]


class InputDigests:
    """Digests of input files, remembered by path, size and modification time, so that a second run reads none of them; and
    whatever else keys depend on, for looking at a study whose inputs are gone, or on another machine."""

    def __init__(self, cache: Path, *, absent: Absent = "refused") -> None:
        """absent: unless refused, only digests are saved."""
        self._cache, self.absent = cache, absent
        try:
            self._known: dict[str, Any] = json.loads(cache.read_text())
        except (OSError, ValueError):
            self._known = {}
        self._before, self._new = dict(self._known), dict[str, Any]()
        self._kept = time.monotonic()

    def of(self, paths: Iterable[Path]) -> str:
        """A fingerprint of the files' names and bytes, in the given order; where they lie does not count."""
        digests: dict[Path, str] = {}
        unread: dict[Path, list[int]] = {}
        paths = list(paths)
        for path in paths:
            known = self._known.get(str(path.absolute())) or self._known.get(str(path.resolve()))
            if self.absent != "refused" and not path.exists() and (known or self.absent_ok):
                digests[path] = known[2] if known else "absent"
                continue
            facts = path.stat()
            identity = [facts.st_size, facts.st_mtime_ns]
            if known and known[:2] == identity:
                digests[path] = known[2]
                self._known[str(path.absolute())] = known
            else:
                unread[path] = identity
        digests |= self._read(unread)
        return fingerprint([[path.name, digests[path]] for path in paths])

    def _read(self, files: Mapping[Path, list[int]]) -> dict[Path, str]:
        """Digests of files, given with their identities. What was read is remembered even if the rest is not."""
        digests = {}
        size = sum(identity[0] for identity in files.values())
        what = ", ".join(map(str, files)) if len(files) < 2 else f"{len(files)} inputs, {next(iter(files))} first"
        with progress_bar(f"hashing {what}", size, unit="bytes", enabled=size > _WORTH_A_BAR) as advance:
            for path, identity in files.items():
                digests[path] = _digest(path, advance)
                self._known[str(path.absolute())] = self._new[str(path.absolute())] = [*identity, digests[path]]
                if time.monotonic() - self._kept > _KEEP_EVERY_S:
                    self.keep()
        return digests

    def about(self, question: str, files: Iterable[Path], ask: Callable[[], Any]) -> Any:
        """What `ask` finds out about files, as JSON; asked again where one has another size or modification time, or is new."""
        identity = [[file.name, facts.st_size, facts.st_mtime_ns] for file in files for facts in [file.stat()]]
        known = self._known.get(question)
        if not known or known[0] != identity:
            known = self._known[question] = [identity, ask()]
        return known[1]

    @property
    def absent_ok(self) -> bool:
        return self.absent == "allowed"

    def answer(self, question: str, ask: Callable[[], Any], *, absent: Any = "absent") -> Any:
        """What `ask` finds out about the inputs, as JSON; where it fails, and absent inputs are not refused, what it found when
        the same question was last asked, or, where they are allowed, `absent`."""
        try:
            self._known[question] = found = ask()
        except (DemixError, OSError):
            if self.absent == "refused" or not (question in self._known or self.absent_ok):
                raise
            found = self._known.get(question, absent)
        return found

    def keep(self) -> None:
        """Save the digests of what was read, whatever becomes of the study; nothing where all was known."""
        with suppress(OSError, StorageError):  # then they are read again
            if self._new:
                self._write(self._before | self._new)
        self._kept = time.monotonic()

    def save(self) -> None:
        if self.absent == "refused":
            self._write(self._known)
        else:
            self.keep()

    def _write(self, known: Mapping[str, Any]) -> None:
        self._cache.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._cache, known)
