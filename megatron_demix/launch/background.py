"""A study in the background of this machine: `demix submit` starts it, `demix status` looks at it, `demix cancel` stops it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_demix.errors import Incomplete, StageFailed
from megatron_demix.launch.backend import CANCEL_WAIT_S, Activity
from megatron_demix.launch.run_lock import holder
from megatron_demix.launch.slurm import refuse_beside_jobs
from megatron_demix.launch.stage import is_being_made
from megatron_demix.pipeline.dag import Dag
from megatron_demix.process import PYTHON_M
from megatron_demix.units import format_duration


class Background:
    """The backend of this machine. arguments: those that `demix run` needs to find the study."""

    def __init__(self, dag: Dag, arguments: Sequence[str]) -> None:
        self._dag, self._arguments = dag, list(arguments)

    def submit(self) -> dict[str, Any]:
        refuse_beside_jobs(self._dag.run, self._dag.study.name)  # the process would, but nobody looks at it
        pid, log = submit(self._dag.run, self._arguments), log_of(self._dag.run)
        return {"said": f"process {pid} works on it; log: {log}", "pid": pid, "log": str(log)}

    def scripts(self) -> str:
        return " ".join(["demix", "run", *self._arguments]) + "\n"

    def cancel(self) -> dict[str, Any]:
        pid = cancel(self._dag.run)
        said = "nothing is running" if pid is None else f"process {pid} has saved and stopped; `demix resume` goes on"
        return {"said": said, "pid": pid}

    def activity(self) -> Mapping[str, Activity]:
        return {s.name: Activity("running") for s in self._dag.all if is_being_made(s)}


def log_of(run: Path) -> Path:
    return run / "logs" / "run.log"


def submit(run: Path, arguments: Sequence[str]) -> int:
    """Start `demix run ARGUMENTS` detached, so that it outlives this terminal, and return its process id.

    Raises Incomplete if a process already works on the run, StageFailed if the new one ends at once.
    """
    if (other := holder(run)) is not None:
        raise Incomplete(
            f"{run} is already being worked on by process {other}: see `demix status`, or `demix cancel` it first."
        )
    log = log_of(run)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [*PYTHON_M, "megatron_demix.cli", "run", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + 30
    while holder(run) != process.pid and time.monotonic() < deadline:
        if (code := process.poll()) is not None:
            if code == 0:
                break  # there was nothing left to do
            raise StageFailed(f"the run ended at once with exit code {code}; its log is {log}.")
        time.sleep(0.05)
    return process.pid


def cancel(run: Path) -> int | None:
    """Ask the process that works on the run to save and stop, and wait for it. Returns its id, or None if there is none.

    Raises Incomplete if it is still saving after CANCEL_WAIT_S, or is of another machine or user.
    """
    pid = holder(run)
    if pid is None:
        return None
    try:
        os.kill(pid, signal.SIGTERM)
    except PermissionError as e:
        raise Incomplete(f"process {pid} that works on {run} belongs to another user, who can cancel it.") from e
    deadline = time.monotonic() + CANCEL_WAIT_S
    while holder(run) == pid:
        if time.monotonic() >= deadline:
            raise Incomplete(
                f"process {pid} has not stopped after {format_duration(CANCEL_WAIT_S)}; it may still be saving. Try again."
            )
        time.sleep(0.1)
    return pid
