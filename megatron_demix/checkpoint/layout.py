"""Where a Megatron run keeps its checkpoints, and how a finished one is laid out.

    <root>/latest_checkpointed_iteration.txt    "1000", or "release"
    <root>/iter_0001000/ or <root>/release/      .metadata, metadata.json, common.pt, __<rank>_<n>.distcp

A plain `--load <root>` follows the tracker; `release` starts at iteration 0 with no further flags.
"""

from __future__ import annotations

import errno
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_demix.errors import ConfigError, CorruptInput, DemixError, IncompatibleInputs

TRACKER = "latest_checkpointed_iteration.txt"
METADATA = ".metadata"
BACKEND = "metadata.json"
COMMON = "common.pt"

_SHOWN = 6  # names of folders, in a message


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
    return sorted(int(n) for n in names if n.isdecimal())


def find_checkpoint(path: Path) -> CheckpointDir:
    """The checkpoint at a run's root (through its tracker), an iter_* or release folder, or a bare torch_dist folder.

    Raises ConfigError where there is none, or none that this user may read, IncompatibleInputs where it has another format,
    CorruptInput where the tracker or the folder is damaged.
    """
    path = Path(path)
    try:
        return _find(path)
    except OSError as e:
        raise unreadable(Path(e.filename or path), e) from e


def unreadable(path: Path, e: OSError, what: str = "") -> DemixError:
    """What a file or folder of a checkpoint is refused with that the system does not give. what: is said of it, too."""
    if e.errno in (errno.EACCES, errno.EPERM):
        return ConfigError(
            f"{path}: this user may not read it ({e.strerror}){what}. Correct its permissions, or those of the folders above."
        )
    if e.errno in (errno.EMFILE, errno.ENFILE):
        return ConfigError(
            f"{path}: no more files can be open at once ({e.strerror}){what}. Raise that limit: ulimit -n 65536."
        )
    return CorruptInput(f"{path}: cannot be read ({e.strerror or e}){what}.")


def other_format(path: Path, name: str, how: str) -> IncompatibleInputs:
    """What a checkpoint is refused with that was not saved as torch_dist. name: of its format. how: it is converted."""
    return IncompatibleInputs(f"{path}: the checkpoint's format is {name}, expected 'torch_dist'. {how}")


def convert(name: str) -> str:
    """How a checkpoint of another distributed format is converted."""
    old = ", one that still reads zarr," if name == "zarr" else ""
    return f"Load it with Megatron-LM{old} and save it again with --ckpt-format torch_dist."


def _find(path: Path) -> CheckpointDir:
    if (path / METADATA).is_file():
        return _describe(path)
    if path.is_file():
        raise ConfigError(f"checkpoint {path}: is a file. Give a folder: a Megatron run's root, an iter_* or release folder.")
    if not path.is_dir():
        raise ConfigError(f"checkpoint {path}: no such folder. Give a Megatron run's root, an iter_* or release folder.")
    tracker = path / TRACKER
    if tracker.is_file():
        return _tracked(path, tracker)
    if finished := _finished(path):
        raise ConfigError(
            f"checkpoint {path}: has no {TRACKER}, which says which iteration counts. Give the folder of one: {finished}."
        )
    for folder in (path, *_saved(path)):
        _check_format(folder)
    others = sorted(p.name for p in path.iterdir())[:_SHOWN]
    raise ConfigError(
        f"checkpoint {path}: found neither {METADATA} (a torch_dist checkpoint; it is written last) nor {TRACKER} (the root of "
        f"a run). It holds {', '.join(others) or 'nothing'}. Checkpoints in other formats are converted by Megatron's own "
        "tools first."
    )


def _tracked(root: Path, tracker: Path) -> CheckpointDir:
    try:
        text = tracker.read_text().strip()
    except UnicodeDecodeError as e:
        raise CorruptInput(f"{tracker}: cannot be read ({e}).") from e
    if text != "release" and not text.isdecimal():
        raise CorruptInput(f"{tracker}: holds {text[:40]!r}, expected an iteration number or 'release'.")
    folder = root / ("release" if text == "release" else iteration_folder(int(text)))
    if not (folder / METADATA).is_file():
        _check_format(folder)
        others = _finished(root)
        raise CorruptInput(
            f"{tracker}: names {text}, but {folder / METADATA} is missing: that checkpoint was not finished, or only copied in "
            f"part. {f'Give the folder of one that was finished: {others}' if others else 'No other one there was either'}."
        )
    return _describe(folder)


def _saved(root: Path) -> list[Path]:
    """The checkpoints in a run's root, finished or not."""
    return [root / iteration_folder(i) for i in iterations_in(root)] + [p for p in (root / "release",) if p.is_dir()]


def _finished(root: Path) -> str:
    """The names of those that were finished, of many the newest; empty if there is none."""
    names = [folder.name for folder in _saved(root) if (folder / METADATA).is_file()]
    return ", ".join(["..."] * (len(names) > _SHOWN) + names[-_SHOWN:])


def _check_format(folder: Path) -> None:
    """Raises IncompatibleInputs for formats of Megatron's that have no `.metadata`."""
    legacy = (folder / "model_optim_rng.pt").is_file() or any(p.is_dir() for p in folder.glob("mp_rank_*"))
    if legacy:
        raise other_format(
            folder,
            "Megatron's legacy 'torch' (mp_rank_*/model_optim_rng.pt)",
            "Run the command that trained it once more, with --ckpt-convert-format torch_dist --ckpt-convert-save FOLDER: it "
            "loads, saves there, and ends.",
        )
    try:
        name = json.loads((folder / BACKEND).read_text())["sharded_backend"]
    except (ValueError, KeyError, TypeError, FileNotFoundError, NotADirectoryError):
        return
    if name != "torch_dist":
        raise other_format(folder, repr(name), convert(name))


def _describe(path: Path) -> CheckpointDir:
    name = path.resolve().name
    if match := re.fullmatch(r"iter_(\d{7,})", name):
        return CheckpointDir(path, path.parent, int(match[1]), "iter")
    if name == "release":
        return CheckpointDir(path, path.parent, None, "release")
    return CheckpointDir(path, path, None, "bare")
