"""A stage: what it needs, what it makes, and where. Its key follows from its settings and its needs' keys alone, so the whole
DAG is known, and can be shown, before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megatron_demix.artifact import fingerprint, is_done, publish
from megatron_demix.errors import CorruptInput, OutputExists

State = Literal["done", "damaged", "partial", "to do"]
POINTER = "pointer.json"
"""In an artifact that stands for a checkpoint: where that is, as {"checkpoint": path}, from the artifact's folder."""
_MADE = ".made-part-"


class Load(NamedTuple):
    """What a stage's ranks have to do: train or score so many models, each on so many tokens, tasks aside. A trained model
    leaves so many checkpoints."""

    does: Literal["trains", "scores"]
    models: int
    tokens: int
    checkpoints: int = 0


@dataclass(frozen=True, eq=False)
class Stage:
    """One artifact and how to make it.

    name: unique in a run, a path such as "components/code"; the artifact lies at <run>/<name>-<key>.
    settings: everything that decides the result, apart from `needs`; never where or how fast it runs.
    make: fills a folder, in this process.
    ranks: 0 for work done by `make` alone. Otherwise `make` writes the job file, and then this many ranks of
        `megatron_demix.pipeline.worker` finish the folder; what they have done survives a kill. Where nothing is left for ranks
        to do, `make` finishes the folder itself and writes no job file.
    make_part: makes part i of n, (i, n), in the work folder, itself or with ranks, as `make` does; `make` goes on with what it
        finds there, and gives the same bytes if that is nothing. Only a scheduler starts parts, as processes of their own.
    check: looks at the data it needs as soon as that is done, whatever else is not, and raises where it cannot fill the stage.
    judge: looks at the filled folder before it is published, and raises where it is not what it has to be.
    script: what the ranks run, where that is a command of its own, as a shell script.
    stands_for: the user's own checkpoint or indexed data (prefixes by split) that it is, where that lies now: it may have been
        moved since the artifact was made.
    load: what its ranks have to do, None if nothing; of a round that may turn out unnecessary, at most, until that is known.
    """

    name: str
    run: Path
    settings: Mapping[str, Any]
    needs: tuple[Stage, ...]
    make: Callable[[Path], None]
    ranks: int = 0
    make_part: Callable[[Path, tuple[int, int]], None] | None = None
    check: Callable[[], object] = lambda: None
    judge: Callable[[Path], None] = lambda folder: None
    script: Callable[[], str] | None = None
    stands_for: Path | Mapping[str, Sequence[Path]] | None = None
    load: Callable[[], Load | None] = lambda: None

    @cached_property
    def key(self) -> str:
        return fingerprint({"stage": self.name, "settings": self.settings, "needs": [[s.name, s.key] for s in self.needs]})

    @property
    def kind(self) -> str:
        """What the stage does: the first word of its name."""
        return self.name.split("/")[0]

    @property
    def folder(self) -> Path:
        return self.run / f"{self.name}-{self.key}"

    @property
    def work(self) -> Path:
        """Where a stage that keeps its unfinished work does so between runs."""
        return self.folder.with_name(f".{self.folder.name}.work")

    @property
    def job(self) -> Path:
        """What the ranks of this stage are told. Not part of the artifact: it holds paths."""
        return self.log.with_suffix(".json")

    @property
    def log(self) -> Path:
        return self.run / "logs" / f"{self.name.replace('/', '.')}-{self.key}.log"

    @property
    def lock(self) -> Path:
        """A file that whoever makes this stage has a lock on, and each of its ranks."""
        return self.log.with_suffix(".lock")

    @property
    def heartbeat(self) -> Path:
        return self.log.with_suffix(".heartbeat")

    @property
    def whole(self) -> Stage:
        """The stage that this is a part of: itself."""
        return self

    def part(self, index: tuple[int, int]) -> Part:
        name = f"{self.name}@{index[0]}-of-{index[1]}"
        return Part(name, self.run, self.settings, self.needs, self.make, self.ranks, self.make_part, of=self, index=index)

    @property
    def _keeps_work(self) -> bool:
        return bool(self.ranks or self.make_part)

    def done(self) -> bool:
        return is_done(self.folder, self.key)

    def damage(self) -> str:
        """What done() raises where the artifact is damaged; empty where it is not, or not there."""
        try:
            self.done()
        except (CorruptInput, OutputExists) as e:
            return str(e)
        return ""

    def is_intact(self) -> bool:
        """done(), but False where the artifact is damaged."""
        return self.state() == "done"

    def state(self) -> State:
        try:
            return "done" if self.done() else "partial" if self._keeps_work and self.work.exists() else "to do"
        except (CorruptInput, OutputExists):
            return "damaged"

    def begin(self) -> bool:
        """For a stage with ranks: the work folder and the job file, ready for the workers. False if they have nothing to do."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        for of_earlier_ranks in (self.job, self.heartbeat):
            of_earlier_ranks.unlink(missing_ok=True)
        self._make()
        return self.job.exists()

    def _make(self) -> None:
        """What this process does in the work folder."""
        self.work.mkdir(parents=True, exist_ok=True)
        self.make(self.work)

    def finish(self) -> None:
        """Publish the artifact: make it, or take over what the ranks have finished."""
        # Settings are stored as JSON; going through it here makes the manifest the same whatever Python types they had.
        settings = json.loads(json.dumps(self.settings, default=str))
        with publish(self.folder, self.key, self.kind, settings, work=self.work if self._keeps_work else None) as folder:
            if not self.ranks:
                self.make(folder)
            self.judge(folder)
            for marker in folder.glob(f"{_MADE}*"):
                marker.unlink()


@dataclass(frozen=True, eq=False)
class Part(Stage):
    """Part index = (i, n) of a stage, as a process of its own makes it. Done when that, or the whole stage, is."""

    of: Stage = field(kw_only=True)
    index: tuple[int, int] = (0, 1)

    @cached_property
    def key(self) -> str:
        return self.of.key

    @property
    def whole(self) -> Stage:
        return self.of

    def done(self) -> bool:
        return self.made or self.of.done()

    @property
    def made(self) -> bool:
        """Whether it waits to be put together with the others."""
        return self._made.exists()

    @property
    def work(self) -> Path:
        return self.of.work

    def finish(self) -> None:
        if not self.ranks:
            self._make()
        self.work.mkdir(parents=True, exist_ok=True)
        self._made.touch()

    @property
    def _made(self) -> Path:
        # Among what it says is made, and so gone with that: when the whole is published, or the work thrown away.
        return self.work / f"{_MADE}{self.index[0]}-of-{self.index[1]}"

    def _make(self) -> None:
        assert self.make_part is not None
        self.work.mkdir(parents=True, exist_ok=True)
        self.make_part(self.work, self.index)


def with_needs(stages: Iterable[Stage]) -> list[Stage]:
    """The stages and everything they need, each once, needs first."""
    ordered: dict[str, Stage] = {}

    def visit(stage: Stage) -> None:
        if stage.name not in ordered:
            for need in stage.needs:
                visit(need)
            ordered[stage.name] = stage

    for stage in stages:
        visit(stage)
    return list(ordered.values())
