"""`demix`: the whole method, or one stage of it, from a study file."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_demix import __version__
from megatron_demix.command import exit_code
from megatron_demix.errors import ConfigError, DemixError
from megatron_demix.pipeline.consistency import add_arguments as add_consistency_arguments

if TYPE_CHECKING:
    from megatron_demix.launch.started import Started
    from megatron_demix.pipeline.dag import Dag
    from megatron_demix.pipeline.stage import Stage
    from megatron_demix.study.study import Study

# Each command that makes a part of the study, and its help.
_PARTS = {
    "prepare": "tokenize the domains into Megatron .bin/.idx, split into train, valid and test",
    "train": "train the base and one component per domain",
    "evaluate": "merge and score proxies, round by round, and fit the surrogates",
    "search": "the same as evaluate, ending with the chosen mixture as a table",
    "merge": "write the chosen mixture's proxy as a checkpoint",
    "blend": "build the final run's indexed data at the chosen and the baseline mixtures",
    "final": "train and score the final runs",
}
_EPILOG = """\
examples:
  python examples/quickstart/collect.py              once: the text of the quickstart's study
  demix plan examples/quickstart/study.yaml          what would run, and what is already done
  demix run examples/quickstart/study.yaml           all of it; run it again to go on after an interruption
  demix run study.yaml --set final.tokens=20M        the same study with one setting changed; what is still valid is re-used
  demix search study.yaml                            stop at the mixture; so does submit --until search
  demix consistency --proxies P.csv --references R.csv      do proxies rank mixtures as training does?

exit codes: 0 done; 2 usage or configuration; 3 incompatible inputs; 4 infeasible mixture; 5 verification failed;
6 output exists and differs; 7 corrupt or unsafe input; 8 a stage failed; 9 training
diverged; 16 and 17 Megatron-LM's own: start again, broken device; 74 disk full; 75 incomplete, run again."""


_EVALUATING = """\
What is scored is the study's section `evaluate`: losses per domain in bits per byte, and tasks from local files in the formats
of ARC, HellaSwag, PIQA, SIQA, WinoGrande, GSM8K, MATH, HumanEval and MBPP (docs/STUDY.md, Tasks):

  evaluate:
    tasks:
      - {name: arc_easy, format: arc, path: tasks/ARC-Easy, num_shots: 5}
      - {name: gsm8k, format: gsm8k, path: tasks/gsm8k, scores: [bits_per_byte]}      # generates nothing
  search: {objective: {code: 1, arc_easy/acc: 2}}

examples:
  demix evaluate study.yaml                                       every round's proxies, merged in place
  demix evaluate study.yaml --checkpoint ckpt/proxy               one checkpoint; a table on standard output
  demix evaluate study.yaml --checkpoint a=ckpt/a --checkpoint b=ckpt/b --final --json"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="demix", description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"megatron_demix {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    study = argparse.ArgumentParser(add_help=False)
    study.add_argument("study", type=Path, metavar="STUDY", help="the study's YAML file")
    study.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting, as in model.num_layers=4"
    )
    study.add_argument(
        "--backend",
        choices=("megatron_core", "megatron_lm"),
        help="who trains: short for --set trainer.backend=..., and like every setting part of what the result depends on",
    )
    study.add_argument("--runs", type=Path, metavar="DIR", help="folder of all runs (default: ./runs)")
    study.add_argument("--json", action="store_true", help="machine-readable result on standard output")
    running = argparse.ArgumentParser(add_help=False)
    running.add_argument("--dry-run", action="store_true", help="show what would run, and stop")
    running.add_argument("--quiet", action="store_true", help="no progress; errors only")

    def add(name: str, help: str, parents: list[argparse.ArgumentParser], epilog: str | None = None) -> None:
        commands.add_parser(
            name,
            help=help,
            description=f"{help[0].upper()}{help[1:]}.",
            epilog=epilog,
            parents=parents,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    until = argparse.ArgumentParser(add_help=False)
    until.add_argument("--until", choices=_PARTS, help="end with what this command makes: search ends with the mixture")
    add("run", "the whole study, from text to the report", [study, until, running])
    add("resume", "the same as run: what is done is skipped, what was interrupted goes on", [study, until, running])
    dry = argparse.ArgumentParser(add_help=False)
    dry.add_argument("--dry-run", action="store_true", help="print what would be submitted (every sbatch script), and stop")
    add("submit", "the same as run, in the background or as SLURM jobs, as launch.backend says", [study, until, dry])
    add("cancel", "stop what works on this study, after it has saved", [study])
    add("plan", "the stages, their state and where their artifacts lie", [study, until])
    watch = argparse.ArgumentParser(add_help=False)
    watch.add_argument("--watch", action="store_true", help="keep the table on the terminal until nothing is under way")
    add("status", "the stages, what runs, how far it is, when it will be done, and its log", [study, watch])
    judged = argparse.ArgumentParser(add_help=False)
    judged.add_argument(
        "--checkpoint",
        action="append",
        default=[],
        metavar="[NAME=]PATH",
        help="score this checkpoint of yours instead, on all that the study scores; may be repeated",
    )
    judged.add_argument("--final", action="store_true", help="with --checkpoint: on the splits that final runs are compared on")
    for name, help in _PARTS.items():
        asked = [study, running, judged] if name == "evaluate" else [study, running]
        add(name, help, asked, _EVALUATING if name == "evaluate" else None)
    add("report", "the HTML report of whatever is done so far", [study])
    consistency = "how well proxies rank mixtures, against references that were truly trained"
    comparing = commands.add_parser("consistency", help=consistency, description=f"{consistency[0].upper()}{consistency[1:]}.")
    add_consistency_arguments(comparing)
    comparing.add_argument("--json", action="store_true", help="machine-readable result on standard output")
    doctor = commands.add_parser("doctor", help="what is installed, what it is used for, and what to do about each gap")
    doctor.add_argument("--json", action="store_true", help="machine-readable result on standard output")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `demix`. Returns the exit code."""
    options = _parser().parse_args(arguments)
    if options.command == "submit":
        for signum in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, signal.default_int_handler)  # a lost connection: what was submitted so far is taken back
    return exit_code(lambda: _command(options), speaker="demix", interrupted="stopped.")


