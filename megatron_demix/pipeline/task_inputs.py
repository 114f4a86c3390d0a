"""A study's task files: which split the search and the final runs are scored on, and a digest for the keys of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_demix.pipeline.inputs import InputDigests
from megatron_demix.study.search import TASK_SCORES, TaskSpec
from megatron_demix.study.study import Study


@dataclass(frozen=True)
class ScoredTasks:
    """specs: with absolute path and the split that is scored. digests: of the files of each."""

    specs: Sequence[TaskSpec] = ()
    digests: Sequence[str] = ()

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
    """Read the items that will be scored, days from now. Raises ConfigError and CorruptInput, as scoring would."""
    from megatron_demix.evaluate.tasks.suite import read_task

    for spec in [*inputs.search.specs, *inputs.final.specs]:
        read_task(spec, spec.split or "")


def task_inputs(study: Study, root: Path, digests: InputDigests) -> TaskInputs:
    """root: what relative paths start from. Raises ConfigError where files are absent, unless the digests allow that."""
    if not study.evaluate.tasks:
        return TaskInputs()
    from megatron_demix.evaluate.tasks import suite
    from megatron_demix.evaluate.tasks.records import with_labels

    def scored(split_of: Any) -> ScoredTasks:
        specs, found = [], []
        for given in study.evaluate.tasks:
            split = split_of(given)
            spec = given.model_copy(update={"path": (root / given.path).resolve(), "split": split})

            def digest(spec: TaskSpec = spec, split: str = split) -> str:
                files, shots = suite.task_files(spec, split)
                return digests.of(with_labels([*files, *shots]))

            found.append(digests.answer(f"task {spec.model_dump_json()}", digest))
            specs.append(spec)
        return ScoredTasks(specs, found)

    return TaskInputs(scored(suite.search_split), scored(suite.final_split))
