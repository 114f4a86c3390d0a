"""One task's questions: from which files they come, which of their splits are scored, and the worked examples before them."""

from __future__ import annotations

import filecmp
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_demix.errors import ConfigError, CorruptInput
from megatron_demix.evaluate.tasks.formats import FORMATS, Format, Item
from megatron_demix.evaluate.tasks.records import find_files, read_records
from megatron_demix.study.search import TaskSpec


def search_split(spec: TaskSpec) -> str:
    published = FORMATS[spec.format].splits
    return spec.split or next(s for s in ("validation", "test") if s in published)


def final_split(spec: TaskSpec) -> str:
    published = FORMATS[spec.format].splits
    return spec.final_split or ("test" if "test" in published else search_split(spec))


def task_files(spec: TaskSpec) -> tuple[list[Path], list[Path]]:
    """The files of a task's questions (search_split), and those of its worked examples. Raises ConfigError."""
    form = FORMATS[spec.format]

    def found(wanted: str) -> list[Path]:
        return find_files(spec.path, wanted, spec.name, by_subject=form.by_subject)

    return found(search_split(spec)), found(form.examples) if spec.num_shots and form.examples else []


def share_items(searched: TaskSpec, final: TaskSpec) -> bool:
    """Whether one task, scored on two splits (spec.split), is scored on the same items: the splits may come from one file, or
    from files of the same bytes. Of files that are gone, the splits' names are believed."""
    if searched.split == final.split:
        return True
    if FORMATS[searched.format].split_of is not None:
        return False  # one file, whose records say their split
    try:
        (files, _), (others, _) = (task_files(spec) for spec in (searched, final))
        return any(a.samefile(b) or filecmp.cmp(a, b, shallow=False) for a in files for b in others)
    except (ConfigError, OSError):
        return False


@dataclass(frozen=True)
class Task:
    """A task's questions. header: the worked examples, in front of every context."""

    spec: TaskSpec
    items: Sequence[Item]
    header: str

    @property
    def format(self) -> Format:
        return FORMATS[self.spec.format]


def read_task(spec: TaskSpec) -> Task:
    """The questions of its search_split. Raises ConfigError where files are absent, CorruptInput where a record is not what the
    format has."""
    form, split = FORMATS[spec.format], search_split(spec)
    files, shot_files = task_files(spec)
    items = form.items(read_records(files, spec.format, form.keys), split)
    shots: list[Item] = []
    if spec.num_shots and form.examples:
        if shot_files == files and form.split_of is None:
            shots, items = items[: spec.num_shots], items[spec.num_shots :]
        else:
            shots = form.items(read_records(shot_files, spec.format, form.keys), form.examples)[: spec.num_shots]
    if len(shots) < spec.num_shots:
        raise CorruptInput(
            f"task {spec.name!r}: {len(shots)} worked examples in {shot_files[0]}, num_shots is {spec.num_shots}."
        )
    if not items:
        raise CorruptInput(f"task {spec.name!r}: no item of split {split!r} in {files[0]}; nothing could be scored.")
    count = min(spec.limit or len(items), len(items))
    spread = [items[i * len(items) // count] for i in range(count)]
    return Task(spec, spread, "".join(f"{shot.shot}\n\n" for shot in shots))