def _command(options: argparse.Namespace) -> int:
    if options.command == "doctor":
        return _doctor(options)
    if options.command == "consistency":
        return _consistency(options)
    return _study_command(options)


def _study_command(options: argparse.Namespace) -> int:
    from megatron_demix.launch.started import Started
    from megatron_demix.study.load import load_study
    from megatron_demix.study.unused import warnings_of

    if options.backend:
        options.set.append(f"trainer.backend={options.backend}")
    study = load_study(options.study, options.set)
    run = _run_folder(study.name, options)
    last = Started.read(run)
    if options.command in ("status", "cancel") and last and last.launch:
        study = study.model_copy(update={"launch": last.launch})
    started = Started.of(study, options.command if options.command in _PARTS else getattr(options, "until", None))
    dag = _dag(study, run, options)
    if options.command not in ("status", "cancel", "report") and not getattr(options, "quiet", False):
        for line in warnings_of(study):
            print(f"warning: {line}", file=sys.stderr)
    if last and options.command in ("status", "plan", "resume"):
        _say_what_was_started(options, started, last)
    if options.command not in ("cancel", "report") and not getattr(options, "quiet", False):
        from megatron_demix.pipeline.changes import changes

        for line in changes(dag.until(started.until)):
            print(f"note: {line}", file=sys.stderr)
    if options.command == "report":
        _report(dag, options)
    elif options.command in ("submit", "cancel", "status") or (options.command == "resume" and not options.dry_run):
        _backend(dag, options, started)
    else:
        stages = _stages(dag, options, started)
        if options.command == "plan" or options.dry_run:
            _plan(dag, stages, options)
        else:
            _run(dag, stages, options, started)
    return 0


_LOOKING = ("status", "plan", "report")


