"""A study's task files: which split the search and the final runs are scored on, and a digest for the keys of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_demix.errors import IncompatibleInputs
from megatron_demix.pipeline.inputs import InputDigests
from megatron_demix.study.search import TASK_SCORES, TaskSpec
from megatron_demix.study.study import Study


@dataclass(frozen=True)
class ScoredTasks:
    """specs: with absolute path and the split that is scored. digests: of the files of each."""

    specs: Sequence[TaskSpec] = ()
    digests: Sequence[str] = ()
    read_again: Callable[[TaskSpec], str] | None = None

    def check_unchanged(self) -> None:
        """Raises IncompatibleInputs where files differ from those that the digests were taken of, hours or days ago."""
        assert self.read_again or not self.specs
        for spec, digest in zip(self.specs, self.digests, strict=True):
            if self.read_again and self.read_again(spec) != digest:
                raise IncompatibleInputs(
                    f"task {spec.name!r}: files of {spec.path} have changed since this run began. Restore them, or run the "
                    "same command again to score all models on what is there now."
                )

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the scores, for the keys of stages; where the files lie does not."""
        if not self.specs:
            return {}
        described = [
            spec.model_dump(exclude={"path", "final_split"})
            | ({"acc_norm": "by character"} if "acc_norm" in TASK_SCORES[spec.format] else {})  # once by byte
            for spec in self.specs
        ]
        return {"tasks": [facts | {"digest": digest} for facts, digest in zip(described, self.digests, strict=True)]}


@dataclass(frozen=True)
class TaskInputs:
    search: ScoredTasks = ScoredTasks()
    final: ScoredTasks = ScoredTasks()


def check_tasks(inputs: TaskInputs) -> None:
    """Read the items that will be scored, days from now, and try what judges them. Raises what scoring would."""
    from megatron_demix.evaluate.tasks.answers import Judge
    from megatron_demix.evaluate.tasks.task import read_task

    tasks = [read_task(spec) for spec in [*inputs.search.specs, *inputs.final.specs]]
    for kind in {task.format.kind for task in tasks if task.spec.generates}:
        Judge(kind, timeout_s=1, workers=1)


def task_inputs(study: Study, root: Path, digests: InputDigests) -> TaskInputs:
    """root: what relative paths start from. Raises ConfigError where files are absent, unless the digests allow that."""
    if not study.evaluate.tasks:
        return TaskInputs()
    from megatron_demix.evaluate.tasks import task
    from megatron_demix.evaluate.tasks.records import with_labels

    def read(spec: TaskSpec) -> str:
        files, shots = task.task_files(spec)
        return digests.of(with_labels([*files, *shots]))

    def scored(split_of: Callable[[TaskSpec], str]) -> ScoredTasks:
        specs = [
            given.model_copy(update={"path": (root / given.path).resolve(), "split": split_of(given)})
            for given in study.evaluate.tasks
        ]
        found = [digests.answer(spec.model_dump_json(), partial(read, spec), kind="tasks") for spec in specs]
        return ScoredTasks(specs, found, read)

    return TaskInputs(scored(task.search_split), scored(task.final_split))
