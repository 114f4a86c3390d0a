#!/usr/bin/env python3
"""What runs of an earlier study are worth when a domain was added or dropped: RegMix's public runs of 1M parameters.

Its 512 training mixtures leave each domain out of a third to a half of the runs, so one set of runs holds both sides of a
change:

- added: earlier runs have nothing of the domain, new ones some of it, and mixtures with some of it are predicted.
- dropped: earlier runs have some of the domain, new ones nothing, and mixtures without it are predicted. Earlier runs are used
  in three ways: with the domain's share as one more feature, which is 0 from now on (column, what a study does); with the other
  shares scaled up to 1 (rescaled); or only those that had at most 2 % of it (near zero).

Each row fits a surrogate on n new runs alone, or with --earlier runs besides, and predicts the runs that are left: by rank
(mean Spearman) and by error (in standard deviations of what is predicted). Means over six domains that change, and four other
domains' losses for each. No test file is opened. --data holds train_mixture_1m.csv and train_pile_loss_1m.csv, as RegMix
publishes them.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from megatron_demix.artifact import write_json
from megatron_demix.search.surrogate import fit_surrogate
from megatron_demix.search.tables import Table, as_mixtures

SIZES = (8, 16, 32, 64)
NEAR_ZERO = 0.02
_SCORES = 4
_DOMAINS = ("arxiv", "freelaw", "github", "pile_cc", "pubmed_central", "wikipedia_en")
"""The largest ones that have a score; a small domain's coming or going changes little."""
WAYS = {"added": ("new alone", "column"), "dropped": ("new alone", "column", "rescaled", "near zero")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES, help="new runs")
    parser.add_argument("--earlier", type=int, default=128, help="runs of the earlier study")
    parser.add_argument("--surrogate", default="auto")
    parser.add_argument("--jobs", type=int, default=1, help="fits side by side")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "domain_changes.json")
    args = parser.parse_args()
    shares_MD, scores_MT, domains, scores = load(args.data)
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(args.jobs) as pool:
        running = {
            (change, num, way): [
                pool.submit(predict, change, way, num, args.earlier, args.surrogate, domains.index(domain), shares_MD, scores_M)
                for k, domain in enumerate(_DOMAINS)
                for scores_M in other_scores(domain, k, scores_MT, scores)
            ]
            for change, ways in WAYS.items()
            for num in args.sizes
            for way in ways
        }
        for (change, num, way), futures in running.items():
            found = np.array([future.result() for future in futures])
            spearman, rmse, earlier = found.mean(axis=0).tolist()
            rows.append({"change": change, "new": num, "way": way, "earlier": earlier, "spearman": spearman, "rmse": rmse})
            print(
                f"{change:8s} {num:3d} new, {way:10s} {earlier:5.1f} earlier  spearman {spearman:.3f}  rmse {rmse:.3f}",
                flush=True,
            )
    sizes = " ".join(map(str, args.sizes))
    command = (
        f"python benchmarks/domain_changes.py --data DIR --sizes {sizes} --earlier {args.earlier} --surrogate {args.surrogate}"
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.output, {"command": command, "domains": _DOMAINS, "fits_a_row": len(_DOMAINS) * _SCORES, "rows": rows})


def load(folder: Path) -> tuple[np.ndarray, np.ndarray, list[str], list[str]]:
    """shares_MD, scores_MT, and the names of both without what all of them share."""
    mixtures, losses = Table.read(folder / "train_mixture_1m.csv"), Table.read(folder / "train_pile_loss_1m.csv")
    domains = [name.removeprefix("train_the_pile_") for name in mixtures.columns]
    scores = [name.removeprefix("metric/the_pile_").removesuffix("_val_loss") for name in losses.columns]
    return as_mixtures(mixtures)[0], losses.select(mixtures.ids, losses.columns, other=mixtures.path), domains, scores


def other_scores(domain: str, number: int, scores_MT: np.ndarray, scores: list[str]) -> list[np.ndarray]:
    """Losses of some other domains, others for each domain that changes."""
    others = [t for t, name in enumerate(scores) if name != domain]
    return [scores_MT[:, others[(number + 3 * i) % len(others)]] for i in range(_SCORES)]


def predict(
    change: str, way: str, num: int, num_earlier: int, kind: str, d: int, shares_MD: np.ndarray, scores_M: np.ndarray
) -> tuple[float, float, int]:
    """Spearman, error, and how many earlier runs were used."""
    from scipy.stats import spearmanr

    order_M = np.random.default_rng(d).permutation(len(shares_MD))
    has_M = shares_MD[order_M, d] > 0
    new_M, old_M = (order_M[has_M], order_M[~has_M]) if change == "added" else (order_M[~has_M], order_M[has_M])
    # What is predicted does not depend on the number of new runs.
    new, held_out, old = new_M[:num], new_M[max(SIZES) :], old_M[:num_earlier]
    features_MD = shares_MD
    if way == "new alone":
        old = old[:0]
    elif way == "near zero":
        old = old[shares_MD[old, d] <= NEAR_ZERO]
    elif way == "rescaled":
        left_MD = np.delete(shares_MD, d, axis=1)
        features_MD = left_MD / left_MD.sum(axis=1, keepdims=True)
    fitted = np.concatenate([new, old])
    predicted_M = fit_surrogate(features_MD[fitted], scores_M[fitted], kind).mean(features_MD[held_out])
    measured_M = scores_M[held_out]
    rmse = np.sqrt(np.mean(np.square(predicted_M - measured_M))) / measured_M.std()
    return float(spearmanr(predicted_M, measured_M).statistic), float(rmse), len(old)


if __name__ == "__main__":
    main()
