#!/usr/bin/env python3
"""Whether what a search says of its own mixture is true, on invented scores whose truth is known.

    OMP_NUM_THREADS=1 python benchmarks/search_honesty.py

Scores are random power laws of the shares of five domains, measured with noise (in standard deviations of a score over the
proxies). Means over --repeat of them, in standard deviations of the objective over the proxies:
- gain: over the natural mixture. `true` is what the found mixture has, `predicted` what the proxies it was chosen by predict,
  `judged` what a search says (mixtures chosen by half of the proxies, as the other half predicts them), `probability` the part
  of such halves in which the choice wins, `sure` how often that is .95 or more. Of noise alone there is nothing to gain.
- cover: how often a new measurement of the found mixture lies in the 90 % interval of the objective, of eight scores whose
  errors are independent, or correlated by .8, as those of one proxy are.
- ranks: one score that follows the shares and three of noise alone, weighted alike. What the found mixture loses in the first
  to the best there is, with the aims mean and percentile_rank; `std`: of the objective, for the latter in ranks from 0 to 1.
Writes benchmarks/results/search_honesty.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from megatron_demix.artifact import write_json
from megatron_demix.mixture import Mixture
from megatron_demix.search.objective import Objective
from megatron_demix.search.optimise import Choice, choose_mixture
from megatron_demix.search.sample import sample_candidates, sample_mixtures
from megatron_demix.search.space import SearchSpace
from megatron_demix.search.surrogate import fit_surrogate
from megatron_demix.search.uncertainty import optimum_distribution
from megatron_demix.study.choices import Aim

DOMAINS = 5
GAINS = (
    (32, 0.5, "ridge"),
    (32, 0.5, "gaussian_process"),
    (112, 0.3, "gaussian_process"),
    (40, None, "ridge"),
    (40, None, "auto"),
)
"""Proxies, noise (None: nothing else), surrogate."""
_Z90 = 1.645


class Truth:
    def __init__(self, rng: np.random.Generator, num_scores: int) -> None:
        names = [f"d{d}" for d in range(DOMAINS)]
        natural = Mixture.proportional(dict(zip(names, rng.dirichlet(np.full(DOMAINS, 2.0)).tolist(), strict=True)))
        self.space = SearchSpace(natural, Mixture.uniform(names), 0.0)
        self._worth_SD = rng.gamma(0.5, 1, (num_scores, DOMAINS)) + 3 * np.eye(num_scores, DOMAINS)
        self._power_S, self._fall_S = rng.uniform(0.4, 0.9, num_scores), rng.uniform(0.2, 0.6, num_scores)

    def scores(self, shares_MD: np.ndarray) -> np.ndarray:
        """[M, S], lower is better."""
        powers_MSD = np.clip(shares_MD, 0, None)[:, None] ** self._power_S[:, None]
        return 1 + (0.3 + (powers_MSD * self._worth_SD).sum(axis=2)) ** -self._fall_S


def fitted(
    space: SearchSpace, shares_MD: np.ndarray, scores_MS: np.ndarray, kind: str, seed: int, aim: Aim = "mean"
) -> Objective:
    """Of all scores alike."""
    surrogates = {f"s{s}": fit_surrogate(shares_MD, scores_MS[:, s], kind, seed=seed) for s in range(scores_MS.shape[1])}
    return Objective(space, surrogates, dict.fromkeys(surrogates, 1.0), aim=aim, seed=seed)


def chosen(goal: Objective) -> tuple[Choice, np.ndarray]:
    choice = choose_mixture(goal, candidates=4000, top=32)
    return choice, np.array([[choice.shares[name] for name in goal.space.domains]])


def gain(num: int, noise: float | None, kind: str, seed: int) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    truth = Truth(rng, 2)
    shares_MD = truth.space.shares(sample_mixtures(truth.space, num, seed))
    true_MS = truth.scores(shares_MD) if noise else np.full((num, 2), 5.0)
    spread_S = true_MS.std(axis=0) if noise else np.ones(2)
    scores_MS = true_MS + (noise or 1.0) * spread_S * rng.standard_normal((num, 2))
    goal = fitted(truth.space, shares_MD, scores_MS, kind, seed)
    choice, found_1D = chosen(goal)
    spread = optimum_distribution(goal, choice, num=50, candidates=1000)
    unit = float((true_MS if noise else scores_MS).mean(axis=1).std())
    natural_1D = truth.space.shares(truth.space.centre_D[None])
    won = float((truth.scores(natural_1D) - truth.scores(found_1D)).mean()) if noise else 0.0
    return {
        "true": won / unit,
        "predicted": choice.expected_gain[0] / unit,
        "judged": spread.expected_gain / unit,
        "probability": spread.probability_of_gain,
        "sure": float(spread.probability_of_gain >= 0.95),
    }


def cover(correlation: float, seed: int) -> dict[str, float]:
    rng, num, num_scores, noise = np.random.default_rng(seed), 32, 8, 0.5
    truth = Truth(rng, num_scores)
    shares_MD = truth.space.shares(sample_mixtures(truth.space, num, seed))
    true_MS = truth.scores(shares_MD)

    def measured(true_NS: np.ndarray) -> np.ndarray:
        shared_N1, own_NS = rng.standard_normal((len(true_NS), 1)), rng.standard_normal(true_NS.shape)
        return true_NS + noise * true_MS.std(axis=0) * (correlation**0.5 * shared_N1 + (1 - correlation) ** 0.5 * own_NS)

    choice, found_1D = chosen(fitted(truth.space, shares_MD, measured(true_MS), "ridge", seed))
    again_N = measured(np.repeat(truth.scores(found_1D), 100, axis=0)).mean(axis=1)
    return {"cover": float((np.abs(again_N - choice.objective[0]) <= _Z90 * choice.objective[1]).mean())}


def ranks(aim: Aim, seed: int) -> dict[str, float]:
    rng, num = np.random.default_rng(seed), 48
    truth = Truth(rng, 1)
    shares_MD = truth.space.shares(sample_mixtures(truth.space, num, seed))
    true_M = truth.scores(shares_MD)[:, 0]
    real_M = (true_M - true_M.mean()) / true_M.std() + 0.1 * rng.standard_normal(num)
    scores_MS = np.stack([real_M, *rng.standard_normal((3, num))], axis=1)
    choice, found_1D = chosen(fitted(truth.space, shares_MD, scores_MS, "ridge", seed, aim))
    best = truth.scores(truth.space.shares(sample_candidates(truth.space, 20_000, seed))).min()
    return {"loses": float((truth.scores(found_1D)[0, 0] - best) / true_M.std()), "std": choice.objective[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=24)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "search_honesty.json")
    options = parser.parse_args()
    rows = []

    def add(facts: dict, measure, *arguments) -> None:
        found = [measure(*arguments, seed) for seed in range(options.repeat)]
        rows.append(facts | {key: round(float(np.mean([one[key] for one in found])), 3) for key in found[0]})
        print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)

    for num, noise, kind in GAINS:
        add({"of": "gain", "proxies": num, "noise": noise or "alone", "surrogate": kind}, gain, num, noise, kind)
    for correlation in (0.0, 0.8):
        add({"of": "cover", "correlation": correlation}, cover, correlation)
    for aim in ("mean", "percentile_rank"):
        add({"of": "ranks", "aim": aim}, ranks, aim)
    command = f"OMP_NUM_THREADS=1 python benchmarks/search_honesty.py --repeat {options.repeat}"
    write_json(options.output, {"command": command, "rows": rows})


if __name__ == "__main__":
    main()
