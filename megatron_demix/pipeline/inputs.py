"""What a study's text consists of: its files, and a digest of their bytes for the keys of what is made from them."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from megatron_demix.artifact import fingerprint, hash_file, write_json
from megatron_demix.data.input_files import Look, facts_of
from megatron_demix.errors import ConfigError, DemixError, StorageError
from megatron_demix.progress import Advance, progress_bar
from megatron_demix.study.study import Study

Absent = Literal["refused", "remembered", "allowed"]
"""What becomes of inputs that are not there. refused: an error. remembered: they are as they were when they were last read, an
error if they never were. allowed: something stands for them, so that all is as it will be but the keys."""
_WORTH_A_BAR = 4 << 30
_KEEP_EVERY_S = 60
_AT_ONCE = 16
"""Files that are hashed side by side, at most."""


def check_apart(study: Study, inputs: Mapping[str, list[Path]], look: Look) -> None:
    """Raises ConfigError where two domains read one field of one file, under whatever names. inputs: by domain, as resolved."""
    seen: dict[tuple[Any, str], tuple[str, Path]] = {}
    for domain in study.domains:
        for path in inputs[domain.name] if domain.prefixes is None else ():
            facts = facts_of(path, look)
            identity = (facts.st_dev, facts.st_ino) if facts else str(path.resolve())
            other, first = seen.setdefault((identity, domain.json_key), (domain.name, path))
            if other != domain.name:
                also = "" if first == path else f", there as {first}"
                raise ConfigError(
                    f"domains: {path} is an input of {domain.name!r}, and of {other!r}{also}. Nobody could tell the two by it: "
                    "name it in one of them, or write patterns that keep them apart."
                )


def _digest(path: Path, advance: Advance, threads: int = 1) -> str:
    """BLAKE2b-128; of a .bin or .safetensors, which may be terabytes, the 64-bit hash that is as fast as memory."""
    if path.suffix not in (".bin", ".safetensors"):
        return hash_file(path, advance)
    from megatron_demix.data.source_digest import hash_bin

    return hash_bin(path, path.stat().st_size, threads=threads, advance=advance)[0]


class InputDigests:
    """Digests of input files, remembered by path, size and modification time, so that a second run reads none of them; and
    whatever else keys depend on, for looking at a study whose inputs are gone, or on another machine.

    On disk: {"files": {path: [size, modification time, digest]}, "answers": {kind: {question: answer}}}.
    """

    def __init__(self, cache: Path, *, absent: Absent = "refused") -> None:
        """absent: unless refused, only digests are saved."""
        self._cache, self.absent = cache, absent
        try:
            known = json.loads(cache.read_text())
        except (OSError, ValueError):
            known = None
        known = known if isinstance(known, dict) else {}
        self._files: dict[str, list[Any]] = known.get("files", {})
        self._answers: dict[str, dict[str, Any]] = known.get("answers", {})
        self._answers_before = {kind: dict(answers) for kind, answers in self._answers.items()}
        self._hashed = self._changed = False
        self._kept = time.monotonic()
        self._seen: dict[Path, os.stat_result] | None = {}

    def look(self, path: Path) -> os.stat_result:
        """os.stat; until save() once for each path, since keys are made of what is there at one time. Who asks later wants to
        know whether something has changed."""
        if self._seen is None:
            return os.stat(path)
        if path not in self._seen:
            self._seen[path] = os.stat(path)
        return self._seen[path]

    def of(self, paths: Iterable[Path]) -> str:
        """A fingerprint of the files' names and bytes, in the given order; where they lie does not count."""
        paths = list(paths)
        digests = self.read(paths)
        return fingerprint([[path.name, digests[path]] for path in paths])

    def read(self, paths: Iterable[Path]) -> dict[Path, str]:
        """The digest of each file, which of() then knows: files that are asked for together are hashed side by side."""
        digests: dict[Path, str] = {}
        unread: dict[Path, list[int]] = {}
        for path in paths:
            place = str(path.absolute())
            known = self._files.get(place) or self._files.get(os.path.realpath(path))
            facts = facts_of(path, self.look)
            if facts is None:
                if self.absent == "refused" or not (known or self.absent_ok):
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
                digests[path] = known[2] if known else "absent"
                continue
            identity = [facts.st_size, facts.st_mtime_ns]
            if known and known[:2] == identity:
                digests[path] = known[2]
                self._changed |= place not in self._files
                self._files[place] = known
            else:
                unread[path] = identity
        return digests | self._hash(unread)

    def _hash(self, files: Mapping[Path, list[int]]) -> dict[Path, str]:
        """Digests of files, given with their identities, side by side. What was read is remembered even if the rest is not."""
        if not files:
            return {}
        from megatron_demix import native

        digests: dict[Path, str] = {}
        size = sum(identity[0] for identity in files.values())
        what = ", ".join(map(str, files)) if len(files) < 2 else f"{len(files)} inputs, {next(iter(files))} first"
        at_once = min(len(files), native.default_threads(), _AT_ONCE)
        threads = native.default_threads() // at_once
        stopped, turn = threading.Event(), threading.Lock()

        def read(path: Path) -> None:
            digest = _digest(path, advance, threads)
            with turn:
                digests[path] = digest
                self._files[str(path.absolute())] = [*files[path], digest]
                self._hashed = True
                if time.monotonic() - self._kept > _KEEP_EVERY_S:
                    self.keep()

        def advance(units: float = 1, *, info: str | None = None) -> None:
            if stopped.is_set():
                raise CancelledError
            with turn:
                show(units, info=info)

        with (
            progress_bar(f"hashing {what}", size, unit="bytes", enabled=size > _WORTH_A_BAR) as show,
            ThreadPoolExecutor(at_once) as pool,
        ):
            try:
                for reading in as_completed([pool.submit(read, path) for path in files]):
                    reading.result()
            except BaseException:  # Ctrl-C, too: files that are half read may take hours more
                stopped.set()
                pool.shutdown(cancel_futures=True)
                raise
        return digests

    def about(self, question: str, files: Iterable[Path], ask: Callable[[], Any], *, kind: str) -> Any:
        """What `ask` finds out about files, as JSON; asked again where one has another size or modification time, or is new.
        kind: names what is found out, question: about what. Together they are where it is remembered, and stay as they are."""
        identity = [[file.name, facts.st_size, facts.st_mtime_ns] for file in files for facts in [file.stat()]]
        known = self._answers.get(kind, {}).get(question)
        if not known or known[0] != identity:
            known = [identity, ask()]
            self._remember(kind, question, known)
        return known[1]

    @property
    def absent_ok(self) -> bool:
        return self.absent == "allowed"

    def answer(self, question: str, ask: Callable[[], Any], *, kind: str, absent: Any = "absent") -> Any:
        """What `ask` finds out about the inputs, as JSON; where it fails, and absent inputs are not refused, what it found when
        the same question was last asked, or, where they are allowed, `absent`. kind, question: as of about()."""
        try:
            found = ask()
        except (DemixError, OSError):
            known = self._answers.get(kind, {})
            if self.absent == "refused" or not (question in known or self.absent_ok):
                raise
            return known.get(question, absent)
        self._remember(kind, question, found)
        return found

    def _remember(self, kind: str, question: str, found: Any) -> None:
        known = self._answers.setdefault(kind, {})
        if question not in known or known[question] != found:
            known[question] = found
            self._changed = True

    def keep(self) -> None:
        """Save the digests of what was read, whatever becomes of the study; nothing where all was known."""
        if self._hashed:
            with suppress(OSError, StorageError):  # then they are read again
                self._write(self._answers_before)
                self._hashed = False
        self._kept = time.monotonic()

    def save(self) -> None:
        """Save what was found out; nothing where all was known."""
        self._seen = None
        if self.absent != "refused":
            self.keep()
        elif self._hashed or self._changed:
            self._write(self._answers)
            self._hashed = self._changed = False

    def _write(self, answers: Mapping[str, Mapping[str, Any]]) -> None:
        self._cache.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._cache, {"files": self._files, "answers": answers})
