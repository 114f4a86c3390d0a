"""The section about where stages run."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from megatron_demix.study.section import Seconds, Section

_DECIDED = (
    "--job-name", "-J", "--chdir", "-D", "--array", "-a", "--output", "-o", "--error", "-e", "--open-mode", "--dependency",
    "-d", "--nodes", "-N", "--ntasks", "-n", "--ntasks-per-node", "--signal", "--requeue", "--no-requeue", "--parsable",
    "--wait", "-W", "--clusters", "-M", "--wrap", "--test-only",
)  # fmt: skip
"""sbatch's options by which jobs are found again, ordered, and told to save, and their logs read."""
_KEYS = {
    "partition": ("--partition", "-p"),
    "account": ("--account", "-A"),
    "qos": ("--qos", "-q"),
    "time": ("--time", "-t"),
    "cpus_per_task": ("--cpus-per-task", "-c"),
    "mem": ("--mem",),
}
_KEY_OF = {option: key for key, options in _KEYS.items() for option in options}
"""Those that have a key of their own. Given freely, time and CPUs would not be seen where the time to save is counted, and the
ranks are started."""


class SlurmResources(Section):
    """What a job asks SLURM for, by the names of sbatch's options. Absent: the site's default."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: Seconds | None = None
    """Limit of one job. A stage that needs longer is told to save before it, and goes on in the same job, requeued."""
    cpus_per_task: int | None = Field(None, ge=1)
    """One task a node starts all ranks of that node."""
    mem: str | None = None
    gpus_per_node: int | None = Field(None, ge=1)
    sbatch: list[str] = []
    """Any other options, as in "--exclusive"."""

    @field_validator("sbatch")
    @classmethod
    def _not_what_is_decided(cls, options: list[str]) -> list[str]:
        for option in options:
            name, between, value = re.fullmatch(r"([^=\s]*)(.?)(.*)", option, re.DOTALL).groups()  # type: ignore[union-attr]
            name = name if name.startswith("--") else name[:2]  # a short option may have its value glued to it
            if name in _DECIDED:
                raise ValueError(f"{name} is decided by demix")
            if name in _KEY_OF:
                raise ValueError(f"{name} has a key of its own: {_KEY_OF[name]}")
            more = between != "=" and re.search(r"(^|\s)-", value)
            if more or not option.startswith("-") or not option.isprintable():
                raise ValueError(
                    f"{option!r}: expected one option, as in '--exclusive' or '--mail-type=FAIL'; give each its own entry"
                )
        return options


class SlurmSpec(SlurmResources):
    ranks_per_node: int | None = Field(None, ge=1)
    """Default: gpus_per_node, else all ranks of a stage on one node. Nodes are counted from this."""
    light: SlurmResources | None = None
    """Overrides for stages without ranks (tokenizing, fitting, blending), which need no GPU."""
    kinds: dict[str, SlurmResources] = {}
    """Overrides for all stages of a kind, which is the first part of their name: {final: {time: 2-00:00:00}}."""
    parts: dict[str, Annotated[int, Field(ge=1, le=10_000)]] = {}
    """Array elements that make each stage of a kind together: {data: 16, rounds: 8, blend: 8}. rounds: what is scored in them.
    blend: if it is materialised."""
    grace: Seconds = 300
    """How long before the time limit a job is told to save."""
    array_limit: int | None = Field(None, ge=1)
    """Most jobs of one array that run side by side."""
    setup: str = ""
    """Shell lines before the stage starts: module load, source a virtual environment, export NCCL settings."""
    container: str | None = None
    """Image that pyxis runs the stages in. `mounts` has to show the run, the corpus and this package."""
    mounts: list[str] = []
    python: str | None = None
    """Interpreter of the stages. Default: the one `demix submit` runs on, with a container python3."""

    @model_validator(mode="after")
    def _time_to_save(self) -> SlurmSpec:
        overrides = {"light": self.light, **{f"kinds.{kind}": given for kind, given in self.kinds.items()}}
        for where, given in {"": self, **overrides}.items():
            if given is not None and given.time is not None and given.time <= self.grace:
                key = f"{where}.time" if where else "time"
                raise ValueError(
                    f"{key} is {given.time} s, and jobs are told to save {self.grace} s (grace) before their limit"
                )
        return self


class LaunchSpec(Section):
    backend: Literal["local", "slurm"] = "local"
    """Where `demix submit` starts the study: in the background of this machine, or as SLURM jobs."""
    jobs: int = Field(1, ge=1)
    """local: stages that may run side by side."""
    threads_per_rank: int = Field(1, ge=1)
    slurm: SlurmSpec = SlurmSpec()
