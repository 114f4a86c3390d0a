"""The table of `demix status`: each stage, what becomes of it, how far it is, when it will be done, and where its log is."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_demix.errors import ConfigError, Incomplete
from megatron_demix.launch.attempts import Attempts
from megatron_demix.launch.backend import Activity, Backend
from megatron_demix.pipeline.dag import Dag
from megatron_demix.pipeline.stage import Stage
from megatron_demix.progress import Heartbeat
from megatron_demix.terminal import new_table, on_terminal
from megatron_demix.units import format_duration

if TYPE_CHECKING:
    from rich.table import Table

COLOURS = {
    "done": "green",
    "running": "cyan",
    "queued": "blue",
    "failed": "red",
    "damaged": "red",
    "partial": "yellow",
    "to do": "dim",
}
_REFRESH_S = 2
_SILENT_S = 60
"""A heartbeat is late when it is older than this and three units of work: nothing is said of the time left then."""


def rows(dag: Dag, active: Mapping[str, Activity]) -> list[dict[str, Any]]:
    """A row a stage: "stage", "state" (one of COLOURS), "key", "log"; where known "job" (the scheduler's), "note",
    "progress" (0 to 1), "eta_s", or "silent_s" instead, if it has not been heard for that long; of a stage that array elements
    make together and that has begun "parts" and, of these, "parts_done"."""
    launch = dag.study.launch
    parts = launch.slurm.parts if launch.backend == "slurm" else {}
    found = [_row(stage, active.get(stage.name), parts.get(stage.kind, 1)) for stage in dag.all]
    # The scheduler's own work is of interest where nothing else is under way, and something is missing.
    others = [name for name in active if name not in {stage.name for stage in dag.all}]
    if len(others) == len(active) and any(row["state"] != "done" for row in found):
        found += [{"stage": name, "state": active[name].state, "key": "", "log": ""} | _named(active[name]) for name in others]
    return found


def _row(stage: Stage, activity: Activity | None, num_parts: int) -> dict[str, Any]:
    row: dict[str, Any] = {"stage": stage.name, "state": "done", "key": stage.key, "log": str(stage.log)}
    if stage.is_intact():
        return row
    if damage := stage.damage():
        return row | {"state": "damaged", "note": damage}
    if activity:
        row["state"] = activity.state
        row |= _named(activity)
    elif failed := Attempts.read(stage).failed:
        row |= {"state": "failed", "note": failed}
    else:
        row["state"] = stage.state()
    if num_parts > 1 and stage.make_part:
        num_done = sum(stage.part((i, num_parts)).made for i in range(num_parts))
        if num_done or row["state"] in ("running", "partial", "failed"):
            row |= {"parts": num_parts, "parts_done": num_done}
    if row["state"] in ("running", "partial", "failed") and (beat := Heartbeat.read(stage.heartbeat)):
        row["progress"] = beat["done"] / max(beat["total"], 1)
        if row["state"] == "running":
            row |= _time_left(beat, time.time() - beat["time"])
    return row


def _named(activity: Activity) -> dict[str, str]:
    return {key: value for key, value in (("job", activity.job), ("note", activity.reason)) if value}


def _time_left(beat: dict[str, Any], age_s: float) -> dict[str, float]:
    left_s, units = beat.get("left_s"), beat["total"] - beat["done"]
    if age_s > _SILENT_S + 3 * (left_s or 0) / max(units, 1):
        return {"silent_s": age_s}
    return {} if left_s is None else {"eta_s": max(0.0, left_s - age_s)}


def show_status(dag: Dag, backend: Backend, *, as_json: bool, watch: bool) -> None:
    """Print it once, or keep it on the terminal until nothing is running or queued. Where the scheduler cannot be asked, what
    the artifacts say is shown, with a warning."""
    if as_json or not (watch and sys.stdout.isatty()):
        unknown = ""
        try:
            found = rows(dag, backend.activity())
        except (ConfigError, Incomplete) as e:
            unknown = f"what is queued or running is not known: {e}"
            found = rows(dag, {})
        if as_json:
            print(json.dumps(found, indent=1))
        else:
            on_terminal().print(*_shown(found, None if unknown else dag.run))
        if unknown:
            print(f"warning: {unknown}", file=sys.stderr)
        return
    from rich.console import Group
    from rich.live import Live

    with Live(refresh_per_second=4, console=on_terminal()) as live:
        while True:
            try:
                found = rows(dag, backend.activity())
            except Incomplete:  # the scheduler has no time; what was seen last stays
                time.sleep(_REFRESH_S)
                continue
            except ConfigError:
                break  # nor will it be known later
            live.update(Group(*_shown(found, dag.run)))
            if not any(r["state"] in ("running", "queued") for r in found):
                return
            time.sleep(_REFRESH_S)
    show_status(dag, backend, as_json=False, watch=False)


def _shown(found: Sequence[dict[str, Any]], run: Path | None) -> tuple[Table, str]:
    """run: where to look next if nothing is under way; None: that is not known."""
    from rich.markup import escape

    by_jobs = any("job" in row for row in found)
    table = new_table("stage", "state", *(["job"] if by_jobs else []), "progress", "left", "log", right=("progress", "left"))
    for row in found:
        state = row["state"]
        progress = f"{100 * row['progress']:.0f} %" if "progress" in row else ""
        if row.get("parts_done", 0) < row.get("parts", 0):
            progress = f"{row['parts_done']} of {row['parts']} parts"
        left = format_duration(row["eta_s"]) if "eta_s" in row else ""
        if "silent_s" in row:
            left = f"silent for {format_duration(row['silent_s'])}"
        job = [row.get("job", "")] if by_jobs else []
        log = row["log"] if state in ("running", "partial", "failed") and Path(row["log"]).exists() else ""
        note = f" {escape(row['note'])}" if state == "queued" and "note" in row else ""
        table.add_row(row["stage"], f"[{COLOURS[state]}]{state}[/]{note}", *job, progress, left, escape(log))
    states = {r["state"] for r in found}
    failures = "".join(f"\n{escape(r['note'])}" for r in found if r["state"] in ("failed", "damaged"))
    idle = ""
    if run and not states & {"running", "queued"} and states != {"done"}:
        idle = f"\n{escape(_next_step(states, run))}"
    return table, counts([r["state"] for r in found]) + failures + idle


def _next_step(states: set[str], run: Path) -> str:
    if states == {"to do"} and not (run / "logs").exists():
        return "nothing is under way: `demix run` makes it here, `demix submit` where launch.backend says"
    return f"nothing is under way: `demix resume` goes on with what is missing; logs of what was tried: {run / 'logs'}"


def counts(states: Sequence[str]) -> str:
    return "  ".join(f"{states.count(state)} {state}" for state in COLOURS if state in states)
