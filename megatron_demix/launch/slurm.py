"""A study as SLURM jobs, all submitted at once with dependencies between them.

Nothing but SLURM's queue knows what is under way, and nothing but the artifacts what is done, so there is no state here that
could be wrong: submitting makes the queue hold what is missing. A job that ends unfinished puts itself back into the queue. One
that could not (its batch script was killed) takes those that depend on it along, and the last job, which waits for all of them
whatever becomes of them, submits again what is missing.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_demix.artifact import fingerprint, read_json, write_atomic, write_json
from megatron_demix.errors import ConfigError, DemixError, Incomplete, StageFailed
from megatron_demix.launch import slurm_commands
from megatron_demix.launch.attempts import Attempts, forget
from megatron_demix.launch.backend import CANCEL_WAIT_S, Activity
from megatron_demix.launch.run_lock import only_one
from megatron_demix.launch.slurm_commands import (
    Job,
    NoSlurm,
    check_owner,
    is_held,
    job_ids,
    jobs_of,
    patiently,
    sbatch,
)
from megatron_demix.launch.slurm_scripts import CONCLUDE, FOLDER, Group, Scripts, check_kinds, group
from megatron_demix.launch.started import Started
from megatron_demix.pipeline.dag import MILESTONES, Dag
from megatron_demix.pipeline.stage import Stage
from megatron_demix.units import format_duration


class Slurm:
    """The backend for one run. root: the folder that the study's relative inputs start from. started: what submit() starts."""

    def __init__(self, dag: Dag, root: Path, started: Started) -> None:
        self._dag, self._started = dag, started
        self._stages = dag.until(started.until)
        self._scripts = Scripts(dag.study.launch.slurm, dag.study.name, dag.run, root, started.until)
        check_kinds(dag.study.launch.slurm, dag.all)

    def submit(self) -> dict[str, Any]:
        self._dag.run.mkdir(parents=True, exist_ok=True)
        with only_one(self._dag.run):
            try:
                live = self._jobs()
            except NoSlurm as e:
                raise NoSlurm(
                    f"launch.backend is slurm, but {e} Submit from a login node, or use --set launch.backend=local."
                ) from e
            check_owner(live)
            if live and not self._scripts.cancelled.exists() and all(job.group != CONCLUDE for job in live):
                # The last job is submitted last, and waits for the others: what submitted these was broken off.
                slurm_commands.scancel(*{job.id for job in live})
                live = []
            if held := sorted({job.id for job in live if is_held(job.reason)}):
                slurm_commands.call("scontrol", "release", *held)
                said = (
                    f"released {job_ids(held)}, which SLURM had put back into the queue and held, as a node could not start it"
                )
                return {"said": said, "jobs": held}
            if live:
                raise _is_worked_on(self._dag.run, live)
            for g in self._groups():
                for stage in g.stages:
                    forget(stage)
            self._scripts.cancelled.unlink(missing_ok=True)
            self._started.write(self._dag.run)
            missing = [s for s in self._stages if not s.done()]
            jobs = self._submit(missing)
        what = f"{len(missing)} of {len(self._stages)} stages are to do" if missing else "everything is already done"
        said = (
            f"{what}: submitted as jobs {job_ids(jobs.values())}; the last one writes the report\n"
            f"scripts: {self._scripts.folder}\nlogs: {self._scripts.logs}\n"
            "`demix status` looks at them, `demix cancel` stops them"
        )
        return {"said": said, "jobs": jobs}

    def scripts(self) -> str:
        groups = self._groups()
        files = [(self._scripts.path(g.name), self._scripts.of_group(g)) for g in groups]
        files.append((self._scripts.path(CONCLUDE), self._scripts.of_conclusion()))
        return "\n".join(f"# ---- {path}\n{text}" for path, text in files)

    def cancel(self) -> dict[str, Any]:
        jobs = self._jobs()
        if not jobs:
            return {"said": "nothing is running", "jobs": []}
        check_owner(jobs)
        write_atomic(self._scripts.cancelled, "")
        ids = sorted({job.id for job in jobs})
        # The batch scripts pass USR1 on to the ranks, which save; TERM would leave them no more than SLURM's KillWait.
        slurm_commands.scancel("--state=PENDING", *ids)
        slurm_commands.scancel("--state=RUNNING", "--signal=USR1", "--batch", *ids)
        deadline = time.monotonic() + CANCEL_WAIT_S
        while left := self._jobs():
            if time.monotonic() >= deadline:
                raise Incomplete(
                    f"jobs {job_ids(j.id for j in left)} have not ended after {format_duration(CANCEL_WAIT_S)}; they may still "
                    "be saving. Try again, or scancel them."
                )
            # A job that was starting had no one who listened to the signal, and one that was requeued is pending now.
            slurm_commands.scancel("--state=PENDING", *ids)
            time.sleep(1)
        return {"said": f"jobs {job_ids(ids)} have saved and stopped; `demix resume` goes on", "jobs": ids}

    def activity(self) -> Mapping[str, Activity]:
        try:
            members = read_json(self._scripts.folder / "groups.json")
        except DemixError:
            return {}
        found: dict[str, Activity] = {}
        jobs = self._jobs()
        if not jobs and (said := self._why_nothing_was_concluded()):
            found[CONCLUDE] = Activity("failed", reason=said)
        for job, of_group, index, state, reason, *_ in jobs:
            if of_group == CONCLUDE:
                found[CONCLUDE] = Activity("running" if state in ("RUNNING", "COMPLETING") else "queued", job)
            if stages := members.get(of_group):
                name = stages[index or 0]
                job = job if index is None else f"{job}_{index}"
                if state in ("RUNNING", "COMPLETING"):
                    found[name] = Activity("running", job)
                # Of a stage in parts, each has a job; one that runs counts more than one that waits.
                elif name not in found or found[name].state != "running":
                    found[name] = Activity("queued", job, "" if reason == "None" else reason)
        return found

    def conclude(self) -> None:
        """Of the last job: nothing else is under way, unless SLURM starts this job a second time. Raises StageFailed where
        submitting again would change nothing."""
        missing = [s for s in self._stages if not s.done()]
        if not missing:
            from megatron_demix.pipeline.reporting import write_report

            page, sentence = write_report(self._dag)
            write_atomic(self._scripts.concluded, "")
            print(f"{sentence}\nreport: {page}", flush=True)
            return
        if self._scripts.cancelled.exists():
            raise Incomplete("cancelled; `demix resume` goes on.")
        with only_one(self._dag.run, wait_s=slurm_commands.CONTROLLER_WAIT_S):
            live = [job for job in patiently(self._jobs) if job.state != "COMPLETING"]
            if any(job.group == CONCLUDE for job in live):
                print(
                    f"{job_ids(job.id for job in live)} work on it: nothing is left for this job to do",
                    flush=True,
                )
                return
            if live:  # the start of this job before this one submitted them, and was broken off
                patiently(lambda: slurm_commands.scancel(*{job.id for job in live}))
            elif self._progress() == read_json(self._scripts.folder / "progress.json"):
                self._note_what_never_began()
            failed = {s.name: reason for s in missing if (reason := Attempts.read(s).failed)}
            possible = _without(missing, failed)
            if failed and not possible:
                write_atomic(self._scripts.concluded, "")
                raise StageFailed("\n".join([f"{len(missing)} stages are not done:", *failed.values()]))
            jobs = self._submit_patiently(possible)
        print(f"{len(missing)} stages are not done: submitted again as {job_ids(jobs.values())}", flush=True)

    def _submit_patiently(self, stages: Sequence[Stage]) -> dict[str, str]:
        ceased = False

        def submit() -> dict[str, str]:
            nonlocal ceased
            if ceased and (begun := {job.id for job in self._jobs()}):
                slurm_commands.scancel(*begun)
            ceased = True
            return self._submit(stages)

        return patiently(submit)

    def _note_what_never_began(self) -> None:
        """Of jobs that ended before their stage could keep an account itself: there was no Python, or no container."""
        for g in self._groups():
            for index, stage in enumerate(g.stages):
                if stage.done() or Attempts.read(stage).failed or not all(n.done() for n in stage.needs):
                    continue
                log = self._scripts.newest_log(g, index)
                reason = (
                    f"stage {stage.name}: its job ended before the stage began, so it was not submitted again. When the cause "
                    f"is gone, `demix resume` goes on. Log: {log or self._scripts.logs}, which ends{_ending(log)}"
                )
                for of in {stage, stage.whole}:
                    Attempts(failed=reason).write(of)

    def _why_nothing_was_concluded(self) -> str:
        """Of jobs that have all ended, the last one without a word, as where there was no Python for it either; else empty."""
        scripts, log = self._scripts, self._scripts.log_of_conclusion()
        submitted = scripts.folder / "progress.json"
        if scripts.cancelled.exists() or scripts.concluded.exists() or log is None or not submitted.exists():
            return ""
        if log.stat().st_mtime < submitted.stat().st_mtime:  # of a job that was submitted before
            return ""
        return (
            "the last job, which submits again what is missing, ended before it could. When the cause is gone, `demix resume` "
            f"goes on. Log: {log}, which ends{_ending(log)}"
        )

    def _groups(self) -> list[Group]:
        return group(self._stages, self._scripts.spec.parts)

    def _submit(self, stages: Sequence[Stage]) -> dict[str, str]:
        """Job ids by group. Of an array only the elements that are missing are submitted."""
        groups = self._groups()
        self._check_sizes(groups)
        scripts = self._scripts
        scripts.logs.mkdir(parents=True, exist_ok=True)
        scripts.folder.mkdir(exist_ok=True)
        write_json(scripts.study, self._dag.study.model_dump(mode="json"))
        write_json(scripts.folder / "groups.json", {g.name: [s.whole.name for s in g.stages] for g in groups})
        for g in groups:
            write_atomic(scripts.path(g.name), scripts.of_group(g))
        write_atomic(scripts.path(CONCLUDE), scripts.of_conclusion())
        write_json(scripts.folder / "progress.json", self._progress())
        scripts.concluded.unlink(missing_ok=True)
        jobs: dict[str, str] = {}
        wanted = {s.name for s in stages}
        try:
            for g in groups:
                if missing := [i for i, s in enumerate(g.stages) if s.whole.name in wanted]:
                    jobs[g.name] = self._sbatch(g, missing, [jobs[n] for n in g.needs if n in jobs])
            everything = ":".join(jobs.values())
            after = [f"--dependency=afterany:{everything}"] if jobs else []
            jobs[CONCLUDE] = sbatch(scripts.path(CONCLUDE), *after)
        except BaseException:
            if jobs:
                with suppress(DemixError):  # what went wrong is still to be heard of
                    slurm_commands.scancel(*jobs.values())
            raise
        return jobs

    def _check_sizes(self, groups: Sequence[Group]) -> None:
        """Raises ConfigError for an array that is larger than the cluster takes, before anything is submitted."""
        largest = max(groups, key=lambda g: len(g.stages))
        if len(largest.stages) < 2:
            return
        found = re.search(r"^MaxArraySize\s*=\s*(\d+)", slurm_commands.call("scontrol", "show", "config"), re.MULTILINE)
        if found is None or len(largest.stages) <= (limit := int(found[1])):
            return
        kind, num_whole = largest.stages[0].kind, len({s.whole.name for s in largest.stages})
        advice = "Fewer stages of this kind side by side (search.rounds, domains), or a larger MaxArraySize, are needed."
        if num_whole < len(largest.stages) and num_whole <= limit:
            advice = f"Set launch.slurm.parts.{kind} to at most {limit // num_whole}."
        raise ConfigError(
            f"launch.slurm: {largest.name} is an array of {len(largest.stages)} jobs, but MaxArraySize of this cluster is "
            f"{limit}. {advice}"
        )

    def _sbatch(self, g: Group, missing: Sequence[int], after: Sequence[str]) -> str:
        options = []
        if after:
            options += [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"]
        if len(missing) < len(g.stages):
            limit = self._scripts.spec.array_limit
            options.append(f"--array={','.join(map(str, missing))}" + (f"%{limit}" if limit else ""))
        return sbatch(self._scripts.path(g.name), *options)

    def _jobs(self) -> list[Job]:
        return jobs_of(self._dag.run, self._dag.study.name)

    def _progress(self) -> str:
        """Changes whenever a stage is done, or has been tried."""
        return fingerprint([[s.name, s.done(), vars(Attempts.read(s))] for g in self._groups() for s in g.stages])


def refuse_beside_jobs(run: Path, study_name: str) -> None:
    """For work on a run by other means, by the one who holds its lock: raises Incomplete while SLURM jobs of it are queued or
    running. Where SLURM cannot be asked on this machine at all there is a warning instead."""
    if not (run / FOLDER).is_dir():
        return
    try:
        live = jobs_of(run, study_name)
    except ConfigError as e:
        print(
            f"warning: {run} was submitted to SLURM, which cannot be asked here whether jobs of it are left ({e}). If there "
            "are, stop this and cancel them first.",
            file=sys.stderr,
        )
        return
    if live:
        raise _is_worked_on(run, live)


def _is_worked_on(run: Path, live: Sequence[Job]) -> Incomplete:
    return Incomplete(
        f"{run} is already being worked on by the SLURM jobs {job_ids(job.id for job in live)}: see `demix status`, or "
        "`demix cancel` them first."
    )


def _ending(log: Path | None) -> str:
    """The last lines of a log, each on a line of its own."""
    said = log.read_text(errors="replace").strip().splitlines()[-5:] if log else []
    return "".join(f"\n    {line}" for line in said) or " nothing"


def _without(stages: Sequence[Stage], failed: Mapping[str, str]) -> list[Stage]:
    """The stages (needs first) that neither failed nor need one that did."""
    hopeless = set(failed)
    for stage in stages:
        if any(n.name in hopeless for n in stage.needs):
            hopeless.add(stage.name)
    return [s for s in stages if s.name not in hopeless]


def main() -> int:
    parser = argparse.ArgumentParser(description="The last job of a study: its report, or what is missing once more.")
    parser.add_argument("study", type=Path)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--until", choices=MILESTONES)
    options = parser.parse_args()
    from megatron_demix.pipeline.dag import build_dag
    from megatron_demix.study.load import load_study

    try:
        study = load_study(options.study)
        dag = build_dag(study, options.root, options.run)
        Slurm(dag, options.root, Started.of(study, options.until)).conclude()
    except DemixError as e:
        print(f"demix: {e}", file=sys.stderr, flush=True)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
