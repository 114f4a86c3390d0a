"""What a study's text consists of: its files, and a digest of their bytes for the keys of what is made from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from megatron_demix.artifact import fingerprint, hash_file, write_json
from megatron_demix.errors import DemixError

Absent = Literal["refused", "remembered", "allowed"]
"""What becomes of inputs that are not there. refused: an error. remembered: they are as they were when they were last read, an
error if they never were. allowed: something stands for them, so that all is as it will be but the keys."""
_WORTH_A_BAR = 4 << 30


def _digest(path: Path) -> str:
    """BLAKE2b; of a .bin or .safetensors, which may be terabytes, the 64-bit hash that is as fast as memory."""
    if path.suffix not in (".bin", ".safetensors"):
        return hash_file(path)
    from megatron_demix import native
    from megatron_demix.data.source_digest import hash_bin
    from megatron_demix.progress import progress_bar

    size = path.stat().st_size
    with progress_bar(f"hashing {path}", size, unit="bytes", enabled=size > _WORTH_A_BAR) as advance:
        return hash_bin(path, size, threads=native.default_threads(), advance=advance)[0]


class InputDigests:
    """Digests of input files, remembered by path, size and modification time, so that a second run reads none of them; and
    whatever else keys depend on, for looking at a study whose inputs are gone, or on another machine."""

    def __init__(self, cache: Path, *, absent: Absent = "refused") -> None:
        """absent: unless refused, nothing is saved."""
        self._cache, self.absent = cache, absent
        try:
            self._known: dict[str, Any] = json.loads(cache.read_text())
        except (OSError, ValueError):
            self._known = {}

    def of(self, paths: Iterable[Path]) -> str:
        """A fingerprint of the files' names and bytes, in the given order; where they lie does not count."""
        entries = []
        for path in paths:
            known = self._known.get(str(path.absolute())) or self._known.get(str(path.resolve()))
            if self.absent != "refused" and not path.exists() and (known or self.absent_ok):
                entries.append([path.name, known[2] if known else "absent"])
                continue
            facts = path.stat()
            identity = [facts.st_size, facts.st_mtime_ns]
            digest = known[2] if known and known[:2] == identity else _digest(path)
            self._known[str(path.absolute())] = [*identity, digest]
            entries.append([path.name, digest])
        return fingerprint(entries)

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

    def save(self) -> None:
        if self.absent != "refused":
            return
        self._cache.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._cache, self._known)
