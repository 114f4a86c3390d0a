"""`demix`: the whole method, or one stage of it, from a study file."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_demix import __version__, commands
from megatron_demix.exits import exit_code
from megatron_demix.pipeline.consistency import add_arguments as add_consistency_arguments

# Each command that makes a study up to somewhere, and its help.
_MILESTONES = {
    "prepare": "tokenize the domains into Megatron .bin/.idx, split into train, valid and test",
    "train": "train the base, one component per domain, and models on the centroid mixture, if any",
    "evaluate": "merge and score proxies, round by round, and fit the surrogates",
    "search": "the same as evaluate, ending with the chosen mixture as a table",
    "merge": "write the chosen mixture's proxy as a checkpoint",
    "blend": "build the final run's indexed data at the chosen and the baseline mixtures",
    "final": "train and score the final runs",
}
_EPILOG = """\
examples:
  python examples/quickstart/collect.py              once: the text of the quickstart's study
  demix plan examples/quickstart/study.yaml          what would run, what is already done, and what it costs
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
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    machine = argparse.ArgumentParser(add_help=False)
    machine.add_argument("--json", action="store_true", help="machine-readable result on standard output")
    study = argparse.ArgumentParser(add_help=False, parents=[machine])
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
    study.set_defaults(until=None, quiet=False, dry_run=False)
    running = argparse.ArgumentParser(add_help=False)
    running.add_argument("--dry-run", action="store_true", help="show what would run, and stop")
    running.add_argument("--quiet", action="store_true", help="neither progress nor notes")
    until = argparse.ArgumentParser(add_help=False)
    until.add_argument("--until", choices=_MILESTONES, help="end with what this command makes: search ends with the mixture")
    submitting = argparse.ArgumentParser(add_help=False)
    submitting.add_argument(
        "--dry-run", action="store_true", help="print what would be submitted (every sbatch script), and stop"
    )
    watching = argparse.ArgumentParser(add_help=False)
    watching.add_argument("--watch", action="store_true", help="keep the table on the terminal until nothing is under way")
    judging = argparse.ArgumentParser(add_help=False)
    judging.add_argument(
        "--checkpoint",
        action="append",
        default=[],
        metavar="[NAME=]PATH",
        help="score this checkpoint of yours instead, on all that the study scores; may be repeated",
    )
    judging.add_argument(
        "--final", action="store_true", help="with --checkpoint: on the splits that final runs are compared on"
    )

    def add(
        name: str,
        help: str,
        run: Callable[[argparse.Namespace], int | None],
        *parents: argparse.ArgumentParser,
        epilog: str | None = None,
    ) -> argparse.ArgumentParser:
        command = subparsers.add_parser(
            name,
            help=help,
            description=f"{help[0].upper()}{help[1:]}.",
            epilog=epilog,
            parents=parents,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        return command

    add("run", "the whole study, from text to the report", commands.run, study, until, running)
    again = "go on with what is missing: here, or, with launch.backend: slurm, by submitting it"
    add("resume", again, commands.resume, study, until, running)
    background = "the same as run, in the background or as SLURM jobs, as launch.backend says"
    add("submit", background, commands.submit, study, until, submitting)
    add("cancel", "stop what works on this study, after it has saved", commands.cancel, study)
    add("plan", "the stages, their state, where their artifacts lie, and what they cost", commands.plan, study, until)
    state = "the stages, what runs, how far it is, when it will be done, and its log"
    add("status", state, commands.status, study, watching)
    for name, help in _MILESTONES.items():
        if name == "evaluate":
            add(name, help, commands.evaluate, study, running, judging, epilog=_EVALUATING)
        else:
            add(name, help, commands.up_to(name), study, running)
    add("report", "the HTML report of whatever is done so far", commands.report, study)
    ranks = "how well proxies rank mixtures, against references that were truly trained"
    add_consistency_arguments(add("consistency", ranks, commands.consistency, machine))
    add("doctor", "what is installed, what it is used for, and what to do about each gap", commands.doctor, machine)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `demix`. Returns the exit code."""
    options = _parser().parse_args(arguments)
    if options.command == "submit":
        for signum in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, signal.default_int_handler)  # a lost connection: what was submitted so far is taken back
    return exit_code(lambda: options.run(options) or 0, speaker="demix", interrupted="stopped.")


if __name__ == "__main__":
    sys.exit(main())
