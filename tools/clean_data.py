#!/usr/bin/env python3
"""Clean text before it is tokenized: of exact and near duplicates within and across domains, of junk, of evaluation tasks'
text, and of what a language model or a classifier scores worst. Grades split a domain by quality.

Writes OUTPUT/<domain>/*.jsonl.zst, OUTPUT/removed/<reason>/<domain>/*.jsonl.zst and OUTPUT/clean.json, the account of both. The
steps are datatrove's (pip install 'megatron-demix[data]'); the defaults are the paper's. Interrupted, the same command goes on.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, get_args

from megatron_demix.data.input_files import resolve_inputs
from megatron_demix.errors import ConfigError
from megatron_demix.exits import check_at_least, exit_code
from megatron_demix.study.choices import Heuristic
from megatron_demix.units import Cut, parse_cut

HEURISTICS = get_args(Heuristic)
BELONG_TO = {
    "heuristics": ("heuristics_domains",),
    "tasks": ("task_ngram", "task_keys"),
    "perplexity": ("sentencepiece", "perplexity_drop", "perplexity_domains"),
    "quality": ("quality_label", "quality_drop", "quality_domains"),
}
"""Options that say how another one is meant. None of them has a default here: CleanSpec has them."""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="DOMAIN=PATH", help="JSON Lines (.gz, .zst), Parquet or text: files, "
        "folders, globs; of duplicates across domains the domain named first keeps its own")  # fmt: skip
    add("--output", type=Path, required=True, metavar="DIR")
    add("--json-key", default="text", metavar="KEY", help="field or column that holds the text (default: text)")
    add(
        "--on-bad-document",
        choices=("error", "reject"),
        default="error",
        help="stop at what is no document (default), or list it",
    )
    add(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="files worked on at a time; changes no byte of the output (default: 1)",
    )
    add("--slurm", nargs="+", metavar="KEY=VALUE", help="submit job arrays instead: settings of datatrove's "
        "SlurmPipelineExecutor, such as partition=cpu time=8:00:00 workers=64 mem_per_cpu_gb=4")  # fmt: skip
    group = parser.add_argument_group("duplicates")
    group.add_argument("--keep-exact-duplicates", action="store_true")
    group.add_argument("--ngram", type=int, metavar="WORDS", help="in a shingle; 0 keeps near duplicates (default: 24)")
    group.add_argument("--bands", type=int, metavar="N", help="default: 20")
    group.add_argument("--hashes", type=int, metavar="N", help="MinHashes in a band (default: 13)")
    group = parser.add_argument_group("junk")
    group.add_argument("--heuristics", nargs="*", default=[], choices=HEURISTICS, metavar="NAME", help=", ".join(HEURISTICS))
    group.add_argument("--heuristics-domains", nargs="+", metavar="DOMAIN", help="default: all")
    group = parser.add_argument_group("evaluation tasks", "documents that contain an n-gram of a task's item are removed")
    group.add_argument("--tasks", nargs="+", default=[], metavar="TASK=PATH", help="files with one item a line")
    group.add_argument("--task-ngram", type=int, metavar="WORDS", help="default: 13")
    group.add_argument("--task-keys", nargs="+", metavar="KEY", help="fields of an item that count (default: all)")
    group = parser.add_argument_group("perplexity (tools/train_filters.py perplexity makes a model)")
    group.add_argument("--perplexity", type=Path, metavar="MODEL", help="KenLM's .arpa or binary file")
    group.add_argument("--sentencepiece", type=Path, metavar="MODEL", help="whose pieces are the KenLM model's tokens")
    group.add_argument("--perplexity-drop", metavar="CUT", help="share of each domain, or a perplexity (default: 2%%)")
    group.add_argument("--perplexity-domains", nargs="+", metavar="DOMAIN", help="default: all")
    group = parser.add_argument_group("quality (tools/train_filters.py quality makes a model)")
    group.add_argument("--quality", type=Path, metavar="MODEL", help="fastText's .bin file")
    group.add_argument("--quality-label", metavar="LABEL", help="its probability is the score (default: high)")
    group.add_argument("--quality-drop", metavar="CUT", help="share of each domain, or a probability (default: 3%%)")
    group.add_argument("--quality-domains", nargs="+", metavar="DOMAIN", help="default: all")
    group.add_argument("--grades", nargs="+", default=[], metavar="DOMAIN=NAME:CUT,...,NAME", help="best grade first, the last "
                       "is the rest: math=high:20%%,medium:50%%,low makes math_high, math_medium and math_low")  # fmt: skip
    return parser


def main() -> int:
    return exit_code(run)


def run() -> int:
    arguments = parser().parse_args()
    check_at_least("--workers", arguments.workers, 1)
    check_effects(arguments)
    inputs: dict[str, list[Path]] = {}
    for domain, pattern in pairs("--input", arguments.input):
        inputs.setdefault(domain, []).extend(resolve_inputs([pattern]))
    spec, grades = settings(arguments), dict(map(grade, pairs("--grades", arguments.grades)))
    slurm = dict(pairs("--slurm", arguments.slurm)) if arguments.slurm is not None else None
    # Here, because it takes seconds to import.
    from megatron_demix.data.clean.run import clean_domains

    report = clean_domains(
        inputs,
        arguments.output,
        spec,
        grades=grades,
        json_keys=dict.fromkeys(inputs, arguments.json_key),
        on_bad_document=arguments.on_bad_document,
        workers=arguments.workers,
        slurm=slurm and {k: int(v) if v.isdigit() else v for k, v in slurm.items()},
    )
    if report is None:
        print(f"submitted; {arguments.output} appears when the last job has ended. The same command then tidies up.")
    else:
        print(json.dumps(report, indent=1))
    return 0


def check_effects(arguments: argparse.Namespace) -> None:
    """Raises ConfigError on options that are given without the one they belong to."""
    for option, others in BELONG_TO.items():
        for other in others:
            if getattr(arguments, other) is not None and not getattr(arguments, option):
                raise ConfigError(f"--{other.replace('_', '-')} has no effect without --{option}.")
    if arguments.ngram == 0 and (arguments.bands or arguments.hashes):
        raise ConfigError(
            f"--{'bands' if arguments.bands else 'hashes'} has no effect with --ngram 0, which keeps near duplicates."
        )


def settings(arguments: argparse.Namespace) -> Any:
    from megatron_demix.study.load import clean_spec

    given = arguments
    tasks: dict[str, list[str]] = {}
    for task, pattern in pairs("--tasks", given.tasks):
        tasks.setdefault(task, []).append(pattern)
    sections = {
        "heuristics": {"use": given.heuristics or None, "domains": given.heuristics_domains},
        "contamination": {"tasks": tasks or None, "ngram": given.task_ngram, "keys": given.task_keys},
        "perplexity": {
            "model": given.perplexity,
            "sentencepiece": given.sentencepiece,
            "drop": given.perplexity_drop,
            "domains": given.perplexity_domains,
        },
        "quality": {
            "model": given.quality,
            "label": given.quality_label,
            "drop": given.quality_drop,
            "domains": given.quality_domains,
        },
    }
    spec: dict[str, Any] = {name: {k: v for k, v in said.items() if v is not None} or None for name, said in sections.items()}
    near = {"ngram": given.ngram, "bands": given.bands, "hashes": given.hashes}
    spec["near_duplicates"] = None if given.ngram == 0 else {k: v for k, v in near.items() if v is not None}
    return clean_spec(spec | {"exact_duplicates": not given.keep_exact_duplicates})


def pairs(flag: str, given: list[str]) -> list[tuple[str, str]]:
    found = []
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ConfigError(f"{flag} {text}: expected NAME=VALUE.")
        found.append((name, value))
    return found


def grade(given: tuple[str, str]) -> tuple[str, dict[str, Cut | None]]:
    domain, text = given
    parts = [part.partition(":") for part in text.split(",")]
    return domain, {name: parse_cut(cut) if colon else None for name, colon, cut in parts}


if __name__ == "__main__":
    sys.exit(main())
