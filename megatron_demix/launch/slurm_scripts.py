"""A study as sbatch files: stages that are alike and may run side by side are one job array, any other is a job of its own."""

from __future__ import annotations

import glob
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_demix.errors import ConfigError
from megatron_demix.pipeline.stage import Stage
from megatron_demix.study.launch import SlurmResources, SlurmSpec

CONCLUDE = "conclude"
"""The job that runs when all others have ended: it writes the report, or submits again what is missing."""

FOLDER = "slurm"
"""Of a run that was submitted."""


@dataclass(frozen=True)
class Group:
    """The stages of one job or job array, in the array's order, and the groups that have to end before it."""

    name: str
    stages: tuple[Stage, ...]
    needs: tuple[str, ...]


def group(stages: Sequence[Stage], parts: Mapping[str, int] = {}) -> list[Group]:
    """stages: needs first, each with all it needs. Stages of one kind, as many ranks and the same depth form a group.

    parts: by kind, in how many parts its stages are made. All parts of a group are a group of their own, which it needs.
    """
    depth: dict[str, int] = {}
    for stage in stages:
        depth[stage.name] = 1 + max((depth[n.name] for n in stage.needs), default=0)
    alike: dict[tuple[int, str, int], list[Stage]] = {}
    for stage in stages:
        alike.setdefault((depth[stage.name], stage.kind, stage.ranks), []).append(stage)
    names: dict[tuple, str] = {}
    for where, members in sorted(alike.items(), key=lambda item: item[0]):
        name = members[0].kind if len(members) > 1 else members[0].name.replace("/", ".")
        names[where] = f"{name}.{where[0]}" if name in names.values() else name
    of_stage = {stage.name: names[where] for where, members in alike.items() for stage in members}
    groups = []
    for where, name in names.items():
        members = alike[where]
        needs = tuple(dict.fromkeys(of_stage[n.name] for s in members for n in s.needs))
        number = parts.get(members[0].kind, 1)
        if number > 1 and (made := tuple(s.part((i, number)) for s in members if s.make_part for i in range(number))):
            groups.append(Group(f"{name}.parts", made, needs))
            needs = (*needs, f"{name}.parts")
        groups.append(Group(name, tuple(members), needs))
    return groups


