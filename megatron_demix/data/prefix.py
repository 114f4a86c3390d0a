"""Publishing an indexed data set at a path prefix: its files appear whole, the .bin last, and nothing is overwritten.

They are made in a hidden folder beside it and sealed there: `sealed.json`, written when all of them have been made, lets a
process that finds a publication interrupted go on with it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_demix.artifact import read_json, sync_path, write_json
from megatron_demix.data.outputs import REJECTED
from megatron_demix.data.parts import remove_parts
from megatron_demix.errors import CorruptInput, OutputExists
from megatron_demix.indexed.format import bin_path
from megatron_demix.indexed.reader import read_index

SEALED = "sealed.json"
_SUFFIXES = (f".{REJECTED}", ".meta.json", ".idx", ".bin")
"""In the order in which they appear: without its .bin nobody takes the rest for a data set."""


def finished(prefix: Path, identity: str, work: Path) -> dict[str, int] | None:
    """Counts of the data set at a prefix, if it was made from these inputs and settings; None if nothing lies there yet.

    Raises OutputExists for anything else, CorruptInput for a finished one that has been damaged.
    """
    there = [path for suffix in _SUFFIXES if (path := Path(f"{prefix}{suffix}")).exists()]
    if not there or is_sealed(work, identity):
        return None
    facts = _facts(prefix)
    if facts.get("made_from") != identity or not bin_path(prefix).exists():
        raise OutputExists(
            f"{there[-1]} exists, and was not made from these inputs with these settings by this version. Move it away or "
            "choose another output; nothing is overwritten."
        )
    index = read_index(prefix)
    if index.num_tokens != facts["tokens"]:
        raise CorruptInput(
            f"{prefix} has {index.num_tokens} tokens, {prefix}.meta.json says {facts['tokens']}. Delete both to have it made "
            "again."
        )
    _remove(work)
    return {what: facts[what] for what in ("documents", "tokens", "bytes", "rejected")}


def _facts(prefix: Path) -> dict[str, Any]:
    try:
        facts = read_json(Path(f"{prefix}.meta.json"))
    except CorruptInput:  # none, or not ours
        return {}
    return facts if isinstance(facts, dict) else {}


def is_sealed(work: Path, identity: str) -> bool:
    """Whether everything that will lie at the prefix has been made, and some of it may lie there already."""
    path = work / SEALED
    return path.is_file() and read_json(path)["made_from"] == identity


def seal(work: Path, name: str, identity: str) -> None:
    """Of a folder with a closed data set of this name."""
    rejected = work / f"{name}.{REJECTED}"
    os.replace(work / REJECTED, rejected)
    if not rejected.stat().st_size:
        rejected.unlink()
    write_json(work / SEALED, {"made_from": identity})


def unseal(work: Path) -> None:
    """What other inputs were sealed as is about to be overwritten."""
    (work / SEALED).unlink(missing_ok=True)


def publish(work: Path, prefix: Path) -> None:
    """Move what has been sealed to its place."""
    publish_files(work, prefix.parent, [f"{prefix.name}{suffix}" for suffix in _SUFFIXES])
    _remove(work)


def publish_files(work: Path, folder: Path, names: Iterable[str]) -> None:
    """Rename sealed files into `folder`, those that are there, in this order. Killed in between, the next call goes on where it
    stopped. Raises OutputExists before any is renamed."""
    left = [name for name in names if (work / name).exists()]
    for name in left:
        if (folder / name).exists():
            raise OutputExists(
                f"{folder / name} exists, but the rest of it does not. Move it away or choose another output; nothing is "
                "overwritten."
            )
    for name in left:
        os.rename(work / name, folder / name)
    sync_path(folder)


def _remove(work: Path) -> None:
    remove_parts(work)
    shutil.rmtree(work, ignore_errors=True)