def _run_folder(name: str, options: argparse.Namespace) -> Path:
    """Of the study of that name. Raises ConfigError where --runs is not given and the run lies beside the study file, for
    commands that would begin another one here."""
    here, beside = Path("runs"), options.study.parent / "runs"
    if options.runs is None:
        options.runs = here
        if _is_begun(beside / name) and not _is_begun(here / name):
            said = f"this study's run is {_shown((beside / name).resolve())}, and there is none in ./runs"
            flag = f"--runs {shlex.quote(str(beside))}"
            if options.command == "cancel":
                options.runs = beside
            elif options.command not in _LOOKING and not getattr(options, "dry_run", False):
                raise ConfigError(f"{said}. Add {flag} to go on with it, or --runs {here} to begin another one here.")
            print(f"note: {said}{'' if options.command == 'cancel' else f'; {flag} shows it'}", file=sys.stderr)
    return (options.runs / name).resolve()


def _is_begun(run: Path) -> bool:
    """Whether more is there than what commands leave that only look."""
    return run.is_dir() and any(path.name not in ("cache", "report") for path in run.iterdir())


def _dag(study: Study, run: Path, options: argparse.Namespace) -> Dag:
    """Commands that only look do without the inputs, as far as it is known what they were."""
    from megatron_demix.pipeline.dag import build_dag

    if options.command == "cancel" or (options.command == "submit" and options.dry_run):
        return build_dag(study, options.study, run, absent_inputs="allowed")
    try:
        return build_dag(study, options.study, run)
    except (DemixError, OSError) as e:
        if options.command not in _LOOKING:
            raise
        try:
            dag = build_dag(study, options.study, run, absent_inputs="remembered")
        except (DemixError, OSError):
            raise e from None
        print(f"note: inputs are taken to be what they were when they were last read: {e}", file=sys.stderr)
        return dag


def _place(options: argparse.Namespace) -> list[str]:
    return [str(options.study), "--runs", str(options.runs)]


def _arguments(options: argparse.Namespace) -> list[str]:
    """Those by which another command finds the same study."""
    return [*_place(options), *(word for text in options.set for word in ("--set", text))]


def _say_what_was_started(options: argparse.Namespace, now: Started, last: Started) -> None:
    """On standard error, where it was with other settings than these: then its stages are others."""
    if options.command == "status":
        now = replace(now, until=last.until)
    if more := last.otherwise(now):
        same = _arguments(options)
        with suppress(DemixError):  # a file that is whole only with --set
            from megatron_demix.launch.started import Started
            from megatron_demix.study.load import load_study

            # From the file as it is, so that no setting is given twice, whole and in part.
            more = last.otherwise(Started.of(load_study(options.study), now.until))
            same = _place(options)
        note = "note: this study was last started with other settings than it has here. For what was started:"
        print(f"{note}\n  {shlex.join(['demix', options.command, *same])} {more}".rstrip(), file=sys.stderr)


def _stages(dag: Dag, options: argparse.Namespace, started: Started) -> list[Stage]:
    """What a command makes, with all that it needs."""
    if options.command == "evaluate" and options.checkpoint:
        from megatron_demix.pipeline.given_scores import given_scores, named_checkpoints
        from megatron_demix.pipeline.stage import with_needs

        return with_needs([given_scores(dag, named_checkpoints(options.checkpoint), final=options.final)])
    return dag.until(started.until)


def _run(dag: Dag, stages: list[Stage], options: argparse.Namespace, started: Started) -> None:
    from megatron_demix.launch.display import Display
    from megatron_demix.launch.local import run_stages
    from megatron_demix.launch.slurm import refuse_beside_jobs
    from megatron_demix.pipeline import preflight
    from megatron_demix.pipeline.dag import PARTS
    from megatron_demix.pipeline.task_inputs import check_tasks

    def begin() -> None:
        refuse_beside_jobs(dag.run, dag.study.name)
        if not getattr(options, "checkpoint", None):
            started.write(dag.run)

    launch = dag.study.launch
    if launch.backend != "local":
        raise ConfigError(
            f"launch.backend is {launch.backend}: `demix submit` starts this study there, with --until a part of it. To run it "
            "in this process, add --set launch.backend=local."
        )
    nothing_to_do = all(s.done() for s in stages)
    if not nothing_to_do:
        check_tasks(dag.tasks)
        for line in () if options.quiet else _used_of_earlier(dag, stages):
            print(line, file=sys.stderr)
        display = Display(quiet=options.quiet)
        run_stages(
            stages,
            dag.run,
            jobs=launch.jobs,
            threads_per_rank=launch.threads_per_rank,
            display=display,
            locked=begin,
        )
    elif not options.quiet:
        print(f"everything is already done ({len(stages)} stages)", file=sys.stderr)
    if started.until == "prepare":
        try:
            preflight.check(dag.all)
        except DemixError as e:  # of what was not asked for
            print(f"warning: {e}", file=sys.stderr)
    if options.command in ("run", "resume"):
        _report(dag, options)
    elif options.command == "search":
        _show_choice(dag, options)
    elif options.command == "evaluate" and options.checkpoint:
        _show_scores(stages[-1], options)
    elif options.json:
        print(json.dumps({s.name: str(_result(s)) for s in stages}, indent=1))
    elif not options.quiet:
        for stage in stages:
            if stage.kind in PARTS[options.command]:
                print(f"{stage.name}: {_shown(_result(stage))}", file=sys.stderr)


