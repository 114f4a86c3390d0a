"""The measures of surrogate_limits.py, where their values are known."""

from pathlib import Path

import numpy as np
import pytest

from megatron_demix.search.surrogate import fit_surrogate

ROOT = Path(__file__).parents[3]
RNG = np.random.default_rng(0)
SHARES_MD = np.round(RNG.dirichlet([0.3, 0.5, 1.0], size=60), 3)


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import surrogate_limits

    return surrogate_limits


def test_the_bands_of_own_shares_hold_the_whole_error(benchmark):
    noise_M = np.where(SHARES_MD[:, 0] < 0.0005, 0.3, 0.01) * RNG.standard_normal(60)
    fitted = fit_surrogate(SHARES_MD, SHARES_MD[:, 0] + noise_M, "ridge")
    found = benchmark.by_own_share(
        [fitted, fitted],
        SHARES_MD,
        ("metric/the_pile_code_val_loss", "metric/the_pile_unseen_val_loss"),
        ("train_the_pile_code", "train_the_pile_math", "train_the_pile_prose"),
    )
    assert found["domains"] == ["code"]
    assert sum(row["part_of_runs"] for row in found["rows"]) == pytest.approx(1)
    whole = sum(row["part_of_runs"] * row["rmse"] ** 2 for row in found["rows"] if row["part_of_runs"])
    assert whole == pytest.approx((fitted.cross_validation["rmse"] / fitted.scores_M.std()) ** 2)
    assert found["rows"][0]["rmse"] == max(row["rmse"] for row in found["rows"])


def test_rounding_costs_ranks_where_a_score_is_steep_at_zero(benchmark):
    smooth, steep = (
        fit_surrogate(SHARES_MD, scores_M, "ridge") for scores_M in (SHARES_MD[:, 2], np.log(SHARES_MD[:, 0] + 1e-3))
    )
    found = benchmark.rounding([smooth, steep], SHARES_MD)
    assert 0 < found["hidden_part_of_zeros"] < 1
    assert found["by_score"][0] > 0.9999
    assert found["by_score"][1] < found["by_score"][0]
    assert found["spearman"] == pytest.approx(np.mean(found["by_score"]))
    assert found["out_of_fold_by_score"] == [smooth.cross_validation["spearman"], steep.cross_validation["spearman"]]
