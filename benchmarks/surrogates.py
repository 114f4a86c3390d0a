#!/usr/bin/env python3
"""How well surrogates fitted on small models rank mixtures for larger ones: RegMix's public runs.

Fits each score on the first n of 512 runs of 1M parameters and predicts 256 unseen mixtures: their 60M runs by rank (mean
Spearman over scores), and their 1M runs by rank and by how many of them lie within the 90 % interval. The test runs choose
nothing: `auto` and the stacks see the training runs only. --data holds, as RegMix publishes them, {train,test}_mixture_1m.csv,
{train,test}_pile_loss_1m.csv, test_mixture_60m.csv and test_pile_loss_60m.csv.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from megatron_demix.artifact import write_json
from megatron_demix.search.consistency import rank_consistency
from megatron_demix.search.surrogate import fit_surrogate
from megatron_demix.search.tables import Table, as_mixtures

SIZES = (64, 256, 512)
_FOLDS = 5
_Z90 = 1.645


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="fits side by side")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "surrogates.json")
    args = parser.parse_args()
    train, small, large = (load(args.data, *names) for names in (("train", "1m"), ("test", "1m"), ("test", "60m")))
    report: dict[str, Any] = {
        "command": f"python benchmarks/surrogates.py --data DIR --sizes {' '.join(map(str, args.sizes))} --seed {args.seed}",
        "scores": list(train[2]),
        "ceiling": agreement(small[1], large[1], train[2]),
        "sizes": {},
    }
    with ProcessPoolExecutor(args.jobs) as pool:
        # The slowest first.
        running = {
            (num, name): pool.submit(run, name, train[0][:num], train[1][:num], small, large, train[2], args.seed)
            for num in sorted(args.sizes, reverse=True)
            for name in reversed(METHODS)
        }
        for num in args.sizes:
            report["sizes"][str(num)] = {name: running[num, name].result() for name in METHODS}
            for name in METHODS:
                print_row(num, name, report["sizes"][str(num)][name])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.output, report)
    plot(report, args.output.with_suffix(".png"))


def print_row(num: int, name: str, row: dict[str, Any]) -> None:
    large = "{value:.4f} [{low:.4f}, {high:.4f}]".format(**row["to_60m"])
    cover = f"{row['cover_90']:.3f}" if "cover_90" in row else "-"
    print(
        f"n {num:4d}  {name:20s} to 60M {large}  to 1M {row['to_1m']['value']:.4f}  cover {cover:5s}  {row['cpu_s']:.1f} CPU s",
        flush=True,
    )


def load(folder: Path, split: str, size: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """shares_MD, scores_MT and the scores' names, rows joined by id."""
    mixtures, scores = Table.read(folder / f"{split}_mixture_{size}.csv"), Table.read(folder / f"{split}_pile_loss_{size}.csv")
    return as_mixtures(mixtures)[0], scores.select(mixtures.ids, scores.columns, other=mixtures.path), scores.columns


def agreement(predicted_MT: np.ndarray, measured_MT: np.ndarray, names: tuple[str, ...]) -> dict[str, Any]:
    """Mean Spearman over the scores with its bootstrap interval, and each score's own."""
    left, right = ({name: table[:, t] for t, name in enumerate(names)} for table in (predicted_MT, measured_MT))
    found = rank_consistency(left, right, num_bootstraps=300)
    return found["macro"]["spearman"] | {"by_score": {name: found["scores"][name]["spearman"]["value"] for name in names}}


Method = Callable[[np.ndarray, np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray | None, str]]


