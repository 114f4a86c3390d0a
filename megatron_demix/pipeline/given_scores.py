"""Scores of checkpoints that the study did not make, on everything that the study scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_demix.errors import ConfigError
from megatron_demix.evaluate.job import SCORES
from megatron_demix.evaluate.scores import ScoreTable
from megatron_demix.pipeline import train_stages
from megatron_demix.pipeline.inputs import InputDigests
from megatron_demix.pipeline.scoring import scoring
from megatron_demix.pipeline.stage import Stage

if TYPE_CHECKING:
    from megatron_demix.pipeline.dag import Dag


def named_checkpoints(given: Sequence[str]) -> dict[str, Path]:
    """Paths by name, from texts like "name=path"; a path alone is named after its folder. Raises ConfigError."""
    found: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or "/" in name or Path(text).exists():
            name, path = Path(text).resolve().name, text
        if not name or not path:
            raise ConfigError(f"--checkpoint {text!r}: expected a path, or NAME=PATH.")
        if name in found:
            raise ConfigError(f"--checkpoint: {name!r} is given twice ({found[name]}, {path}). Name them: NAME=PATH.")
        found[name] = Path(path)
    return found


def given_scores(dag: Dag, checkpoints: Mapping[str, Path], *, final: bool) -> Stage:
    """A stage whose scores.json has a row for each checkpoint. final: on the splits that final runs are compared on.

    Raises ConfigError or CorruptInput for what is no checkpoint, IncompatibleInputs for one of another model.
    """
    digests = InputDigests(dag.run / "cache" / "input_digests.json")
    stages = {
        name: train_stages.given(dag.study, f"evaluate/given/{name}", p, dag.run, digests) for name, p in checkpoints.items()
    }
    digests.save()

    def models() -> dict[str, Any]:
        return {"checkpoints": {name: train_stages.checkpoint_of(stage) for name, stage in stages.items()}}

    split, tasks = ("test", dag.tasks.final) if final else ("valid", dag.tasks.search)
    return scoring(dag, "evaluate/scores", split, tasks, [*stages.values()], models, lambda: len(stages))


def table(stage: Stage) -> tuple[list[str], list[list[str]]]:
    """(titles, rows) of a finished stage, one row a score."""
    scores = ScoreTable.read(stage.folder / SCORES)
    titles = ["score", "unit", "better", *scores.rows]
    return titles, [
        [s.name, s.unit, s.direction, *(f"{row[s.name]:.4f}" for row in scores.rows.values())] for s in scores.scores
    ]
