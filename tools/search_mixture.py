#!/usr/bin/env python3
"""Sample mixtures, predict their scores, and compare proxies' ranking with references': CSV in, CSV or JSON out.

Every CSV has an id in its first column, then one column a domain or a score. Rows are joined by id, columns by name.
Nothing is overwritten: an output that is there is left as it is, and refused if it is not what the command makes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import get_args

from megatron_demix.exits import check_at_least, check_outputs, exit_code
from megatron_demix.pipeline.consistency import add_arguments as add_consistency_arguments
from megatron_demix.study.choices import Aim, Design, SurrogateKind

DEFAULT = "default: %(default)s"


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)

    def run() -> int:
        args.run(args)
        return 0

    return exit_code(run)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    sample = commands.add_parser("sample", help="feasible mixtures of the domains, as merge weights")
    sample.add_argument(
        "--domains",
        type=Path,
        required=True,
        help="YAML: domains (of each its tokens and, where it is limited, max_epochs, min_share, max_share), target_tokens "
        "and, where there are any, anchor, groups, max_kl; see docs/FORMATS.md",
    )
    sample.add_argument("--num", type=int, required=True, help="mixtures to write")
    sample.add_argument("--seed", type=int, default=0, help=DEFAULT)
    sample.add_argument(
        "--design",
        default="dirichlet",
        choices=get_args(Design),
        help=f"how they are spread ({DEFAULT})",
    )
    sample.add_argument("--output", type=Path, required=True, help="CSV of merge weights")
    sample.add_argument("--shares", type=Path, help="also write the actual data shares these weights stand for")
    sample.set_defaults(run=_sample)

    fit = commands.add_parser("fit", help="learn scores from measured mixtures and predict those of others")
    fit.add_argument("--mixtures", type=Path, required=True, help="CSV of measured mixtures, as actual shares")
    fit.add_argument("--scores", type=Path, required=True, help="CSV of their scores")
    fit.add_argument("--predict", type=Path, required=True, help="CSV of mixtures to predict, as actual shares")
    fit.add_argument("--output", type=Path, required=True, help="CSV: each score and <score>_std at the mixtures to predict")
    fit.add_argument("--surrogate", default="auto", choices=get_args(SurrogateKind), help=DEFAULT)
    fit.add_argument("--seed", type=int, default=0, help=DEFAULT)
    fit.set_defaults(run=_fit)

    choose = commands.add_parser("choose", help="the best feasible mixture, how sure it is, and what to try next")
    choose.add_argument("--domains", type=Path, required=True, help="the file that the mixtures were sampled from (see sample)")
    choose.add_argument("--mixtures", type=Path, required=True, help="CSV of measured mixtures, as merge weights")
    choose.add_argument("--scores", type=Path, required=True, help="CSV of their scores")
    choose.add_argument("--objective", nargs="+", required=True, metavar="SCORE=WEIGHT", help="relative weights of the scores")
    choose.add_argument("--aim", default="mean", choices=get_args(Aim), help=f"what is made of the scores ({DEFAULT})")
    choose.add_argument("--higher-is-better", nargs="*", default=[], metavar="SCORE", help="scores that are not losses")
    choose.add_argument("--surrogate", default="auto", choices=get_args(SurrogateKind), help=DEFAULT)
    choose.add_argument("--candidates", type=int, default=200_000, help=f"mixtures that are compared ({DEFAULT})")
    choose.add_argument("--top", type=int, default=128, help=f"best candidates whose mean is the choice ({DEFAULT})")
    choose.add_argument("--bootstraps", type=int, default=50, help=f"searches on resampled proxies; 0: none ({DEFAULT})")
    choose.add_argument("--propose", type=int, default=0, metavar="N", help="also propose N mixtures for the next round")
    choose.add_argument("--next", type=Path, metavar="CSV", help="where the proposed merge weights go")
    choose.add_argument("--seed", type=int, default=0, help=DEFAULT)
    choose.add_argument("--output", type=Path, required=True, help="JSON: weights (actual shares), merge_weights, predictions")
    choose.set_defaults(run=_choose)

    consistency = commands.add_parser("consistency", help="how well proxies rank mixtures, against truly trained references")
    add_consistency_arguments(consistency)
    consistency.set_defaults(run=_consistency)
    return parser


def _sample(args: argparse.Namespace) -> None:
    from megatron_demix.artifact import write_new
    from megatron_demix.search.sample import distinct, sample_mixtures
    from megatron_demix.search.space_file import load_space
    from megatron_demix.search.tables import MERGE_WEIGHTS, SHARES, Table

    check_at_least("--num", args.num, 1)
    check_at_least("--seed", args.seed, 0)
    check_outputs(args.output, args.shares)
    space = load_space(args.domains)
    weights_MD = sample_mixtures(space, args.num, args.seed, design=args.design)
    if (num := len(distinct(weights_MD))) < args.num:
        _notice(f"{num} of {args.num} mixtures {'are' if num > 1 else 'is'} distinct: the bounds leave no others.")
    ids = tuple(f"mix_{m}" for m in range(args.num))
    tables = [Table(args.output, MERGE_WEIGHTS, ids, space.domains, weights_MD)]
    if args.shares:
        tables.append(Table(args.shares, SHARES, ids, space.domains, space.shares(weights_MD)))
    write_new({table.path: table.as_csv() for table in tables})


def _fit(args: argparse.Namespace) -> None:
    from megatron_demix.artifact import write_new
    from megatron_demix.search.from_tables import predict_scores
    from megatron_demix.search.tables import Table

    check_at_least("--seed", args.seed, 0)
    check_outputs(args.output)
    mixtures, scores, wanted = (Table.read(path) for path in (args.mixtures, args.scores, args.predict))
    predicted = predict_scores(mixtures, scores, wanted, kind=args.surrogate, seed=args.seed, notice=_notice)
    write_new({args.output: predicted.as_csv()})


def _choose(args: argparse.Namespace) -> None:
    from megatron_demix.artifact import json_text, write_new
    from megatron_demix.errors import ConfigError
    from megatron_demix.search.from_tables import choose_from_tables, parse_objective
    from megatron_demix.search.space_file import load_space
    from megatron_demix.search.tables import MERGE_WEIGHTS, Table

    for flag, least in (("candidates", 100), ("top", 1), ("bootstraps", 0), ("propose", 0), ("seed", 0)):
        check_at_least(f"--{flag}", getattr(args, flag), least)
    if args.bootstraps == 1:
        raise ConfigError("--bootstraps is 1: one search says nothing of how sure it is. Set it to 0, or to 2 or more.")
    if bool(args.propose) != bool(args.next):
        raise ConfigError("--propose N and --next CSV go together: how many mixtures to propose, and where to write them.")
    check_outputs(args.output, args.next)
    if args.top >= args.candidates:
        _notice(f"--top is {args.top} of {args.candidates} candidates: the found mixture is the mean of all of them.")
    space = load_space(args.domains)
    report, further_MD = choose_from_tables(
        space,
        Table.read(args.mixtures),
        Table.read(args.scores),
        parse_objective(args.objective) or {},
        aim=args.aim,
        higher_is_better=set(args.higher_is_better),
        kind=args.surrogate,
        candidates=args.candidates,
        top=args.top,
        bootstraps=args.bootstraps,
        next_round=args.propose,
        seed=args.seed,
        notice=_notice,
    )
    contents = {args.output: json_text(report)}
    if args.next:
        ids = tuple(f"next_{m}" for m in range(args.propose))
        contents[args.next] = Table(args.next, MERGE_WEIGHTS, ids, space.domains, further_MD).as_csv()
    write_new(contents)


def _consistency(args: argparse.Namespace) -> None:
    from megatron_demix.pipeline.consistency import compare, show

    show(compare(args))


def _notice(text: str) -> None:
    print(f"search_mixture.py: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
