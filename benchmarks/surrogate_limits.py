#!/usr/bin/env python3
"""What keeps a surrogate from the 1M runs' own agreement with larger ones: RegMix's training runs, and no test file.

    OMP_NUM_THREADS=1 python benchmarks/surrogate_limits.py --data DIR

Three measurements on 512 runs of 1M parameters, with the Gaussian process:
- learning: mean Spearman and error on 128 runs left out, as more and more of the others are fitted;
- by_own_share: the out-of-fold error of a domain's loss, by how much of the mixture that domain was;
- rounding: published shares have three decimals. The fitted process is taken for the truth, mixtures are drawn that round to
  the published ones, and their scores are ranked against those at the published shares: what a surrogate without any error
  would reach. RegMix's sampler makes shares below .0002 zero; from there to .0005, which is published as 0 too, they are taken
  to be as dense, by their logarithm, as those published as .001.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from surrogates import load, rank_correlation

from megatron_demix.artifact import write_json
from megatron_demix.search.surrogate import Surrogate, fit_surrogate
from megatron_demix.search.tables import Table

SIZES = (64, 128, 256, 384)
_PREDICTED = 128
_EDGES = (0.0005, 0.0105, 0.1)
_DIGIT, _LEAST = 1e-3, 2e-4
_DRAWS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "surrogate_limits.json")
    args = parser.parse_args()
    shares_MD, scores_MT, names = load(args.data, "train", "1m")
    domains = Table.read(args.data / "train_mixture_1m.csv").columns
    fitted = [fit_surrogate(shares_MD, scores_M, "gaussian_process") for scores_M in scores_MT.T]
    report: dict[str, Any] = {
        "command": "OMP_NUM_THREADS=1 python benchmarks/surrogate_limits.py --data DIR",
        "unit": "errors in standard deviations of a score; means over scores",
        "scores": names,
        "rounding": rounding(fitted, shares_MD),
        "by_own_share": by_own_share(fitted, shares_MD, names, domains),
    }
    print("rounding", report["rounding"], flush=True)
    for row in report["by_own_share"]["rows"]:
        print("own share", row)
    report["learning"] = learning(shares_MD, scores_MT)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.output, report)


def learning(shares_MD: np.ndarray, scores_MT: np.ndarray) -> list[dict[str, float]]:
    order_M = np.random.default_rng(0).permutation(len(shares_MD))
    left_out, rows = order_M[:_PREDICTED], []
    for num in SIZES:
        used = order_M[_PREDICTED : _PREDICTED + num]
        spearman, rmse = [], []
        for scores_M in scores_MT.T:
            predicted_M = fit_surrogate(shares_MD[used], scores_M[used], "gaussian_process").mean(shares_MD[left_out])
            spearman.append(rank_correlation(predicted_M, scores_M[left_out]))
            rmse.append(np.sqrt(np.mean(np.square(predicted_M - scores_M[left_out]))) / scores_M.std())
        rows.append({"runs": num, "spearman": float(np.mean(spearman)), "rmse": float(np.mean(rmse))})
        print("learning", rows[-1], flush=True)
    return rows


def by_own_share(
    fitted: list[Surrogate], shares_MD: np.ndarray, names: tuple[str, ...], domains: tuple[str, ...]
) -> dict[str, Any]:
    """Root mean square error in each band of the own share, for the losses whose domain is one of the mixture's."""
    columns = {domain.removeprefix("train_the_pile_"): d for d, domain in enumerate(domains)}
    found, used = [], []
    for surrogate, name in zip(fitted, names, strict=True):
        domain = name.removeprefix("metric/the_pile_").removesuffix("_val_loss")
        if domain not in columns:
            continue
        used.append(domain)
        errors_M = surrogate.cross_validation["predicted_M"] - surrogate.cross_validation["measured_M"]
        band_M = np.digitize(shares_MD[:, columns[domain]], _EDGES)
        squares_M = np.square(errors_M / surrogate.scores_M.std())
        found.append([(np.mean(band_M == b), np.sqrt(squares_M[band_M == b].mean())) for b in range(len(_EDGES) + 1)])
    table_TB2 = np.array(found)
    rows = [
        {"from": low, "part_of_runs": float(part), "rmse": float(error)}
        for low, (part, error) in zip((0.0, *_EDGES), np.nanmean(table_TB2, axis=0), strict=True)
    ]
    return {"domains": used, "rows": rows}


def rounding(fitted: list[Surrogate], shares_MD: np.ndarray) -> dict[str, Any]:
    """Mean Spearman over draws, and beside it what the process reached on runs its fit had not seen."""
    rng = np.random.default_rng(0)
    digits_MD = np.round(shares_MD / _DIGIT)
    # Shares published as .001 are as dense as their number over ln 3, the logarithm's width of what rounds to .001.
    density_D = (digits_MD == 1).sum(axis=0) / np.log(3)
    hidden_D = density_D * np.log(_DIGIT / 2 / _LEAST) / np.maximum((digits_MD == 0).sum(axis=0), 1)
    spearman = []
    for _ in range(_DRAWS):
        tiny_MD = np.exp(rng.uniform(np.log(_LEAST), np.log(_DIGIT / 2), shares_MD.shape))
        zero_MD = np.where(rng.uniform(size=shares_MD.shape) < hidden_D, tiny_MD, 0.0)
        near_MD = shares_MD + _DIGIT * rng.uniform(-0.5, 0.5, shares_MD.shape)
        exact_MD = np.where(digits_MD == 0, zero_MD, near_MD)
        exact_MD /= exact_MD.sum(axis=1, keepdims=True)
        spearman.append([rank_correlation(s.mean(exact_MD), s.mean(shares_MD)) for s in fitted])
    return {
        "hidden_part_of_zeros": float(hidden_D.mean()),
        "spearman": float(np.mean(spearman)),
        "by_score": np.mean(spearman, axis=0).tolist(),
        "out_of_fold": float(np.mean([s.cross_validation["spearman"] for s in fitted])),
        "out_of_fold_by_score": [s.cross_validation["spearman"] for s in fitted],
    }


if __name__ == "__main__":
    main()
