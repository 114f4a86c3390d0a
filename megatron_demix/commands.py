"""What each command of `demix` does with a study."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_demix import printing
from megatron_demix.errors import ConfigError, DemixError
from megatron_demix.terminal import shown

if TYPE_CHECKING:
    from megatron_demix.launch.backend import Backend
    from megatron_demix.launch.started import Started
    from megatron_demix.pipeline.dag import Dag
    from megatron_demix.pipeline.stage import Stage
    from megatron_demix.study.study import Study

Intent = Literal["makes", "looks", "cancels"]


@dataclass(frozen=True)
class Asked:
    """What every command of a study is given."""

    file: Path
    settings: tuple[str, ...]
    """Overrides, as KEY=VALUE."""
    runs: Path
    quiet: bool
    json: bool

    @classmethod
    def of(cls, options: argparse.Namespace) -> Asked:
        backend = [f"trainer.backend={options.backend}"] if options.backend else []
        return cls(options.study, (*options.set, *backend), options.runs, options.quiet, options.json)

    @property
    def place(self) -> list[str]:
        return [str(self.file), "--runs", str(self.runs)]

    @property
    def arguments(self) -> list[str]:
        """Those by which another command finds the same study."""
        return [*self.place, *(word for text in self.settings for word in ("--set", text))]

    def say(self, line: str) -> None:
        if not self.quiet:
            print(line, file=sys.stderr)


@dataclass(frozen=True)
class Opened:
    """A study as a command finds it."""

    asked: Asked
    study: Study
    """As its file and the command line say it."""
    dag: Dag
    started: Started
    """What a run would be that this command starts."""
    last: Started | None
    """What was started last."""

    @property
    def stages(self) -> list[Stage]:
        return self.dag.until(self.started.until)


def run(options: argparse.Namespace) -> None:
    """`demix run`."""
    study = _open(options, "looks" if options.dry_run else "makes")
    _go_on(study, options, here=True)


def resume(options: argparse.Namespace) -> None:
    """`demix resume`: as run, where the study says."""
    study = _open(options, "looks" if options.dry_run else "makes")
    _say_what_was_started(study, "resume")
    _go_on(study, options, here=study.study.launch.backend == "local")


def _go_on(study: Opened, options: argparse.Namespace, *, here: bool) -> None:
    _say_changes(study)
    if options.dry_run:
        _show_plan(study, scripts=True)
    elif here:
        _make(study, study.stages)
        _write_report(study)
    else:
        _submit(study)


def up_to(name: str) -> Callable[[argparse.Namespace], None]:
    """`demix train`, say: a study up to there."""

    def command(options: argparse.Namespace) -> None:
        study = _open(options, "looks" if options.dry_run else "makes", until=name)
        _say_changes(study)
        if options.dry_run:
            _show_plan(study, scripts=True)
            return
        _make(study, study.stages)
        if name == "search":
            printing.show_choice(study.dag, as_json=options.json)
        elif options.json or not options.quiet:
            printing.show_places(study.stages, name, as_json=options.json)

    return command


def evaluate(options: argparse.Namespace) -> None:
    """`demix evaluate`: the study's proxies, or checkpoints that are given."""
    if not options.checkpoint:
        if options.final:
            raise ConfigError("--final goes with --checkpoint: it says on which splits that is scored.")
        up_to("evaluate")(options)
        return
    from megatron_demix.pipeline.given_scores import given_scores, named_checkpoints
    from megatron_demix.pipeline.stage import with_needs

    study = _open(options, "looks" if options.dry_run else "makes", until="evaluate")
    scores = given_scores(study.dag, named_checkpoints(options.checkpoint), final=options.final)
    if options.dry_run:
        printing.show_plan(study.dag, with_needs([scores]), scripts=True, as_json=options.json)
    else:
        _make(study, with_needs([scores]), of_study=False)
        printing.show_scores(scores, as_json=options.json)


def submit(options: argparse.Namespace) -> None:
    study = _open(options, "looks" if options.dry_run else "makes", absent_ok=options.dry_run)
    _say_changes(study)
    if not options.dry_run:
        _submit(study)
        return
    scripts = _backend(study).scripts()
    print(json.dumps({"scripts": scripts}) if options.json else scripts, end="\n" if options.json else "")


