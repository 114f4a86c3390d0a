"""How often a stage was begun without getting any further, so that what fails at every start is not started for ever."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_demix.artifact import fingerprint, read_json, write_json
from megatron_demix.errors import CorruptInput, StageFailed, StorageError
from megatron_demix.pipeline.stage import Stage

MOST_ATTEMPTS = 3
MOST_TIMES = 5
"""Starts that a time limit may end without anything new."""


@dataclass
class Attempts:
    """What is known of a stage that is not done. Kept beside its log, since it is no part of the artifact."""

    saved: str = ""
    """Fingerprint of what its earlier attempts had saved when the last one began."""
    number: int = 0
    """Attempts that began with exactly that saved, less those before the last that were asked to stop."""
    asked: bool = False
    """The last one was asked to stop, or pre-empted: nothing is wrong with it."""
    timed: int = 0
    """Attempts that began with exactly that saved and were ended by the time limit."""
    starts: int = 0
    """Attempts of any kind, so that whoever looks twice sees that there was one in between."""
    failed: str = ""
    """Why it will not be tried again; empty while it will."""

    @classmethod
    def read(cls, stage: Stage) -> Attempts:
        try:
            return cls(**read_json(_path(stage)))
        except (CorruptInput, TypeError):
            return cls()

    def begin(self, stage: Stage) -> None:
        """Count an attempt. Raises StageFailed when MOST_ATTEMPTS (MOST_TIMES, at the time limit) have not got any further."""
        saved = _saved(stage)
        if saved != self.saved:
            self.number = self.timed = 0
        elif self.asked:
            self.number -= 1
        self.number += 1
        self.starts += 1
        self.saved, self.failed, self.asked = saved, "", False
        if self.timed >= MOST_TIMES:
            raise StageFailed(
                f"stage {stage.name}: did not get further in {MOST_TIMES} starts of launch.slurm.time; raise it, then "
                f"`demix resume` goes on. Logs: {stage.log.with_suffix('')}*.log"
            )
        if self.number > MOST_ATTEMPTS:
            raise StageFailed(
                f"stage {stage.name}: ended {MOST_ATTEMPTS} times without saving anything new, and is not started again. Look "
                f"at {stage.log.with_suffix('')}*.log; when the cause is gone, `demix resume` goes on."
            )
        self.write(stage)

    @property
    def over(self) -> bool:
        """Whether begin() has raised for it."""
        return self.number > MOST_ATTEMPTS or self.timed >= MOST_TIMES

    def write(self, stage: Stage) -> None:
        stage.log.parent.mkdir(parents=True, exist_ok=True)
        write_json(_path(stage), asdict(self))


def failed(stage: Stage, said: str) -> None:
    """Keep for `demix status` why a stage will not be tried again. On a full disk, or one that is gone, this is not kept: what
    failed is still to be heard of."""
    with suppress(OSError, StorageError):
        Attempts(failed=of_stage(stage, said)).write(stage)


def of_stage(stage: Stage, said: str) -> str:
    """What went wrong, with the stage's name, which it may have already."""
    return said if said.startswith("stage ") else f"stage {stage.name}: {said}"


def forget(stage: Stage) -> None:
    """A person wants it tried again."""
    _path(stage).unlink(missing_ok=True)


def _path(stage: Stage) -> Path:
    return stage.log.with_suffix(".attempts.json")


def _saved(stage: Stage) -> str:
    """Names the checkpoints and finished rows in the stage's work folder (the trainer's log of losses is ahead of them), and
    how far its text is tokenized or its blend written."""
    work = stage.whole.work
    rows = [[p.name, p.stat().st_size] for p in sorted(work.glob("rows-*.jsonl"))]
    journals = [[str(p.relative_to(work)), p.read_text()] for p in sorted(work.rglob("journal.json"))]
    shards = sorted(p.name for p in work.glob(".*.work-*/shard-*.json"))
    return fingerprint([sorted(p.name for p in work.glob("iter_*")), rows, journals, shards])
