"""The table of `demix status`: each stage, what becomes of it, how far it is, when it will be done, and where its log is."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_demix.launch.attempts import Attempts
from megatron_demix.launch.backend import Backend
from megatron_demix.pipeline.dag import Dag
from megatron_demix.pipeline.stage import Stage
from megatron_demix.progress import Heartbeat
from megatron_demix.units import format_duration

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

COLOURS = {
    "done": "green",
    "running": "cyan",
    "queued": "blue",
    "failed": "red",
    "partial": "yellow",
    "to do": "dim",
}
_REFRESH_S = 2


def rows(dag: Dag, backend: Backend) -> list[dict[str, Any]]:
    """A row a stage: "stage", "state" (one of COLOURS), "key", "log"; where known "note", "progress" (0 to 1), "eta_s"."""
    active = backend.activity()
    return [_row(stage, active.get(stage.name, "")) for stage in dag.all]


def _row(stage: Stage, activity: str) -> dict[str, Any]:
    state, note = activity.partition(" ")[::2]
    row: dict[str, Any] = {"stage": stage.name, "state": state, "key": stage.key, "log": str(stage.log)}
    if stage.done():
        row["state"] = "done"
        return row
    if not state:
        note = Attempts.read(stage).failed
        row["state"] = "failed" if note else stage.state()
    if note:
        row["note"] = note.strip("()")
    if row["state"] in ("running", "partial", "failed") and (beat := Heartbeat.read(stage.heartbeat)):
        row["progress"] = beat["done"] / max(beat["total"], 1)
        if row["state"] == "running" and beat.get("left_s") is not None:
            row["eta_s"] = max(0.0, beat["left_s"] - (time.time() - beat["time"]))
    return row


def show_status(dag: Dag, backend: Backend, *, as_json: bool, watch: bool) -> None:
    """Print it once, or keep it on the terminal until nothing is running or queued."""
    if as_json:
        print(json.dumps(rows(dag, backend), indent=1))
        return
    if not (watch and sys.stdout.isatty()):
        on_terminal().print(*_shown(rows(dag, backend)))
        return
    from rich.console import Group
    from rich.live import Live

    with Live(refresh_per_second=4, console=on_terminal()) as live:
        while True:
            found = rows(dag, backend)
            live.update(Group(*_shown(found)))
            if not any(r["state"] in ("running", "queued") for r in found):
                return
            time.sleep(_REFRESH_S)


def _shown(found: Sequence[dict[str, Any]]) -> tuple[Table, str]:
    from rich.markup import escape

    table = new_table("stage", "state", "progress", "left", "log")
    for row in found:
        state = row["state"]
        progress = f"{100 * row['progress']:.0f} %" if "progress" in row else ""
        left = format_duration(row["eta_s"]) if "eta_s" in row else ""
        log = "" if state in ("done", "to do", "queued") else row["log"]
        note = f" {escape(row['note'])}" if state == "queued" and "note" in row else ""
        table.add_row(row["stage"], f"[{COLOURS[state]}]{state}[/]{note}", progress, left, escape(log))
    failures = "".join(f"\n{escape(r['note'])}" for r in found if r["state"] == "failed")
    return table, counts([r["state"] for r in found]) + failures


def counts(states: Sequence[str]) -> str:
    return "  ".join(f"{states.count(state)} {state}" for state in COLOURS if state in states)


def new_table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in columns:
        justify = "right" if column in ("ranks", "progress", "left") else "left"
        table.add_column(column, no_wrap=True, justify=justify)  # type: ignore[arg-type]
    return table


def on_terminal() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)
