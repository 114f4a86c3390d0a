#!/usr/bin/env python3
"""Do merged proxies rank mixtures as training does? Real runs: references, components, proxies, and what they must beat.

    python benchmarks/rank_consistency.py --work build/rank_consistency
    python benchmarks/rank_consistency.py --work build/rank_consistency --profile replication
    python benchmarks/rank_consistency.py --work build/rank_consistency --profile third
    python benchmarks/rank_consistency.py --work build/rank_consistency --profile gpu

The first is about 50 minutes of one processor core, and goes on where it was stopped (--seconds N stops by itself, with exit
code 75). --suites text and --suites skills may run side by side. --profile smoke takes a few minutes and means nothing.

The second and the third repeat the first with other bases, other mixtures and other seeds of every run, without the rows
that take most components (the anchor of one domain and the pairs). See "Again" and "Third" below.

Fixed before the run (what comes out is in results/rank_consistency.json and docs/EVIDENCE.md):

  Pilot     four mixtures, to choose sizes. Recalling one of 5 pairs and reversing letters were tried as skills and never rose
            above chance in 2,000 steps; they were left out.
  Suites    text: byte-level GPTs on five real domains, scored in bits per byte on all of them and on five kinds of text that
            are never trained on; three base seeds. skills: prose and four made-up skills that appear late in training, scored
            in bits per answer byte and by the share of answers without a wrong byte; three ages of base, from before the
            harder skills have formed to after.
  Truth     24 mixtures a base, other ones for each base, each trained for the horizon from the base with two seeds. They lie
            within reach of the default anchor: half uniform, half Dirichlet(0.5).
  Proxies   stand for exactly those mixtures. Components are trained for the horizon with the references' schedule. A trained
            proxy runs for 1/8, 1/4 or 1/2 of the horizon on a mixture of its own; all of one length together cost what the
            components cost. Their row takes the length and the surrogate that did best in hindsight, on the very numbers of
            the table.
  Measure   Spearman's rho against the references of one seed, averaged over both seeds, the scores of a group, and the bases
            (macro rho). Intervals are 90 % bootstraps over mixtures within each base, the same resamples for every row, so
            that differences are paired. They do not cover other bases, other seeds of the components, or other domains.
  Ceiling   the references of one seed against those of the other. A predictor without noise of its own can lie above it.
  Counted   a score of a base counts if the spread of its references (standard deviation of the two seeds' mean) is at least
            twice its seed noise (that of the seeds' difference, over the root of 2). Scores that do not count are listed.
  Error     mean absolute difference to the mean of both seeds' references, over the scores that count.
  Default   of search.proxy_score: merged, interpolated, or one of the two stacks, whichever has the highest mean of the four
            groups' rho, if its difference to `merged` excludes 0; otherwise merged, as in the paper.

Again: fixed after the first run was known and before the second one began, for the second alone:

  Goals     the mean of merged and interpolated, which is the default, within .02 of the seed ceiling in each group, and ahead
            of the best trained proxies in both groups of skills, with intervals that exclude 0.
  Three     the mean of merged, interpolated and probability ensemble becomes the default if its mean of the four groups' rho
            is higher than the default's and the interval of the difference excludes 0. Otherwise nothing changes.

Third: fixed after two runs were known and before the third one began, for the third alone. The default had become the stack
that is calibrated at the centroid, for the mean of the domains' losses, which those two runs had been asked about too.

  Judged    by half the mean of the four groups' rho, half the mean of the five composites' rho, paired as above.
  Rule      the default stays unless another candidate is higher and the interval of its difference to the default excludes 0.
            Candidates: the stack that is the mean, the stack with one calibrated part for all losses of a suite (less noise
            than a part for each), the mean of merged, interpolated and ensemble, an exponential mixing law through the
            components' scores and the trained centroid's (convex, and no merging), and the mean of merged and that law.
  Expected  the calibrated stack is ahead of the mean one in the mean of the domains' losses, and behind it in that of text
            never trained on, as in both runs before.
  Scores    of all rows and references are kept beside the result (..._scores.json.gz).

Law: the third run chose the mean of merged and the mixing law (.011 [.003, .020] above the calibrated stack), of five
candidates and by one run. Fixed before the first two runs were made again with the rows they lacked: it becomes the default if
in the replication, too, it is above the calibrated stack by an interval that excludes 0. It was not (-.008 [-.020, .002]).
In both runs the law beside the calibrated stack is (.011 [.004, .020], .008 [.004, .014]): two curves through every component
and the trained centroid, one bent as merging bends, one exponentially. Fixed before the first run was made again: their mean
becomes the default if there, too, its interval excludes 0; the law beside merges of second order has a row, and no say.

Equal cost: the default costs one model more than the components, the trained proxies above do not. Fixed before proxies of one
model more were trained, an eighth, a quarter and half of the horizon long as before, for all three runs: the default is ahead
of them in both groups of skills, with intervals that exclude 0, over all 18 bases. It was in bits, and in accuracy by an
interval that just includes it (.027 [-.0005, .055]).

One process, one thread, no torchrun: the models are megatron.core's GPTModel, built by the trainer's own code, and the merges
run on the native core.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rank_models import Lab
from rank_plan import PROFILES, SEEDS, TRAINED_LENGTHS, TRAINED_MORE, Bench, Clock
from rank_predictors import (
    COSTLY,
    MERGED_CENTROID,
    PREDICTORS,
    TRAINED,
    Predictor,
    centroid_scores,
    fitted_scale,
    references,
    trained_scores,
)
from rank_report import plot, print_report, summarise

from megatron_demix.artifact import write_json
from megatron_demix.errors import DemixError
from megatron_demix.progress import progress_bar


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where models and their scores are kept")
    parser.add_argument("--profile", choices=PROFILES, default="cpu")
    parser.add_argument("--suites", nargs="*", choices=["text", "skills"], default=["text", "skills"])
    parser.add_argument("--seconds", type=float, help="stop after this long; the same command goes on")
    parser.add_argument("--output", type=Path, help="default: results/rank_consistency.json, and the profile's name")
    args = parser.parse_args()
    named = "rank_consistency" if args.profile == "cpu" else f"rank_consistency_{args.profile}"
    output = args.output or Path(__file__).parent / "results" / f"{named}.json"
    torch.set_num_threads(1)
    clock = Clock(args.seconds)
    try:
        benches = {name: run_suite(name, args, clock) for name in args.suites}
    except DemixError as e:
        print(f"rank_consistency: {e}", file=sys.stderr)
        return e.exit_code
    if set(args.suites) != set(PROFILES[args.profile]):
        return 0
    suites = {name: facts(suite) for name, suite in benches.items()}
    report: dict[str, Any] = {
        "command": f"python benchmarks/rank_consistency.py --work build/rank_consistency --profile {args.profile}",
        "device": "one CPU core" if not torch.cuda.is_available() else torch.cuda.get_device_name(),
        **summarise(suites),
        "suites": {name: {k: v for k, v in s.items() if k not in ("bases", "kinds")} for name, s in suites.items()},
        "bases": {
            name: [{k: base[k] for k in ("seed", "steps", "maturity", "fitted_scale")} for base in s["bases"]]
            for name, s in suites.items()
        },
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, report)
    keep_scores(suites, output.with_name(f"{output.stem}_scores.json.gz"))
    print_report(report)
    plot(report, output.with_suffix(".png"))
    return 0


def run_suite(name: str, args: argparse.Namespace, clock: Clock) -> list[Bench]:
    """Train and score what is missing of every base."""
    plan = PROFILES[args.profile][name]
    suite, lab = plan.data(), Lab(plan.size)
    benches = [Bench(plan, suite, lab, number, args.work / args.profile / name, clock) for number in range(len(plan.bases))]
    for bench in benches:
        steps: list[Callable[[], object]] = [partial(references, bench, seed) for seed in SEEDS]
        steps += [partial(predict, bench) for predict in predictors_of(bench).values()]
        steps += [partial(centroid_scores, bench, seed) for seed in SEEDS]
        steps += [partial(trained_scores, bench, length, more) for length in TRAINED_LENGTHS for more in TRAINED_MORE]
        with progress_bar(f"{name}, base {bench.number}", len(steps), unit="rows of the table") as advance:
            for step in steps:
                step()
                advance()
    return benches


def facts(benches: Sequence[Bench]) -> dict[str, Any]:
    """What summarise() needs of a suite whose models are all there."""
    plan, suite = benches[0].plan, benches[0].suite
    return {
        "domains": suite.domains,
        "parameters": benches[0].lab.num_parameters,
        "horizon_steps": plan.horizon,
        "tokens_per_step": plan.size.batch * plan.size.seq_length,
        "kinds": {part.name: part.kind for part in suite.sets},
        "bases": [
            {
                "seed": plan.bases[bench.number][0],
                "steps": plan.bases[bench.number][1],
                "truths": [references(bench, seed) for seed in SEEDS],
                "predicted": {name: predict(bench) for name, predict in predictors_of(bench).items()},
                "trained": {key: predict(bench) for key, predict in TRAINED.items()},
                "maturity": maturity(bench),
                "fitted_scale": fitted_scale(bench),
            }
            for bench in benches
        ],
    }


def keep_scores(suites: dict[str, dict[str, Any]], path: Path) -> None:
    """By suite, the kinds of its sets, and of its bases two seeds' truths and every row's predictions, {score: a value for each
    mixture}: what rank_together.py reads."""

    def table(scores: dict[str, np.ndarray]) -> dict[str, list[float]]:
        return {name: [round(float(value), 5) for value in values_M] for name, values_M in scores.items()}

    def base(found: dict[str, Any]) -> dict[str, Any]:
        return {
            "truths": [table(truth) for truth in found["truths"]],
            "predicted": {name: table(scores) for name, scores in found["predicted"].items()},
            "trained": {" ".join(map(str, key)): table(scores) for key, scores in found["trained"].items()},
        }

    kept = {
        name: {"kinds": suite["kinds"], "bases": [base(found) for found in suite["bases"]]} for name, suite in suites.items()
    }
    path.write_bytes(gzip.compress(json.dumps(kept, separators=(",", ":")).encode(), mtime=0))


def predictors_of(bench: Bench) -> dict[str, Predictor]:
    return {name: predict for name, predict in PREDICTORS.items() if bench.plan.costly or name not in COSTLY}


def maturity(bench: Bench) -> dict[str, list[float]]:
    """By score: the merged centroid, and the trained one of each seed."""
    return {
        score: [merged_centre, *(centroid_scores(bench, seed)[score] for seed in SEEDS)]
        for score, merged_centre in bench.known[f"{MERGED_CENTROID}-0"].items()
    }


if __name__ == "__main__":
    sys.exit(main())
