"""How far a long job is: bars on a terminal, lines in a log, heartbeat files, JSONL metrics.

A worker process writes a heartbeat file; whoever waits for it (a bar on this machine, `demix status` elsewhere) reads it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from megatron_demix.errors import storage_errors


class Advance(Protocol):
    """Called as advance(units) when that many more units of work are done; info is a short text shown beside the bar."""

    def __call__(self, units: float = 1, *, info: str | None = None) -> None: ...


@contextmanager
def progress_bar(label: str, total: float, *, unit: str = "", enabled: bool = True) -> Iterator[Advance]:
    """A rich progress bar on standard error for a terminal; elsewhere a line every 10 s. Yields its Advance."""
    if not enabled:
        yield lambda units=1, *, info=None: None
        return
    if not sys.stderr.isatty():
        yield from _lines(label, total, unit)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[info]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total, info="")

        def advance(units: float = 1, *, info: str | None = None) -> None:
            fields: dict[str, Any] = {} if info is None else {"info": info}
            bar.update(task, advance=units, **fields)

        yield advance


def _lines(label: str, total: float, unit: str) -> Iterator[Advance]:
    started = last = time.monotonic()
    done = 0.0

    def advance(units: float = 1, *, info: str | None = None) -> None:
        nonlocal last, done
        done += units
        now = time.monotonic()
        if now - last >= 10:
            last = now
            share = f"{100 * done / total:.0f} %" if total else f"{done:g}"
            rate = f"{done / (now - started):.3g} {unit or 'units'}/s"
            print(f"{label}: {share}, {rate}{', ' + info if info else ''}", file=sys.stderr, flush=True)

    yield advance


class Heartbeat:
    """A small JSON file that says how far a process is and that it lives: {"done", "total", "unit", "pid", "time", "left_s",
    ...}. left_s: seconds until it is done at the mean speed of this process; None before its first unit.
    """

    def __init__(self, path: Path, *, interval_s: float = 0.5) -> None:
        self._path, self._interval_s, self._last = Path(path), interval_s, 0.0
        self._first: tuple[float, float] | None = None

    def beat(self, done: float, total: float, unit: str, **facts: Any) -> None:
        """Write the file, at most once per interval (always at the end). A heartbeat that cannot be written is dropped."""
        now = time.time()
        first_time, first_done = self._first = self._first or (now, done)
        if done < total and now - self._last < self._interval_s:
            return
        self._last = now
        left_s = (total - done) * (now - first_time) / (done - first_done) if done > first_done else None
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            temporary.write_text(
                json.dumps(
                    {"done": done, "total": total, "unit": unit, "pid": os.getpid(), "time": now, "left_s": left_s} | facts
                )
            )
            os.replace(temporary, self._path)
        except OSError:
            temporary.unlink(missing_ok=True)

    @staticmethod
    def read(path: Path) -> dict[str, Any] | None:
        try:
            return json.loads(Path(path).read_text())
        except (OSError, ValueError):
            return None


METRICS = "metrics.jsonl"
"""In a run's folder."""


class MetricsLog:
    """Appends one JSON object a line, with the time and the event's name. One write a line, so processes may share the file."""

    def __init__(self, path: Path) -> None:
        self._path = Path(path)

    def write(self, event: str, **facts: Any) -> None:
        line = json.dumps({"time": round(time.time(), 3), "event": event} | facts, default=str)
        with storage_errors(f"writing {self._path}"):
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, line.encode() + b"\n")
            finally:
                os.close(descriptor)