def _result(stage: Stage) -> Path:
    """What others take of a stage: its folder, or the checkpoint in it."""
    from megatron_demix.pipeline.final_stages import PROXIES, found_proxy

    return found_proxy(stage) if stage.name == PROXIES else stage.folder


def _show_choice(dag: Dag, options: argparse.Namespace) -> None:
    from megatron_demix.artifact import read_json
    from megatron_demix.launch.status import new_table, on_terminal
    from megatron_demix.pipeline.search_stages import CHOICE
    from megatron_demix.search.outcome import natural_in_words

    path = dag.choice.folder / CHOICE
    if options.json:
        print(path.read_text(), end="")
        return
    found = read_json(path)
    merged = dag.study.search.proxies == "merged"
    shown = new_table("domain", "share", *(["merge weight"] if merged else []))
    for name, share in found["weights"].items():
        shown.add_row(name, f"{share:.1%}", *([f"{found['merge_weights'][name]:.1%}"] if merged else []))
    judged = found.get("optimum", {}).get("judged_gain")
    mean, std = judged or found["expected_gain"]
    on_terminal().print(shown)
    compared = natural_in_words(found.get("natural_distance"))
    said = "expected" if judged else "predicted"
    print(f"{said} to be {mean:.2g} ± {std:.1g} better than {compared}, in the objective's unit\n{_shown(path)}")


def _show_scores(stage: Stage, options: argparse.Namespace) -> None:
    from megatron_demix.evaluate.job import SCORES
    from megatron_demix.launch.status import new_table, on_terminal
    from megatron_demix.pipeline.given_scores import table

    if options.json:
        print((stage.folder / SCORES).read_text(), end="")
        return
    titles, rows = table(stage)
    shown = new_table(*titles)
    for row in rows:
        shown.add_row(*row)
    on_terminal().print(shown)


def _backend(dag: Dag, options: argparse.Namespace, started: Started) -> None:
    from megatron_demix.launch.backend import backend_of
    from megatron_demix.launch.status import show_status
    from megatron_demix.pipeline import preflight
    from megatron_demix.pipeline.task_inputs import check_tasks

    if options.command == "resume" and dag.study.launch.backend == "local":
        _run(dag, dag.until(started.until), options, started)
        return
    until = ["--until", started.until] if started.until else []
    backend = backend_of(dag, options.study, [*_arguments(options), *until], started)
    if options.command == "status":
        show_status(dag, backend, as_json=options.json, watch=options.watch)
        return
    if options.command == "submit" and options.dry_run:
        print(backend.scripts(), end="")
        return
    if options.command != "cancel":
        check_tasks(dag.tasks)
        preflight.check(dag.until(started.until))
    facts = backend.cancel() if options.command == "cancel" else backend.submit()
    print(json.dumps(facts, indent=1) if options.json else facts["said"])


def _report(dag: Dag, options: argparse.Namespace) -> None:
    from megatron_demix.pipeline.reporting import finished_reports, verdict, write_report

    _warn_of_damage(dag.all)
    page = write_report(dag)
    if not dag.final_scores.is_intact() and (others := finished_reports(dag.run)):
        print(f"note: finished reports, of other data or settings: {', '.join(map(_shown, others))}", file=sys.stderr)
    if options.json:
        print(json.dumps({"report": str(page)}))
    elif not getattr(options, "quiet", False):
        print(f"{verdict(dag)}\nreport: {_shown(page)}")


