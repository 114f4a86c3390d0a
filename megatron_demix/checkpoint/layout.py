"""Where a Megatron run keeps its checkpoints, and how a finished one is laid out.

    <root>/latest_checkpointed_iteration.txt    "1000", or "release"
    <root>/iter_0001000/ or <root>/release/      .metadata, metadata.json, common.pt, __<rank>_<n>.distcp

A plain `--load <root>` follows the tracker; `release` starts at iteration 0 with no further flags.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_demix.errors import ConfigError, CorruptInput

TRACKER = "latest_checkpointed_iteration.txt"
METADATA = ".metadata"
BACKEND = "metadata.json"
COMMON = "common.pt"


@dataclass(frozen=True)
class CheckpointDir:
    """One checkpoint on disk. `path` holds `.metadata`; `root` is what --load takes (`path` itself for a bare one)."""

    path: Path
    root: Path
    iteration: int | None
    kind: Literal["iter", "release", "bare"]


def iteration_folder(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def iterations_in(root: Path) -> list[int]:
    """Iterations of the checkpoints in a run's root, finished or not, ascending."""
    names = (p.name.removeprefix("iter_") for p in root.glob("iter_*"))
    return sorted(int(n) for n in names if n.isdigit())


def find_checkpoint(path: Path) -> CheckpointDir:
    """The checkpoint at a run's root (through its tracker), an iter_* or release folder, or a bare torch_dist folder.

    Raises ConfigError where there is none, CorruptInput where the tracker or the folder is damaged.
    """
    path = Path(path)
    if (path / METADATA).is_file():
        return _describe(path)
    if not path.is_dir():
        raise ConfigError(f"checkpoint {path}: no such folder. Give a Megatron run's root, an iter_* or release folder.")
    tracker = path / TRACKER
    if tracker.is_file():
        return _tracked(path, tracker)
    others = sorted(p.name for p in path.iterdir())[:6]
    raise ConfigError(
        f"checkpoint {path}: found neither {METADATA} (a torch_dist checkpoint) nor {TRACKER} (the root of a run). It holds "
        f"{', '.join(others) or 'nothing'}. Checkpoints in other formats are converted by Megatron's own tools first."
    )


def _tracked(root: Path, tracker: Path) -> CheckpointDir:
    try:
        text = tracker.read_text().strip()
    except (OSError, UnicodeDecodeError) as e:
        raise CorruptInput(f"{tracker}: cannot be read ({e}).") from e
    if text != "release" and not text.isdecimal():
        raise CorruptInput(f"{tracker}: holds {text[:40]!r}, expected an iteration number or 'release'.")
    folder = root / ("release" if text == "release" else iteration_folder(int(text)))
    if not (folder / METADATA).is_file():
        raise CorruptInput(
            f"{tracker}: names {text}, but {folder / METADATA} is missing: that checkpoint was not finished or is not "
            "torch_dist. Give the folder of another iteration."
        )
    return _describe(folder)


def _describe(path: Path) -> CheckpointDir:
    name = path.resolve().name
    if match := re.fullmatch(r"iter_(\d{7,})", name):
        return CheckpointDir(path, path.parent, int(match[1]), "iter")
    if name == "release":
        return CheckpointDir(path, path.parent, None, "release")
    return CheckpointDir(path, path, None, "bare")