def cancel(options: argparse.Namespace) -> None:
    study = _open(options, "cancels", absent_ok=True, where_started=True)
    facts = _backend(study).cancel()
    print(json.dumps(facts, indent=1) if options.json else facts["said"])


def plan(options: argparse.Namespace) -> None:
    study = _open(options, "looks")
    _say_what_was_started(study, "plan")
    _say_changes(study)
    _show_plan(study, scripts=False)


def status(options: argparse.Namespace) -> None:
    from megatron_demix.launch.status import show_status

    study = _open(options, "looks", where_started=True)
    _say_what_was_started(study, "status")
    _say_changes(study, unused=False)
    show_status(study.dag, _backend(study), as_json=options.json, watch=options.watch)


def report(options: argparse.Namespace) -> None:
    _write_report(_open(options, "looks"))


def _open(
    options: argparse.Namespace,
    intent: Intent,
    *,
    until: str | None = None,
    absent_ok: bool = False,
    where_started: bool = False,
) -> Opened:
    """absent_ok: nothing is asked of the inputs. where_started: the study is looked for where it was last started."""
    from megatron_demix.launch.started import Started
    from megatron_demix.study.load import load_study

    asked = Asked.of(options)
    study = load_study(asked.file, list(asked.settings))
    asked = replace(asked, runs=_runs(study.name, options, intent))
    folder = (asked.runs / study.name).resolve()
    last = Started.read(folder)
    if where_started and last and last.launch:
        study = study.model_copy(update={"launch": last.launch})
    started = Started.of(study, until or options.until)
    return Opened(asked, study, _dag(study, asked, folder, intent, absent_ok=absent_ok), started, last)


def _runs(name: str, options: argparse.Namespace, intent: Intent) -> Path:
    """The folder of all runs. Where --runs is not given and the run lies beside the study file, that one is looked at and
    cancelled; raises ConfigError for commands that would begin another one here."""
    if options.runs is not None:
        return Path(options.runs)
    here, beside = Path("runs"), options.study.parent / "runs"
    if not _is_begun(beside / name) or _is_begun(here / name):
        return here
    said = f"this study's run is {shown((beside / name).resolve())}, and there is none in ./runs"
    if intent == "makes":
        flag = f"--runs {shlex.quote(str(beside))}"
        raise ConfigError(f"{said}. Add {flag} to go on with it, or --runs {here} to begin another one here.")
    print(f"note: {said}", file=sys.stderr)
    return beside


def _is_begun(run: Path) -> bool:
    """Whether more is there than what commands leave that only look."""
    return run.is_dir() and any(path.name not in ("cache", "report") for path in run.iterdir())


def _dag(study: Study, asked: Asked, run: Path, intent: Intent, *, absent_ok: bool) -> Dag:
    """Commands that only look do without the inputs, as far as it is known what they were."""
    from megatron_demix.pipeline.dag import build_dag

    if absent_ok:
        return build_dag(study, asked.file, run, absent_inputs="allowed")
    try:
        return build_dag(study, asked.file, run)
    except (DemixError, OSError) as e:
        if intent != "looks":
            raise
        try:
            dag = build_dag(study, asked.file, run, absent_inputs="remembered")
        except (DemixError, OSError):
            raise e from None
        print(f"note: inputs are taken to be what they were when they were last read: {e}", file=sys.stderr)
        return dag


def _show_plan(study: Opened, *, scripts: bool) -> None:
    foreseen = study.dag.foreseen(study.started.until)
    printing.show_plan(study.dag, study.stages, scripts=scripts, as_json=study.asked.json, foreseen=foreseen)


def _say_changes(study: Opened, *, unused: bool = True) -> None:
    """Settings without effect, and what is made anew."""
    from megatron_demix.pipeline.changes import changes
    from megatron_demix.study.unused import warnings_of

    if study.asked.quiet:
        return
    for line in warnings_of(study.study) if unused else ():
        study.asked.say(f"warning: {line}")
    for line in changes(study.stages):
        study.asked.say(f"note: {line}")