@dataclass(frozen=True)
class Scripts:
    """Renders the sbatch files of one run. root: the folder that the study's relative inputs start from. until: which of
    megatron_demix.pipeline.dag.MILESTONES it ends with, None: the last."""

    spec: SlurmSpec
    study_name: str
    run: Path
    root: Path
    until: str | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError where a path would end a line of a script, and what follows it run as a command."""
        for what, path in (("run's folder", self.run), ("study's folder", self.root)):
            if not str(path).isprintable():
                raise ConfigError(f"the {what} is {str(path)!r}: SLURM's scripts cannot hold its name. Choose another.")

    @property
    def folder(self) -> Path:
        return self.run / FOLDER

    @property
    def study(self) -> Path:
        """The study as it was submitted; the file it came from may change."""
        return self.folder / "study.json"

    @property
    def cancelled(self) -> Path:
        """While this file is there, no job goes back into the queue."""
        return self.folder / "cancelled"

    @property
    def logs(self) -> Path:
        return self.run / "logs" / "slurm"

    @property
    def concluded(self) -> Path:
        """Made by the last job once it has said what became of the study; the next submission removes it."""
        return self.folder / "concluded"

    def log_of_conclusion(self) -> Path | None:
        """Of the newest last job."""
        return self._newest(f"{CONCLUDE}-*.log")

    def newest_log(self, group: Group, index: int) -> Path | None:
        """Of the newest job of one stage of a group."""
        ending = f"-*_{index}.log" if len(group.stages) > 1 else "-*.log"
        return self._newest(glob.escape(group.name) + ending)

    def _newest(self, pattern: str) -> Path | None:
        return max(self.logs.glob(pattern), key=lambda p: p.stat().st_mtime, default=None)

    def path(self, group: str) -> Path:
        return self.folder / f"{group}.sbatch"

    def job_name(self, group: str) -> str:
        return f"{self.study_name}.{group}"

    def of_group(self, group: Group) -> str:
        """Raises ConfigError where the ranks cannot be spread evenly over nodes."""
        import jinja2

        stage = group.stages[0]
        resources = self._resources(stage)
        nodes = self._nodes(stage, resources)
        inside = "python3" if self.spec.container else sys.executable
        python, study, run, root = (shlex.quote(str(p)) for p in (self.spec.python or inside, self.study, self.run, self.root))
        loader = jinja2.PackageLoader("megatron_demix.launch", "")
        environment = jinja2.Environment(
            loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
        )
        ranks = f", {stage.ranks} ranks each" if len(group.stages) > 1 else f", {stage.ranks} ranks"
        return environment.get_template("stage.sbatch.j2").render(
            title=f"Study {self.study_name}: {group.name}{ranks if stage.ranks else ''}.",
            options=[
                *self._common(group.name, resources, array=len(group.stages)),
                f"--signal=B:USR1@{self.spec.grace}",
                f"--nodes={nodes}",
                "--ntasks-per-node=1",
                *([f"--cpus-per-task={resources.cpus_per_task}"] if resources.cpus_per_task else []),
                *(
                    [f"--gpus-per-node={min(resources.gpus_per_node, stage.ranks)}"]
                    if resources.gpus_per_node and stage.ranks
                    else []
                ),
                *map(_quoted, resources.sbatch),
            ],
            stages=[shlex.quote(s.name) for s in group.stages],
            setup=self.spec.setup.strip(),
            nodes=nodes,
            cpus_per_task=resources.cpus_per_task,
            container=shlex.quote(self.spec.container) if self.spec.container else None,
            mounts=shlex.quote(",".join(self.spec.mounts)),
            python=python,
            study=study,
            run=run,
            root=root,
            folder=shlex.quote(str(self.folder)),
            cancelled=shlex.quote(str(self.cancelled)),
        )

    def of_conclusion(self) -> str:
        """The last job runs outside the container: it calls sbatch."""
        resources = self.spec.model_copy(update=_given(self.spec.light)) if self.spec.light else self.spec
        options = [*self._common(CONCLUDE, resources, array=1), "--nodes=1", "--ntasks=1", *map(_quoted, resources.sbatch)]
        python = sys.executable if self.spec.container else self.spec.python or sys.executable
        command = [python, "-P", "-m", "megatron_demix.launch.slurm", self.study, "--run", self.run, "--root", self.root]
        command += ["--until", self.until] if self.until else []
        lines = [
            "#!/bin/bash",
            f"# Study {self.study_name}: the report, once everything is done; or what is missing, once more.",
            *(f"#SBATCH {option}" for option in options),
            "conclude() {",
            "    exec " + " ".join(shlex.quote(str(word)) for word in command),
            "}",
            "trap conclude EXIT  # whatever becomes of what stands below",
            *([self.spec.setup.strip()] if self.spec.setup else []),
        ]
        return "\n".join(lines) + "\n"

    def _common(self, name: str, resources: SlurmResources, *, array: int) -> list[str]:
        # In the path, but not in the file's name, a % is no pattern of SLURM's.
        log = f"{self.logs}/".replace("%", "%%") + f"{name}-{'%A_%a' if array > 1 else '%j'}.log"
        options = {
            "job-name": self.job_name(name),
            "chdir": self.run,
            "output": log,
            "open-mode": "append",
            "array": f"0-{array - 1}" + (f"%{self.spec.array_limit}" if self.spec.array_limit else "") if array > 1 else None,
            "partition": resources.partition,
            "account": resources.account,
            "qos": resources.qos,
            "time": _time(resources.time) if resources.time else None,
            "mem": resources.mem,
        }
        return ["--requeue", *(f"--{k}={shlex.quote(str(v))}" for k, v in options.items() if v is not None)]

    def _resources(self, stage: Stage) -> SlurmResources:
        light = _given(self.spec.light) if self.spec.light and not stage.ranks else {}
        kind = _given(self.spec.kinds[stage.kind]) if stage.kind in self.spec.kinds else {}
        return self.spec.model_copy(update=light | kind)

    def _nodes(self, stage: Stage, resources: SlurmResources) -> int:
        per_node = self.spec.ranks_per_node or resources.gpus_per_node or max(1, stage.ranks)
        if stage.ranks <= per_node:
            return 1
        if stage.ranks % per_node:
            raise ConfigError(
                f"launch.slurm: stage {stage.name} has {stage.ranks} ranks, which is not a multiple of {per_node} a node. "
                "Change ranks_per_node (or gpus_per_node), or the sizes under parallel."
            )
        return stage.ranks // per_node


def check_kinds(spec: SlurmSpec, stages: Sequence[Stage]) -> None:
    """Raises ConfigError for an override of a kind of stages that the study has not, or that is not made in parts."""
    kinds = list(dict.fromkeys(s.kind for s in stages))
    in_parts = list(dict.fromkeys(s.kind for s in stages if s.make_part))
    for key, given, possible in (("kinds", spec.kinds, kinds), ("parts", spec.parts, in_parts)):
        for kind in given:
            if kind not in possible:
                raise ConfigError(f"launch.slurm.{key}: {kind!r} is not one of {', '.join(possible) or 'this study (none)'}.")


def _quoted(option: str) -> str:
    """One of sbatch's options, as a line of a script takes it."""
    name, equals, value = option.partition("=")
    return f"{name}={shlex.quote(value)}" if equals and " " not in name else option


def _given(overrides: SlurmResources) -> dict:
    """Only what the study says; what it leaves out does not override."""
    return {name: getattr(overrides, name) for name in overrides.model_fields_set}


def _time(seconds: int) -> str:
    minutes, s = divmod(seconds, 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return f"{days}-{h:02d}:{m:02d}:{s:02d}" if days else f"{h:02d}:{m:02d}:{s:02d}"
