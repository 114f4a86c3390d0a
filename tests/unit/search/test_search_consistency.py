import numpy as np
import pytest
from scipy import stats

from megatron_demix.errors import ConfigError, IncompatibleInputs, MixtureError
from megatron_demix.search import agreement
from megatron_demix.search.consistency import rank_consistency
from megatron_demix.search.from_tables import parse_objective


def scores(num: int = 40, noise: float = 0.3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=num)
    return 3 + 0.1 * (truth + noise * rng.normal(size=num)), 3 + 0.1 * truth


def test_metrics_agree_with_scipy_on_the_sample_and_on_resamples_with_ties() -> None:
    proxy_M, reference_M = scores()
    proxy_M = proxy_M.round(1)
    rows = np.random.default_rng(1).integers(40, size=40)
    counts_BM = np.stack([np.ones(40), np.bincount(rows, minlength=40)])
    for b, picked in enumerate((np.arange(40), rows)):
        left, right = proxy_M[picked], reference_M[picked]
        assert agreement.spearman(proxy_M, reference_M, counts_BM)[b] == pytest.approx(stats.spearmanr(left, right).statistic)
        assert agreement.kendall(proxy_M, reference_M, counts_BM)[b] == pytest.approx(stats.kendalltau(left, right).statistic)
        best = right <= np.sort(right)[9]
        top = stats.spearmanr(left[best], right[best]).statistic
        assert agreement.top_spearman(proxy_M, reference_M, counts_BM)[b] == pytest.approx(top)
        assert agreement.recovery(proxy_M, reference_M, counts_BM)[b] == pytest.approx(np.mean(right / left))
        assert agreement.regret(proxy_M, reference_M, counts_BM)[b] == pytest.approx(
            right[left == left.min()].mean() - right.min()
        )


def test_pairwise_accuracy_counts_a_proxys_tie_one_half_and_skips_the_references_ties() -> None:
    proxy_M, reference_M = np.array([1.0, 1.0, 3.0, 0.0]), np.array([1.0, 2.0, 2.0, 3.0])
    # Pairs the references decide: 0-1 tied, 0-2 right, 0-3 wrong, 1-3 wrong, 2-3 wrong.
    assert agreement.pairwise_accuracy(proxy_M, reference_M, np.ones((1, 4)))[0] == pytest.approx(1.5 / 5)


def test_perfect_proxies_have_perfect_marks_and_no_regret() -> None:
    _, reference_M = scores()
    report = rank_consistency({"code": reference_M}, {"code": reference_M})["scores"]["code"]
    for metric in ("spearman", "kendall", "top_spearman", "pairwise_accuracy", "recovery"):
        assert report[metric] == {"value": pytest.approx(1), "low": pytest.approx(1), "high": pytest.approx(1)}
    assert report["regret"]["value"] == 0


def test_intervals_hold_the_value_and_narrow_with_more_mixtures() -> None:
    widths = []
    for num in (20, 200):
        proxy_M, reference_M = scores(num)
        report = rank_consistency({"code": proxy_M}, {"code": reference_M})["macro"]["spearman"]
        assert report["low"] < report["value"] < report["high"]
        widths.append(report["high"] - report["low"])
    assert widths[1] < widths[0] / 2


def test_direction_matters_to_regret_recovery_and_the_top() -> None:
    proxy_M, reference_M = np.array([0.2, 0.4, 0.5, 0.3]), np.array([0.4, 0.5, 0.8, 0.9])
    report = rank_consistency({"acc": proxy_M}, {"acc": reference_M}, higher_is_better={"acc"})["scores"]["acc"]
    assert report["regret"]["value"] == pytest.approx(0.9 - 0.8)
    assert report["recovery"]["value"] == pytest.approx(np.mean(proxy_M / reference_M))
    assert report["top_spearman"] == {"value": None, "low": None, "high": None}
    as_loss = rank_consistency({"acc": proxy_M}, {"acc": reference_M})["scores"]["acc"]
    assert as_loss["regret"]["value"] == 0
    assert as_loss["spearman"] == report["spearman"]


