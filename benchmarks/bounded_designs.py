#!/usr/bin/env python3
"""How near the best mixture a search ends when bounds bind, by the design of its first round.

    OMP_NUM_THREADS=1 python benchmarks/bounded_designs.py

Seven domains, six of which may have .25 of the data at most; 40 proxies, with noise of a fifth of the scores' spread over the
space; a Gaussian process; the mixture it chooses. Losses are sums of power laws, in which random domains matter. Beside the
designs there is `dirichlet, inside only`: draws that no bound touches. Writes to benchmarks/results/bounded_designs.json what
each design's choice loses against the best mixture, in parts of that spread, and how many of its 40 mixtures differ.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from megatron_demix.artifact import write_json
from megatron_demix.mixture import Mixture
from megatron_demix.search.objective import Objective
from megatron_demix.search.optimise import choose_mixture
from megatron_demix.search.sample import distinct, sample_candidates, sample_mixtures
from megatron_demix.search.space import SearchSpace
from megatron_demix.search.surrogate import fit_surrogate
from megatron_demix.search.walk import walk_inside

DOMAINS = [f"d{i}" for i in range(7)]
NUM, CAP, NOISE = 40, 0.25, 0.2
DESIGNS = ("dirichlet", "dirichlet, inside only", "sobol", "lattice", "optimal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", type=int, default=20, help="random loss functions")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "bounded_designs.json")
    options = parser.parse_args()

    natural = Mixture.proportional(dict(zip(DOMAINS, (60, 9, 6, 5, 10, 6, 4), strict=True)))
    space = SearchSpace(natural, Mixture.uniform(DOMAINS), 0.0, dict.fromkeys(DOMAINS[1:], CAP))
    regrets: dict[str, list[float]] = {design: [] for design in DESIGNS}
    for seed in range(options.losses):
        regret = regrets_of(space, seed)
        for design in DESIGNS:
            regrets[design].append(regret[design])
        print(f"loss {seed}: " + ", ".join(f"{design} {regret[design]:.4f}" for design in DESIGNS), flush=True)
    rng = np.random.default_rng(0)
    baseline = np.array(regrets["dirichlet"])
    result = {
        "command": "OMP_NUM_THREADS=1 python benchmarks/bounded_designs.py",
        "losses": options.losses,
        "proxies": NUM,
        "cap": CAP,
        "noise": NOISE,
        "mean regret": {design: float(np.mean(values)) for design, values in regrets.items()},
        "minus dirichlet, 90 % interval": {
            design: np.quantile(resampled(np.array(values) - baseline, rng), [0.05, 0.95]).tolist()
            for design, values in regrets.items()
        },
        "distinct mixtures": {design: len(distinct(drawn(space, design, 0))) for design in DESIGNS},
        "regrets": regrets,
    }
    write_json(options.output, result)
    for design in DESIGNS:
        num_distinct = result["distinct mixtures"][design]
        print(f"{design:24} mean regret {result['mean regret'][design]:.3f}, {num_distinct} of {NUM} distinct")


def resampled(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means of bootstrap samples."""
    return rng.choice(values, size=(10_000, len(values))).mean(axis=1)


def drawn(space: SearchSpace, design: str, seed: int) -> np.ndarray:
    if design != "dirichlet, inside only":
        return sample_mixtures(space, NUM, seed, design=design, landmarks=False)
    # Of those that SearchSpace.nearest has not moved, none lies on a cap.
    pool_MD = sample_candidates(space, 200_000, seed)
    inside_MD = pool_MD[(pool_MD[:, 1:] < CAP - 1e-6).all(axis=1)]
    return distinct(inside_MD)[:NUM]


def regrets_of(space: SearchSpace, seed: int) -> dict[str, float]:
    """By design, what the chosen mixture loses against the best of many, in parts of the loss's spread over the space."""
    rng = np.random.default_rng(seed)
    matters_SD, steep_S = rng.dirichlet(np.full(len(DOMAINS), 0.5), size=3), rng.uniform(0.2, 0.6, size=3)

    def loss(shares_MD: np.ndarray) -> np.ndarray:
        return ((0.02 + shares_MD @ matters_SD.T) ** -steep_S).sum(axis=1)

    everywhere_MD = np.concatenate([sample_candidates(space, 100_000, seed), walk_inside(space, 20_000, rng)])
    losses_M = loss(space.shares(everywhere_MD))
    best, spread = float(losses_M.min()), float(losses_M[100_000:].std())
    found = {}
    for design in DESIGNS:
        shares_MD = space.shares(drawn(space, design, seed))
        noisy_M = loss(shares_MD) + NOISE * spread * np.random.default_rng(seed).standard_normal(len(shares_MD))
        surrogates = {"loss": fit_surrogate(shares_MD, noisy_M, "gaussian_process")}
        chosen = choose_mixture(Objective(space, surrogates, {"loss": 1.0}), candidates=20_000)
        shares_D = np.array([[chosen.shares[name] for name in DOMAINS]])
        found[design] = (float(loss(shares_D)[0]) - best) / spread
    return found


if __name__ == "__main__":
    main()