def run(method: str, shares_MD, scores_MT, small, large, names, seed) -> dict[str, Any]:
    started = time.process_time()
    # Both test sets hold the same mixtures.
    fits = [METHODS[method](shares_MD, scores_MT[:, t], small[0], seed) for t in range(len(names))]
    seconds = time.process_time() - started
    mean_MT = np.stack([mean_M for mean_M, _, _ in fits], axis=1)
    row = {"to_60m": agreement(mean_MT, large[1], names), "to_1m": agreement(mean_MT, small[1], names)}
    row["cpu_s"] = round(seconds, 2)
    row["kinds"] = [kind for _, _, kind in fits]
    stds = [std_M for _, std_M, _ in fits if std_M is not None]
    if stds:
        inside_MT = np.abs(mean_MT - small[1]) <= _Z90 * np.stack(stds, axis=1)
        row["cover_90"] = float(inside_MT.mean())
        row["cover_90_by_score"] = inside_MT.mean(axis=0).tolist()
    return row


def ours(kind: str) -> Method:
    def method(shares_MD, scores_M, wanted_ND, seed):
        surrogate = fit_surrogate(shares_MD, scores_M, kind, seed=seed)
        return (*surrogate.predict(wanted_ND), surrogate.kind)

    return method


def trees(**settings) -> Method:
    def method(shares_MD, scores_M, wanted_ND, seed):
        import lightgbm

        fixed = {"objective": "l2", "verbose": -1, "num_threads": 1, "seed": seed, "deterministic": True}
        rounds = settings["num_iterations"]
        model = lightgbm.train(fixed | settings, lightgbm.Dataset(shares_MD, scores_M), num_boost_round=rounds)
        return np.asarray(model.predict(wanted_ND)), None, "lightgbm"

    return method


def ridge(shares_MD, scores_M, wanted_ND, seed):
    from sklearn.linear_model import RidgeCV

    left, right = (np.concatenate([x, np.log(x + 1e-3)], axis=1) for x in (shares_MD, wanted_ND))
    return RidgeCV(np.logspace(-5, 3, 17)).fit(left, scores_M).predict(right), None, "ridge"


def plain_stack(shares_MD, scores_M, wanted_ND, seed):
    """Non-negative least squares over the three yardsticks' out-of-fold predictions."""
    from scipy.optimize import nnls

    parts = [PAPER_TREES, SMALL_TREES, ridge]
    folds_M = np.random.default_rng(seed).permutation(len(scores_M)) % _FOLDS
    out_MK = np.empty((len(scores_M), len(parts)))
    for fold in range(_FOLDS):
        held_M = folds_M == fold
        for k, part in enumerate(parts):
            out_MK[held_M, k] = part(shares_MD[~held_M], scores_M[~held_M], shares_MD[held_M], seed)[0]
    weights_K, _ = nnls(out_MK, scores_M)
    return np.stack([part(shares_MD, scores_M, wanted_ND, seed)[0] for part in parts], axis=1) @ weights_K, None, "stack"


PAPER_TREES = trees(num_iterations=1000, learning_rate=0.01)
SMALL_TREES = trees(num_iterations=500, learning_rate=0.05, num_leaves=7, min_data_in_leaf=4)
METHODS: dict[str, Method] = {
    "lightgbm, 31 leaves": PAPER_TREES,
    "lightgbm, 7 leaves": SMALL_TREES,
    "ridge on logs": ridge,
    "plain stack": plain_stack,
    "gaussian_process": ours("gaussian_process"),
    "power_law": ours("power_law"),
    "auto": ours("auto"),
}


def plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = list(report["sizes"])
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for name in METHODS:
        rows = [report["sizes"][size][name]["to_60m"] for size in sizes]
        style = {"linewidth": 2.5, "color": "black", "zorder": 3} if name == "auto" else {"linewidth": 1.2}
        axes.plot(sizes, [row["value"] for row in rows], marker="o", label=name, **style)
        if name == "auto":
            axes.fill_between(sizes, [row["low"] for row in rows], [row["high"] for row in rows], color="black", alpha=0.1)
    axes.axhline(report["ceiling"]["value"], linestyle="--", color="grey", label="the 1M runs themselves")
    axes.set_ylim(0.93, 1.0)
    axes.set_xlabel("1M-parameter runs the surrogate was fitted on")
    axes.set_ylabel("mean Spearman to the 60M runs")
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
