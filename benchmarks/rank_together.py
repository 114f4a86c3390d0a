#!/usr/bin/env python3
"""All bases of several runs of rank_consistency.py in one table: no model is trained.

    python benchmarks/rank_together.py

reads what the runs have left beside their results (rank_consistency*_scores.json.gz), and writes
results/rank_consistency_together.json and its plot. Rows that not all runs have are left out.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
from rank_report import TrainedKey, plot, print_report, summarise

from megatron_demix.artifact import write_json

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores", nargs="*", type=Path, default=sorted(RESULTS.glob("rank_consistency*_scores.json.gz")))
    parser.add_argument("--output", type=Path, default=RESULTS / "rank_consistency_together.json")
    args = parser.parse_args()
    suites = together([json.loads(gzip.decompress(path.read_bytes())) for path in args.scores])
    report = {
        "command": "python benchmarks/rank_together.py",
        "runs": [path.name.removesuffix("_scores.json.gz") for path in args.scores],
        **summarise(suites),
    }
    write_json(args.output, report)
    print_report(report)
    plot(report, args.output.with_suffix(".png"))
    return 0


def together(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The bases of all runs, by suite, with the rows that each of them has."""
    suites = {}
    for name in runs[0]:
        bases = [base for run in runs for base in run[name]["bases"]]
        rows = [row for row in bases[0]["predicted"] if all(row in base["predicted"] for base in bases)]
        suites[name] = {
            "kinds": runs[0][name]["kinds"],
            "bases": [
                {
                    "truths": [_arrays(truth) for truth in base["truths"]],
                    "predicted": {row: _arrays(base["predicted"][row]) for row in rows},
                    "trained": {_key(key): _arrays(scores) for key, scores in base["trained"].items()},
                }
                for base in bases
            ],
        }
    return suites


def _arrays(scores: dict[str, list[float]]) -> dict[str, np.ndarray]:
    return {name: np.array(values) for name, values in scores.items()}


def _key(text: str) -> TrainedKey:
    more, length, kind = text.split(" ", 2)
    return int(more), float(length), kind


if __name__ == "__main__":
    raise SystemExit(main())