def _say_what_was_started(study: Opened, command: str) -> None:
    """On standard error, where it was with other settings than these: then its stages are others."""
    from megatron_demix.launch.started import Started
    from megatron_demix.study.load import load_study

    if study.last is None:
        return
    now = replace(study.started, until=study.last.until) if command == "status" else study.started
    if more := study.last.otherwise(now):
        same = study.asked.arguments
        with suppress(DemixError):  # a file that is whole only with --set
            # From the file as it is, so that no setting is given twice, whole and in part.
            more = study.last.otherwise(Started.of(load_study(study.asked.file), now.until))
            same = study.asked.place
        note = "note: this study was last started with other settings than it has here. For what was started:"
        print(f"{note}\n  {shlex.join(['demix', command, *same])} {more}".rstrip(), file=sys.stderr)


def _make(study: Opened, stages: list[Stage], *, of_study: bool = True) -> None:
    """Make what is missing, in this process. of_study: it is what others are to find started."""
    from megatron_demix.launch.display import Display
    from megatron_demix.launch.local import run_stages
    from megatron_demix.launch.slurm import refuse_beside_jobs
    from megatron_demix.pipeline import preflight
    from megatron_demix.pipeline.task_inputs import check_tasks

    dag, asked = study.dag, study.asked

    def begin() -> None:
        refuse_beside_jobs(dag.run, dag.study.name)
        if of_study:
            study.started.write(dag.run)

    launch = dag.study.launch
    if launch.backend != "local":
        raise ConfigError(
            f"launch.backend is {launch.backend}: `demix submit` starts this study there, with --until a part of it. To run it "
            "in this process, add --set launch.backend=local."
        )
    if all(stage.done() for stage in stages):
        asked.say(f"everything is already done ({len(stages)} stages)")
    else:
        check_tasks(dag.tasks)
        for line in printing.used_of_earlier(dag, stages):
            asked.say(line)
        run_stages(
            stages,
            dag.run,
            jobs=launch.jobs,
            threads_per_rank=launch.threads_per_rank,
            display=Display(quiet=asked.quiet),
            foreseen=dag.foreseen(study.started.until) if of_study else (),
            locked=begin,
        )
    if study.started.until == "prepare":
        try:
            preflight.check(dag.all)
        except DemixError as e:  # of what was not asked for
            print(f"warning: {e}", file=sys.stderr)


def _backend(study: Opened) -> Backend:
    if study.dag.study.launch.backend == "slurm":
        from megatron_demix.launch.slurm import Slurm

        return Slurm(study.dag, study.asked.file.resolve().parent, study.started)
    from megatron_demix.launch.background import Background

    until = ["--until", study.started.until] if study.started.until else []
    return Background(study.dag, [*study.asked.arguments, *until])


def _submit(study: Opened) -> None:
    from megatron_demix.pipeline import preflight
    from megatron_demix.pipeline.task_inputs import check_tasks

    check_tasks(study.dag.tasks)
    preflight.check(study.dag.foreseen(study.started.until))
    facts = _backend(study).submit()
    print(json.dumps(facts, indent=1) if study.asked.json else facts["said"])


def _write_report(study: Opened) -> None:
    from megatron_demix.pipeline.reporting import finished_reports, write_report

    dag = study.dag
    printing.warn_of_damage(dag.all)
    written = write_report(dag)
    if not dag.final_scores.is_intact() and (others := finished_reports(dag.run)):
        print(f"note: finished reports, of other data or settings: {', '.join(map(shown, others))}", file=sys.stderr)
    if study.asked.json:
        print(json.dumps({"report": str(written.page)}))
    elif not study.asked.quiet:
        print(f"{written.sentence}\nreport: {shown(written.page)}")


def consistency(options: argparse.Namespace) -> None:
    from megatron_demix.pipeline.consistency import compare, show

    found = compare(options)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        show(found)


def doctor(options: argparse.Namespace) -> int:
    """0 if nothing has to be done, ConfigError's code else."""
    from megatron_demix.launch.doctor import examine

    findings = examine()
    printing.show_findings(findings, as_json=options.json)
    return ConfigError.exit_code if any(f.is_problem for f in findings) else 0
