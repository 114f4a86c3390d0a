#!/usr/bin/env python3
"""How well surrogates fitted on small models rank mixtures for larger ones: RegMix's public runs.

--select compares the families by predicting training runs that a fit has not seen, and opens no test file: 64 runs predict the
other 448 (four times), 256 the other 256 (twice), and four fifths of 512 the last fifth (five times). Without it, the test:
fits each score on the first n of 512 runs of 1M parameters and predicts 256 unseen mixtures: their 60M runs by rank (mean
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
from megatron_demix.search import surrogate
from megatron_demix.search.consistency import rank_consistency
from megatron_demix.search.gaussian_process import GaussianProcess
from megatron_demix.search.regressors import REGRESSORS
from megatron_demix.search.surrogate import Scale, fit_surrogate
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
    parser.add_argument("--select", action="store_true", help="training runs only")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "surrogates.json")
    args = parser.parse_args()
    if args.select:
        select(args)
        return
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


def select(args: argparse.Namespace) -> None:
    """Every method on held-out training runs; writes <output>_select.json."""
    shares_MD, scores_MT, names = load(args.data, "train", "1m")
    with ProcessPoolExecutor(args.jobs) as pool:
        running = {
            (num, name): [pool.submit(held_out, name, shares_MD, scores_MT, *rows, names, args.seed) for rows in splits(num)]
            for num in args.sizes
            for name in SELECTED
        }
        found: dict[str, dict[str, Any]] = {}
        for (num, name), futures in running.items():
            rows = [future.result() for future in futures]
            found.setdefault(str(num), {})[name] = row = {key: float(np.mean([r[key] for r in rows])) for key in rows[0]}
            print(f"n {num:4d}  {name:28s} " + "  ".join(f"{key} {value:.4f}" for key, value in row.items()), flush=True)
    report = {
        "command": f"python benchmarks/surrogates.py --data DIR --select --sizes {' '.join(map(str, args.sizes))}",
        "measured": "held-out training runs; errors in standard deviations of a score",
        "sizes": found,
    }
    output = args.output.with_name(f"{args.output.stem}_select.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, report)


def splits(num: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(rows to fit, rows to predict) among the 512 training runs."""
    order_M = np.random.default_rng(num).permutation(512)
    if num == 512:
        return [
            (np.concatenate(parts[:k] + parts[k + 1 :]), parts[k]) for parts in [np.array_split(order_M, 5)] for k in range(5)
        ]
    parts = [order_M[k * num : (k + 1) * num] for k in range(min(4, 512 // num))]
    return [(part, np.setdiff1d(order_M, part)) for part in parts]


def held_out(method: str, shares_MD, scores_MT, fitted, predicted, names, seed) -> dict[str, float]:
    started = time.process_time()
    spearman, rmse, cover = [], [], []
    for t in range(len(names)):
        mean_M, std_M, _ = SELECTED[method](shares_MD[fitted], scores_MT[fitted, t], shares_MD[predicted], seed)
        errors_M = mean_M - scores_MT[predicted, t]
        spearman.append(rank_correlation(mean_M, scores_MT[predicted, t]))
        rmse.append(np.sqrt(np.mean(np.square(errors_M))) / scores_MT[fitted, t].std())
        cover.append(np.mean(np.abs(errors_M) <= _Z90 * std_M) if std_M is not None else np.nan)
    found = {"spearman": np.mean(spearman), "rmse": np.mean(rmse), "cover_90": np.mean(cover)}
    return {key: float(value) for key, value in found.items() if np.isfinite(value)} | {"cpu_s": time.process_time() - started}


def rank_correlation(left_M: np.ndarray, right_M: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(left_M, right_M).statistic)


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


def one_fit(shares_MD, scores_M, wanted_ND, seed):
    """The Gaussian process fitted once: without the cross-validation that widens its intervals."""
    scale = Scale.of(scores_M)
    model = GaussianProcess()
    model.fit(shares_MD, scale.to_standard(scores_M))
    return scale.to_scores(model.mean(wanted_ND)), None, "gaussian_process"


def library_process(shares_MD, scores_M, wanted_ND, seed):
    """scikit-learn's Gaussian process as it comes: the same kernel, inputs and scale, its own likelihood and optimiser."""
    import warnings

    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    scale = Scale.of(scores_M)
    left, right = shares_MD**0.3, wanted_ND**0.3
    centre, spread = left.mean(axis=0), left.std(axis=0) + 1e-9
    kernel = ConstantKernel(10.0, (1e-2, 1e4)) * Matern(np.full(left.shape[1], 3.0), (1e-1, 1e4), nu=1.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = GaussianProcessRegressor(kernel + WhiteKernel(1e-2, (1e-6, 1.0)), alpha=1e-8)
        model.fit((left - centre) / spread, scale.to_standard(scores_M))
        mean_M = model.predict((right - centre) / spread)
    return scale.to_scores(mean_M), None, "scikit-learn"


PAPER_TREES = trees(num_iterations=1000, learning_rate=0.01)
SMALL_TREES = trees(num_iterations=500, learning_rate=0.05, num_leaves=7, min_data_in_leaf=4)
METHODS: dict[str, Method] = {
    "lightgbm, 31 leaves": PAPER_TREES,
    "lightgbm, 7 leaves": SMALL_TREES,
    "ridge on logs": ridge,
    "plain stack": plain_stack,
    "scikit-learn's process": library_process,
    "our process, one fit": one_fit,
    "gaussian_process": ours("gaussian_process"),
    "power_law": ours("power_law"),
    "auto": ours("auto"),
}


def with_trees(shares_MD, scores_M, wanted_ND, seed):
    """`auto` with LightGBM among the families."""
    from unittest.mock import patch

    with patch.object(surrogate, "_candidates", lambda kind: list(REGRESSORS)):
        return ours("auto")(shares_MD, scores_M, wanted_ND, seed)


SELECTED: dict[str, Method] = {
    **{kind: ours(kind) for kind in ("gaussian_process", "power_law", "scheffe_log", "lightgbm", "stack", "auto")},
    "auto with lightgbm": with_trees,
    "scikit-learn's process": library_process,
    "our process, one fit": one_fit,
}
"""What --select compares."""


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
