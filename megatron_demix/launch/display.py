"""What one sees while stages run: a line for each that ends, and a bar for each that is under way."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_demix.pipeline.stage import Stage
from megatron_demix.progress import Heartbeat
from megatron_demix.units import format_count, format_duration

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Display:
    """Writes to standard error: bars on a terminal, otherwise a line every 15 s for each stage under way."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._spoken: dict[str, float] = {}
        self._num_stages = self._num_done = 0

    def begin(self, stages: Sequence[Stage], already_done: Sequence[Stage]) -> None:
        self._num_stages, self._num_done = len(stages), len(already_done)
        if already_done:
            self._say(f"{len(already_done)} of {len(stages)} stages are already done")
        if sys.stderr.isatty() and not self._quiet and len(already_done) < len(stages):
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[info]}"),
                console=Console(stderr=True),
            )
            self._bars.start()

    def started(self, stage: Stage) -> None:
        self._spoken[stage.name] = time.monotonic()
        if self._bars:
            self._tasks[stage.name] = self._bars.add_task(stage.name, total=None, info="")

    def refresh(self, running: Sequence[Stage]) -> None:
        """Read the heartbeats of the stages under way."""
        for stage in running:
            beat = Heartbeat.read(stage.heartbeat)
            if beat is None:
                continue
            info = " ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in _facts(beat).items())
            if self._bars:
                self._bars.update(self._tasks[stage.name], completed=beat["done"], total=beat["total"], info=info)
            elif time.monotonic() - self._spoken[stage.name] >= 15:
                self._spoken[stage.name] = time.monotonic()
                share = f"{format_count(int(beat['done']))} of {format_count(int(beat['total']))} {beat['unit']}"
                self._say(f"        ... {stage.name}: {share} {info}")

    def finished(self, stage: Stage, wall_s: float) -> None:
        self._num_done += 1
        if self._bars and stage.name in self._tasks:
            self._bars.remove_task(self._tasks.pop(stage.name))
        self._say(f"[{self._num_done:>2}/{self._num_stages}] {stage.name} ({format_duration(wall_s)})")

    def end(self) -> None:
        if self._bars:
            self._bars.stop()
            self._bars = None

    def _say(self, line: str) -> None:
        if self._quiet:
            return
        if self._bars:
            self._bars.console.print(line, highlight=False, markup=False)
        else:
            print(line, file=sys.stderr, flush=True)


def _facts(beat: dict) -> dict:
    return {k: v for k, v in beat.items() if k not in ("done", "total", "unit", "pid", "time", "left_s") and v is not None}