def _warn_of_damage(stages: Sequence[Stage]) -> None:
    for damage in filter(None, (stage.damage() for stage in stages)):
        print(f"warning: {damage}", file=sys.stderr)


def _plan(dag: Dag, stages: list[Stage], options: argparse.Namespace) -> None:
    from megatron_demix.pipeline import preflight

    rows = [
        {"stage": s.name, "state": s.state(), "ranks": s.ranks, "key": s.key, "path": str(s.folder)} for s in stages
    ]  # fmt: skip
    _warn_of_damage(stages)
    if options.json:
        print(json.dumps(rows, indent=1))
        preflight.check(stages)
        return
    from megatron_demix.launch.status import COLOURS, counts, new_table, on_terminal

    table = new_table("stage", "state", "ranks", "artifact")
    for stage, row in zip(stages, rows, strict=True):
        state = str(row["state"])
        table.add_row(stage.name, f"[{COLOURS[state]}]{state}[/]", str(stage.ranks or "-"), _shown(stage.folder))
    on_terminal().print(table, counts([str(row["state"]) for row in rows]))
    for line in [*_used_of_earlier(dag, stages), *_added_by_mixed(dag), *_extrapolated(dag)]:
        print(line)
    if options.command != "plan":
        for stage in stages:
            if stage.script and not stage.is_intact():
                print(f"\n# ---- {stage.job.with_suffix('.sh')}\n{stage.script()}", end="")
    preflight.check(stages)


def _used_of_earlier(dag: Dag, stages: list[Stage]) -> list[str]:
    """What these stages take over from other studies, and what not, and why."""
    return ["used of the earlier study " + e.said(f"at most {e.num_proxies} proxies") for e in dag.earlier if e.stage in stages]


def _added_by_mixed(dag: Dag) -> list[str]:
    """What training the mixed components costs."""
    from megatron_demix.pipeline.train_stages import num_tokens
    from megatron_demix.units import format_count

    if not dag.mixed:
        return []
    each, added, others = num_tokens(dag.study, "component"), len(dag.mixed), len(dag.components)
    tokens = [format_count(num * each) for num in (added, others)]
    return [f"component.mixed adds {added} components to {others}, and {tokens[0]} tokens of training to {tokens[1]}"]


def _extrapolated(dag: Dag) -> list[str]:
    """How scores are continued to the final run's length, and what that does to their noise."""
    from megatron_demix.pipeline.train_stages import horizon_line

    line = horizon_line(dag.study)
    if line is None:
        return []
    return [f"search.extrapolate takes {line}", *([f"warning: {line.warning}"] if line.warning else [])]


def _shown(path: Path) -> str:
    """Relative to where one stands, if that is shorter."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _consistency(options: argparse.Namespace) -> int:
    from megatron_demix.pipeline.consistency import compare, show

    report = compare(options)
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        show(report)
    return 0


_STATE_COLOURS = {"works": "green", "installed": "green", "absent": "dim", "misfit": "red", "broken": "red"}


def _doctor(options: argparse.Namespace) -> int:
    """0 if nothing has to be done, ConfigError's code else."""
    from megatron_demix.launch.doctor import examine

    findings = examine()
    problems = [f for f in findings if f.is_problem]
    if options.json:
        print(json.dumps([vars(f) for f in findings], indent=1))
        return ConfigError.exit_code if problems else 0
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("what", "state", "found", "used for", "to do"):
        table.add_column(column)
    for f in findings:
        colour = "red" if f.is_problem else _STATE_COLOURS[f.state]
        table.add_row(f.name, f"[{colour}]{f.state}[/]", escape(f.found), escape(f.purpose), escape(f.advice))
    Console(width=None if sys.stdout.isatty() else 180, highlight=False).print(table)
    said = f"to repair: {', '.join(f.name for f in problems)}" if problems else "everything that is needed works"
    print(said)
    return ConfigError.exit_code if problems else 0


if __name__ == "__main__":
    sys.exit(main())