def test_objective_and_ceiling_are_reported_beside_the_scores() -> None:
    (p0, r0), (p1, r1) = scores(seed=1), scores(seed=2)
    report = rank_consistency(
        {"a": p0, "b": p1}, {"a": r0, "b": r1}, reseeded={"a": r0, "b": r1}, objective={"a": 3, "b": 1}, num_bootstraps=50
    )
    assert report["num_mixtures"] == 40
    assert report["objective"]["spearman"]["value"] == pytest.approx(
        stats.spearmanr(0.75 * p0 + 0.25 * p1, 0.75 * r0 + 0.25 * r1).statistic
    )
    assert report["macro"]["spearman"]["value"] == pytest.approx(
        np.mean([stats.spearmanr(p0, r0).statistic, stats.spearmanr(p1, r1).statistic])
    )
    assert report["macro"]["regret"]["value"] is None
    assert report["ceiling"]["macro"]["spearman"]["value"] == pytest.approx(1)


def test_a_proxy_without_noise_reaches_the_root_of_the_ceiling() -> None:
    rng = np.random.default_rng(0)
    truth_M = rng.normal(size=4000)
    first_M, second_M = (truth_M + 0.7 * rng.normal(size=4000) for _ in range(2))
    report = rank_consistency({"a": truth_M}, {"a": first_M}, reseeded={"a": second_M}, num_bootstraps=1)
    assert report["scores"]["a"]["spearman"]["value"] == pytest.approx(report["noiseless"]["scores"]["a"], abs=0.02)
    assert report["ceiling"]["macro"]["spearman"]["value"] < report["noiseless"]["macro"] - 0.1
    opposed = rank_consistency({"a": truth_M}, {"a": truth_M}, reseeded={"a": -truth_M}, num_bootstraps=1)
    assert opposed["noiseless"] == {"scores": {"a": None}, "macro": None}


@pytest.mark.parametrize(
    ("proxies", "references", "message"),
    [
        ({"a": [1, 2, 3, 4]}, {"b": [1, 2, 3, 4]}, "proxies and references have other scores: a, b on one side only"),
        ({}, {}, "none at all"),
        ({"a": [1, 2, 3]}, {"a": [1, 2, 3]}, "proxies: 3 mixtures are too few to compare ranks, expected at least 4"),
        (
            {"a": [1, 2, np.nan, 4]},
            {"a": [1, 2, 3, 4]},
            "proxies: score 'a' is missing or infinite for 1 of 4 mixtures, the first at row 2",
        ),
        ({"a": [1, 2, 3, 4]}, {"a": [1, 2, 3, np.inf]}, "references: score 'a' is missing or infinite for 1 of 4 mixtures"),
        ({"a": [1, 2, 3, 4]}, {"a": [7, 7, 7, 7]}, "references: score 'a' is 7 for every mixture: it ranks nothing"),
        ({"a": [1, 2, 3, 4]}, {"a": [1, 2, 3, 4, 5]}, "score 'a': 4 proxies against 5 references"),
    ],
)
def test_missing_or_mismatched_scores_block(proxies, references, message) -> None:
    with pytest.raises(IncompatibleInputs, match=message):
        rank_consistency(proxies, references)


def test_bad_objectives() -> None:
    table = {"a": np.array([1.0, 2, 3, 4])}
    with pytest.raises(MixtureError, match="objective: score 'b' was not measured; the scores are a"):
        rank_consistency(table, table, objective={"b": 1})
    with pytest.raises(MixtureError, match="objective: weight of 'a' is -1, expected >= 0"):
        rank_consistency(table, table, objective={"a": -1})
    with pytest.raises(MixtureError, match="objective: all weights are 0, expected at least one above 0"):
        rank_consistency(table, table, objective={"a": 0})
    assert parse_objective([]) is None
    assert parse_objective(["code=0.6", "a=b=1"]) == {"code": 0.6, "a=b": 1.0}
    for text in ("code", "code=x", "=1"):
        with pytest.raises(ConfigError, match=r"is not understood\. Write SCORE=WEIGHT"):
            parse_objective([text])
    with pytest.raises(ConfigError, match=r"objective code=1 code=2: a score has two weights. Give each one"):
        parse_objective(["code=1", "code=2"])


def test_where_scores_tie_no_metric_depends_on_the_order_of_the_rows() -> None:
    rng = np.random.default_rng(3)
    proxy_M, reference_M = rng.integers(5, size=24) / 10 + 0.1, rng.integers(6, size=24) / 10 + 0.1
    proxy_M[:4], reference_M[:4] = 0.0, [0.3, 0.5, 0.2, 0.6]
    orders = [rng.permutation(24) for _ in range(10)]
    for metric in agreement.METRICS.values():
        found = [metric(proxy_M[order], reference_M[order], np.ones((1, 24)))[0] for order in orders]
        np.testing.assert_allclose(found, found[0], equal_nan=True)
