"""What a study's text consists of: its files, and a digest of their bytes for the keys of what is made from them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from megatron_demix.artifact import fingerprint, hash_file, write_json

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
    """Digests of input files, remembered by path, size and modification time, so that a second run reads none of them."""

    def __init__(self, cache: Path, *, absent_ok: bool = False) -> None:
        """absent_ok: what does not exist gets a digest that stands for it, and nothing is saved: for looking at a study whose
        inputs are on another machine."""
        self._cache, self.absent_ok = cache, absent_ok
        try:
            self._known: dict[str, list] = json.loads(cache.read_text())
        except (OSError, ValueError):
            self._known = {}

    def of(self, paths: Iterable[Path]) -> str:
        """A fingerprint of the files' names and bytes, in the given order; where they lie does not count."""
        entries = []
        for path in paths:
            if self.absent_ok and not path.exists():
                entries.append([path.name, "absent"])
                continue
            facts = path.stat()
            identity = [facts.st_size, facts.st_mtime_ns]
            known = self._known.get(str(path.resolve()))
            digest = known[2] if known and known[:2] == identity else _digest(path)
            self._known[str(path.resolve())] = [*identity, digest]
            entries.append([path.name, digest])
        return fingerprint(entries)

    def save(self) -> None:
        if self.absent_ok:
            return
        self._cache.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._cache, self._known)
