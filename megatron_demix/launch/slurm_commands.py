"""SLURM's own programs: called, asked again while the controller is away, and what they list made into values."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from megatron_demix.errors import ConfigError, Incomplete

CONTROLLER_WAIT_S = 600
"""How long the last job waits for a controller that does not answer."""
_COMMAND_LIMIT_S = 120


class NoAnswer(Incomplete):
    """SLURM's controller cannot be reached, or has no time."""


class NoSlurm(ConfigError):
    """SLURM's commands are not on this machine."""


_Answer = TypeVar("_Answer")


class Job(NamedTuple):
    """A job that has not ended, or an element of an array. uid: as text."""

    id: str
    group: str
    element: int | None
    state: str
    reason: str
    uid: str
    user: str


def jobs_of(run: Path, study_name: str) -> list[Job]:
    """Every job of a run that has not ended, whoever submitted it, but this one."""
    listed = call("squeue", "--noheader", "--array", "--format=%F\t%K\t%j\t%T\t%r\t%U\t%u\t%Z")
    jobs: list[Job] = []
    for line in listed.splitlines():
        if not line or line.startswith("CLUSTER: "):  # how squeue begins what it lists of each of several clusters
            continue
        job, index, name, state, reason, uid, user, folder = line.split("\t", 7)
        prefix, _, of_group = name.partition(f"{study_name}.")
        if folder != str(run) or prefix or not of_group or job == os.environ.get("SLURM_JOB_ID"):
            continue
        jobs.append(Job(job, of_group, int(index) if index.isdigit() else None, state, reason, uid, user))
    return jobs


def check_owner(jobs: Sequence[Job]) -> None:
    """Raises Incomplete where a job of the run is another person's, who alone can cancel or release it."""
    if others := [job for job in jobs if job.uid != str(os.getuid())]:
        raise Incomplete(f"this run's job {others[0].id} belongs to {others[0].user}, who can cancel it.")


def is_held(reason: str) -> bool:
    """What SLURM itself holds, such as "launch failed requeued held": it waits for someone to release it."""
    return reason == "JobHoldMaxRequeue" or ("requeue" in reason and "held" in reason)


def job_ids(jobs: Iterable[str]) -> str:
    ids = sorted(set(jobs), key=lambda job: (len(job), job))
    return ", ".join(ids) if len(ids) < 5 else f"{ids[0]} to {ids[-1]} ({len(ids)} jobs)"


def sbatch(script: Path, *options: str) -> str:
    """Submit it; the job's id."""
    answer = call("sbatch", "--parsable", *_defaults(script.read_text()), *options, str(script))
    return answer.split(";")[0].strip()


_ENDED = ("Invalid job id specified", "Job/step already completing or completed")


def scancel(*arguments: str) -> None:
    """Raises what call() does, but not for jobs that have ended since they were listed."""
    call("scancel", *arguments, unless=_ENDED)


_DEFAULTS = {
    "SBATCH_ACCOUNT": ("--account", "-A"),
    "SBATCH_PARTITION": ("--partition", "-p"),
    "SBATCH_QOS": ("--qos", "-q"),
    "SBATCH_TIMELIMIT": ("--time", "-t"),
    "SBATCH_RESERVATION": ("--reservation", None),
    "SBATCH_CONSTRAINT": ("--constraint", "-C"),
}
"""Of sbatch's variables those that a person may have set for all jobs, and the options that they stand for."""
_OF_THE_CLUSTER = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")


def _defaults(script: str) -> list[str]:
    """A person's defaults as options of sbatch, but for what the script says itself. (As variables they would override it.)"""
    said = " ".join(re.findall(r"^#SBATCH (.*)", script, re.MULTILINE))
    options = []
    for variable, (long, short) in _DEFAULTS.items():
        says = rf"(^|\s)({long}(?![\w-]){f'|{short}' if short else ''})"
        if (value := os.environ.get(variable)) and not re.search(says, said):
            options.append(f"{long}={value}")
    return options


def _environment() -> dict[str, str]:
    """Without what SLURM says of the job that this process is in, which would become the new job's, and without the variables
    that change what is listed or override what a script says."""
    ours = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SQUEUE_", "SCANCEL_", "SCONTROL_")
    return {name: value for name, value in os.environ.items() if name in _OF_THE_CLUSTER or not name.startswith(ours)}


def patiently(ask: Callable[[], _Answer]) -> _Answer:
    """For a job, where nobody is there to try again when the controller does not answer."""
    deadline = time.monotonic() + CONTROLLER_WAIT_S
    while True:
        try:
            return ask()
        except NoAnswer as e:
            if time.monotonic() >= deadline:
                raise
            print(f"demix: {e} Trying again.", file=sys.stderr, flush=True)
            time.sleep(10)


def call(*command: str, unless: Sequence[str] = ()) -> str:
    """Output of one of SLURM's commands. Raises NoSlurm where it is not installed, ConfigError where it refuses, NoAnswer where
    the controller does not answer. unless: what may stand in a line of its errors that is of no matter."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_LIMIT_S, env=_environment())
    except FileNotFoundError as e:
        raise NoSlurm(f"there is no {command[0]} on this machine.") from e
    except subprocess.TimeoutExpired as e:
        more = (
            " A job that it submitted all the same is cancelled by the next `demix submit`." if command[0] == "sbatch" else ""
        )
        raise NoAnswer(f"{command[0]} has not answered within {_COMMAND_LIMIT_S} s; try again.{more}") from e
    if result.returncode != 0:
        errors = result.stderr.splitlines()
        matter = [line for line in errors if not any(text in line for text in unless)]
        if errors and not matter:
            return result.stdout
        said = " ".join(" ".join(matter).split())
        # The last is what scontrol says of a job, of a controller that is away.
        away = ("Unable to contact", "Connection refused", "Socket timed out", "try again", "Unexpected message received")
        raise (NoAnswer if any(s in said for s in away) else ConfigError)(f"{command[0]}: {said or 'failed'}")
    return result.stdout
