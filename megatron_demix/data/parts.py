"""Parts of a tokenizing run, each made by a process of its own on any machine: where they are, and how lines are numbered.

Which bytes of the input a part is, follows from the sizes of the files (`inputs.read_blocks`), so no one has to plan it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron_demix.artifact import is_temporary, read_json
from megatron_demix.data.inputs import Block

JOURNAL = "journal.json"


@dataclass
class Lines:
    """How many lines a run over a part has read of its first and of its last file: the part before may end within the first.

    files: begun so far; at: the last one; begins_within: the part begins within its first file; first_rejected: of that file.
    """

    files: int = 0
    at: str = ""
    begins_within: bool = False
    first_rejected: int = 0
    last: int = 0

    def add(self, block: Block, num_rejected: int) -> None:
        if self.at != str(block.file):
            self.files, self.at, self.last = self.files + 1, str(block.file), 0
            self.begins_within |= block.skipped_bytes > 0
        if self.files == 1:
            self.first_rejected += num_rejected
        self.last += block.num_lines


def moved(line: bytes, shift: int) -> bytes:
    """A rejected document's entry with a larger line number."""
    entry = json.loads(line)
    name, _, number = entry["document"].rpartition(":")
    return (json.dumps(entry | {"document": f"{name}:{int(number) + shift}"}) + "\n").encode()


def complete_parts(folder: Path, identity: str) -> list[Path]:
    """Folders of a whole set of finished parts in `folder`, in order; empty if there is none."""
    sets: dict[int, dict[int, Path]] = {}
    for path in folder.glob("part-*-of-*"):
        journal = read_json(path / JOURNAL) if (path / JOURNAL).is_file() else {}
        if journal.get("identity") == identity and journal.get("whole"):
            _, index, _, number = path.name.split("-")
            sets.setdefault(int(number), {})[int(index)] = path
    return next(([parts[i] for i in range(n)] for n, parts in sets.items() if len(parts) == n), [])


def part_folder(folder: Path, part: tuple[int, int]) -> Path:
    return folder / f"part-{part[0]}-of-{part[1]}"


def remove_parts(folder: Path) -> None:
    """Once the whole has been made of them, by the one who works in `folder`; with what killed processes left behind."""
    for path in folder.glob("part-*-of-*"):
        shutil.rmtree(path)
    for path in folder.glob(".*"):
        if is_temporary(path):
            path.unlink(missing_ok=True)
    for path in folder.parent.glob(f".{folder.name}.part-*-of-*.lock"):
        path.unlink(missing_ok=True)
