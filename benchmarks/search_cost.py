#!/usr/bin/env python3
"""Time of each part of the search, from the paper's 224 proxies to 2 000: CPU seconds, the wall time of one idle core.

Scores are a made-up transfer law plus noise over 7 domains: only the cost is measured here, never a ranking. The same then to
100 domains: a first score, a second one, which shares much with it, and what a search asks of a surrogate. Merging a proxy
and evaluating it are read from a finished study, if one is given: the time of its scoring stages against their proxies.

    OMP_NUM_THREADS=1 python benchmarks/search_cost.py --run runs/quickstart
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_demix.artifact import read_json, write_json
from megatron_demix.mixture import Mixture
from megatron_demix.search.objective import Objective
from megatron_demix.search.optimise import choose_mixture, propose
from megatron_demix.search.regressors import REGRESSORS
from megatron_demix.search.sample import sample_candidates, sample_mixtures
from megatron_demix.search.space import SearchSpace
from megatron_demix.search.surrogate import fit_surrogate

DOMAINS = ("general", "code_1", "code_2", "code_3", "math_1", "math_2", "math_3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proxies", type=int, nargs="*", default=[224, 500, 1000, 2000])
    parser.add_argument("--domains", type=int, nargs="*", default=[17, 50, 100])
    parser.add_argument("--candidates", type=int, default=200_000)
    parser.add_argument("--run", type=Path, help="a finished study of merged proxies: what merging and evaluating took")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "search_cost.json")
    args = parser.parse_args()
    report: dict[str, Any] = {
        "command": f"OMP_NUM_THREADS=1 python benchmarks/search_cost.py --proxies {' '.join(map(str, args.proxies))}",
        "unit": "CPU seconds on one thread; fitting, proposing and choosing for one score",
        "candidates": args.candidates,
        "proxies": {},
        "domains": {},
    }
    # The libraries' import, paid once a process, is no part of a fit.
    measure(16, 1000)
    for num in args.proxies:
        report["proxies"][str(num)] = row = measure(num, args.candidates)
        print(f"{num:5d} proxies  " + "  ".join(f"{part} {seconds:.2f}" for part, seconds in row.items()), flush=True)
    for num in args.domains:
        report["domains"][str(num)] = row = measure_domains(num)
        print(f"{num:5d} domains  " + "  ".join(f"{part} {seconds:.2f}" for part, seconds in row.items()), flush=True)
    if args.run:
        report["merging_and_evaluating"] = found = scoring(args.run)
        print("merging and evaluating: {start_s:.1f} s to start, {per_proxy_s:.3f} s a proxy".format(**found))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.output, report)
    plot(report, args.output.with_suffix(".png"))


def scoring(run: Path) -> dict[str, Any]:
    """A line through the wall times of the run's scoring stages: to start the ranks, and for each proxy."""
    took: list[tuple[int, float]] = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if entry["event"] == "stage" and entry["name"].startswith("rounds/") and entry["name"].endswith("/scores"):
            table = read_json(run / f"{entry['name']}-{entry['key']}" / "scores.json")
            took.append((len(table["rows"]), entry["wall_s"]))
    slope, start = np.polyfit(*zip(*took, strict=True), 1)
    return {
        "study": run.name,
        "proxies_and_wall_s": took,
        "start_s": round(float(start), 2),
        "per_proxy_s": round(float(slope), 4),
    }


def plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    sizes = [int(size) for size in report["proxies"]]
    for part in next(iter(report["proxies"].values())):
        axes.plot(sizes, [row[part] for row in report["proxies"].values()], marker="o", label=part.replace("_", " "))
    if found := report.get("merging_and_evaluating"):
        seconds = [found["start_s"] + found["per_proxy_s"] * size for size in sizes]
        axes.plot(sizes, seconds, color="black", linestyle="--", label=f"merging and evaluating, {found['study']} (wall)")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes], minor=False)
    axes.minorticks_off()
    axes.set_xlabel("proxies")
    axes.set_ylabel("seconds, one thread")
    figure.legend(fontsize=8, ncols=3, loc="outside upper center")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def measure(num: int, candidates: int) -> dict[str, float]:
    natural = Mixture.proportional(dict(zip(DOMAINS, (60, 9, 6, 5, 10, 6, 4), strict=True)))
    space = SearchSpace(natural, Mixture.uniform(DOMAINS), 0.5, dict.fromkeys(DOMAINS[1:], 0.4))
    rng = np.random.default_rng(0)
    took: dict[str, float] = {}
    timed(took, "sample_candidates", lambda: sample_candidates(space, candidates, 1))
    shares_MD = space.shares(timed(took, "sample_proxies", lambda: sample_mixtures(space, num, 0)))
    scores_M = 2 + 0.3 * (0.02 + shares_MD @ rng.uniform(0, 1, 7)) ** -0.4 + 0.003 * rng.standard_normal(num)
    fitted = {}
    for kind in ("gaussian_process", "power_law", "auto"):
        fitted[kind] = timed(took, f"fit_{kind}", lambda kind=kind: fit_surrogate(shares_MD, scores_M, kind))
    goal = Objective(space, {"loss": fitted["auto"]}, {"loss": 1})
    timed(took, "propose_64", lambda: propose(goal, num=64, candidates=candidates))
    timed(took, "choose", lambda: choose_mixture(goal, candidates=candidates))
    return took


def measure_domains(num: int) -> dict[str, float]:
    """8 proxies a domain; natural shares differ as those of web domains do."""
    rng, names = np.random.default_rng(0), [f"d{i}" for i in range(num)]
    natural = Mixture.proportional(dict(zip(names, np.exp(rng.normal(0, 1.2, num)), strict=True)))
    space = SearchSpace(natural, Mixture.uniform(names), 0.5)
    shares_MD = space.shares(sample_mixtures(space, 8 * num, 0))
    candidates_MD = space.shares(sample_candidates(space, 20_000, 1))
    took: dict[str, float] = {}
    for score in ("first", "second"):
        scores_M = 2 + 0.3 * (0.02 + shares_MD @ rng.uniform(0, 1, num)) ** -0.4 + 0.003 * rng.standard_normal(8 * num)
        timed(took, f"fit_{score}", lambda scores_M=scores_M: fit_surrogate(shares_MD, scores_M, "auto"))
    for kind in ("gaussian_process", "power_law", "scheffe_log"):
        fitted = REGRESSORS[kind](0)
        fitted.fit(shares_MD, (scores_M - scores_M.mean()) / scores_M.std())
        timed(took, f"20_000_means_{kind}", lambda fitted=fitted: fitted.mean(candidates_MD))
    timed(took, "sample_optimal_128", lambda: sample_mixtures(space, 128, 0, design="optimal"))
    return took


def timed(took: dict[str, float], part: str, work: Callable) -> Any:
    started = time.process_time()
    result = work()
    took[part] = round(time.process_time() - started, 3)
    return result


if __name__ == "__main__":
    main()
