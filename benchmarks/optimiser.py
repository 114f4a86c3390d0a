#!/usr/bin/env python3
"""How much of what surrogates predict the search finds, and whether it sees what is left on resampled proxies.

    OMP_NUM_THREADS=1 python benchmarks/optimiser.py

Surrogates are power laws, fitted to three noisy scores of 2 to 4 times as many proxies as domains; with caps no domain may have
more than twice its natural share. The search is compared with a local one that goes on from its choice: `gain`, the part of the
predicted gain over the natural mixture that the choice has; `regret`, the expected regret by the bootstrap, in parts of the one
that the local search finds on the same resampled proxies. Writes to benchmarks/results/optimiser.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from megatron_demix.artifact import write_json
from megatron_demix.mixture import Mixture
from megatron_demix.search.objective import Objective
from megatron_demix.search.optimise import choose_mixture
from megatron_demix.search.regressors import REGRESSORS
from megatron_demix.search.sample import sample_around, sample_mixtures
from megatron_demix.search.space import SearchSpace
from megatron_demix.search.surrogate import Scale, Surrogate
from megatron_demix.search.uncertainty import optimum_distribution

SIZES = {5: 20, 10: 40, 20: 64, 30: 64}
"""Domains -> proxies."""
SCORES, NOISE, BOOTSTRAPS = 3, 0.004, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", type=int, default=2, help="random losses of each kind")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "optimiser.json")
    options = parser.parse_args()
    rows = []
    for capped in (False, True):
        for num in SIZES:
            for seed in range(options.losses):
                rows.append({"domains": num, "capped": capped, "seed": seed} | measured(num, capped, seed))
                print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    write_json(options.output, {"command": "OMP_NUM_THREADS=1 python benchmarks/optimiser.py", "rows": rows})


def measured(num: int, capped: bool, seed: int) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    names = [f"d{i}" for i in range(num)]
    natural = Mixture.proportional(dict(zip(names, np.exp(rng.normal(0, 1.2, num)), strict=True)))
    caps = {name: min(1.0, max(2 * share, 0.8 / num)) for name, share in natural.items()} if capped else {}
    space = SearchSpace(natural, Mixture.uniform(names), 0.5, caps)
    shares_MD = space.shares(sample_mixtures(space, SIZES[num], seed))
    surrogates = {}
    for t in range(SCORES):
        matters_D = np.exp(rng.normal(-1.5, 1.0, num)) + 2.0 * (np.arange(num) == t)
        scores_M = 1 + 0.3 * (0.05 + shares_MD**0.6 @ matters_D) ** -0.4 + rng.normal(0, NOISE, len(shares_MD))
        scale, power_law = Scale.of(scores_M), REGRESSORS["power_law"](0)
        power_law.fit(shares_MD, scale.to_standard(scores_M))
        errors = {"measured_M": scores_M, "predicted_M": scale.to_scores(power_law.mean(shares_MD))}
        surrogates[f"s{t}"] = Surrogate("power_law", ((1.0, power_law),), shares_MD, scores_M, errors, scale, 1.0)
    goal = Objective(space, surrogates, dict.fromkeys(surrogates, 1.0), seed=seed)
    choice = choose_mixture(goal)
    chosen_D = np.array([choice.weights[name] for name in names])
    gain = choice.expected_gain[0] / (choice.expected_gain[0] + further(space, goal, chosen_D))
    spread = optimum_distribution(goal, choice, num=BOOTSTRAPS)
    again = np.random.default_rng(seed)  # as optimum_distribution draws
    samples = [again.integers(len(shares_MD), size=len(shares_MD)) for _ in range(BOOTSTRAPS)]
    possible = np.mean([further(space, goal.refit(rows), chosen_D) for rows in samples])
    return {"gain": round(gain, 4), "regret": round(float(spread.expected_regret / possible), 4)}


def further(space: SearchSpace, goal: Objective, start_D: np.ndarray) -> float:
    """By how much a long local search betters these merge weights."""
    best_D = start_D
    first = value = goal.means(space.shares(start_D[None]))[0]
    for step in range(1, 61):
        near_MD = sample_around(space, best_D[None], 600, step, strength=(20.0 * step, 5000.0 * step))
        values_M = goal.means(space.shares(near_MD))
        if values_M.min() < value:
            best_D, value = near_MD[values_M.argmin()], values_M.min()
    return float(first - value)


if __name__ == "__main__":
    main()
