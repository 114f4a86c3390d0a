import numpy as np
import pytest

from megatron_demix.errors import ConfigError, IncompatibleInputs
from megatron_demix.mixture import Mixture
from megatron_demix.search import gaussian_process
from megatron_demix.search.gaussian_process import GaussianProcess
from megatron_demix.search.regressors import REGRESSORS
from megatron_demix.search.sample import sample_mixtures
from megatron_demix.search.space import SearchSpace
from megatron_demix.search.surrogate import KINDS, LITTLE_SKILL, _folds, fit_surrogate

DOMAINS = Mixture({"general": 0.5, "code": 0.3, "math": 0.2})
SPACE = SearchSpace(DOMAINS, Mixture.uniform(DOMAINS), 0.3)
FAMILIES = [kind for kind in KINDS if kind != "auto"]


def mixtures(num: int, seed: int) -> np.ndarray:
    return SPACE.shares(sample_mixtures(SPACE, num, seed))


def loss(shares_MD: np.ndarray) -> np.ndarray:
    """Like a validation loss: a power of the own share, with transfer from the first domain."""
    return 1.5 + 0.3 * (shares_MD[:, 1] + 0.2 * shares_MD[:, 0] + 0.02) ** -0.4


def test_every_family_can_be_asked_for():
    assert set(KINDS) == {"auto", "stack", *REGRESSORS}


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_ranks_unseen_mixtures(kind) -> None:
    shares_MD, held_out_MD = mixtures(60, 1), mixtures(200, 2)
    surrogate = fit_surrogate(shares_MD, loss(shares_MD) + 0.003 * np.random.default_rng(0).standard_normal(60), kind, seed=3)
    mean_M, std_M = surrogate.predict(held_out_MD)
    assert surrogate.kind == kind
    assert mean_M.shape == std_M.shape == (200,)
    assert (std_M > 0).all()
    assert np.corrcoef(mean_M, loss(held_out_MD))[0, 1] > (0.9 if kind == "lightgbm" else 0.97)
    errors = surrogate.cross_validation
    assert errors["rmse"] == pytest.approx(np.sqrt(np.mean((errors["measured_M"] - errors["predicted_M"]) ** 2)))
    assert errors["spearman"] > 0.85


def test_auto_takes_the_family_with_the_least_cross_validated_error() -> None:
    shares_MD = mixtures(48, 1)
    surrogate = fit_surrogate(shares_MD, loss(shares_MD), seed=3)
    kinds = surrogate.cross_validation["kinds"]
    assert surrogate.kind == min(kinds, key=kinds.get)
    assert {"gaussian_process", "quadratic", "ridge", "log_linear", "stack"} <= set(kinds)
    assert "lightgbm" not in kinds
    alone = [fit_surrogate(shares_MD, loss(shares_MD), kind, seed=3).cross_validation["rmse"] for kind in kinds]
    assert surrogate.cross_validation["rmse"] == pytest.approx(min(alone))


def test_skill_is_the_part_of_a_score_that_can_be_predicted() -> None:
    shares_MD, rng = mixtures(60, 1), np.random.default_rng(0)
    assert fit_surrogate(shares_MD, loss(shares_MD), "quadratic").skill > 0.9
    assert fit_surrogate(shares_MD, 3 + rng.standard_normal(60), "ridge").skill < LITTLE_SKILL


def test_a_quadratic_score_is_found_exactly_by_the_quadratic() -> None:
    shares_MD, held_out_MD = mixtures(40, 1), mixtures(50, 2)

    def score(s: np.ndarray) -> np.ndarray:
        return 2 + s[:, 0] - 3 * s[:, 1] * s[:, 2]

    mean_M, _ = fit_surrogate(shares_MD, score(shares_MD), "quadratic").predict(held_out_MD)
    np.testing.assert_allclose(mean_M, score(held_out_MD), atol=2e-3)


@pytest.mark.parametrize("kind", ["gaussian_process", "ridge"])
def test_90_percent_intervals_hold_about_90_percent_of_new_measurements(kind) -> None:
    rng, inside = np.random.default_rng(0), []
    for seed in range(4):
        shares_MD, held_out_MD = mixtures(48, 10 + seed), mixtures(150, 20 + seed)
        surrogate = fit_surrogate(shares_MD, loss(shares_MD) + 0.01 * rng.standard_normal(48), kind, seed=seed)
        mean_M, std_M = surrogate.predict(held_out_MD)
        measured_M = loss(held_out_MD) + 0.01 * rng.standard_normal(150)
        inside.append(np.mean(np.abs(measured_M - mean_M) <= 1.645 * std_M))
    assert 0.83 <= np.mean(inside) <= 0.98


def test_fits_are_reproducible_and_independent_of_the_scores_unit() -> None:
    shares_MD, held_out_MD = mixtures(40, 1), mixtures(20, 2)
    once, again = (fit_surrogate(shares_MD, loss(shares_MD), "stack", seed=5).predict(held_out_MD) for _ in range(2))
    assert np.array_equal(once[0], again[0])
    assert np.array_equal(once[1], again[1])
    scaled = fit_surrogate(shares_MD, 1e4 * loss(shares_MD) - 7, "stack", seed=5).predict(held_out_MD)
    np.testing.assert_allclose(scaled[0], 1e4 * once[0] - 7, rtol=1e-4)


def test_refit_uses_only_the_given_rows() -> None:
    shares_MD = mixtures(40, 1)
    scores_M = loss(shares_MD)
    scores_M[30:] += 5
    surrogate = fit_surrogate(shares_MD, scores_M, "ridge")
    mean_M, _ = surrogate.refit(np.arange(30)).predict(shares_MD[:30])
    np.testing.assert_allclose(mean_M, scores_M[:30], atol=0.05)


def test_a_score_that_some_proxies_lack_is_fitted_on_the_others() -> None:
    shares_MD = mixtures(40, 1)
    measured_M = np.arange(40) % 4 > 0
    scores_M = np.where(measured_M, loss(shares_MD), np.nan)
    partial = fit_surrogate(shares_MD, scores_M, "ridge", measured_M=measured_M)
    alone = fit_surrogate(shares_MD[measured_M], scores_M[measured_M], "ridge")
    np.testing.assert_array_equal(partial.mean(shares_MD), alone.mean(shares_MD))
    np.testing.assert_array_equal(partial.cross_validation["measured_M"], scores_M[measured_M])
    np.testing.assert_array_equal(np.isfinite(partial.scores_M), measured_M)
    np.testing.assert_array_equal(partial.refit(np.arange(40)).mean(shares_MD), alone.refit(np.arange(30)).mean(shares_MD))
    with pytest.raises(IncompatibleInputs, match="7 proxies are too few"):
        fit_surrogate(shares_MD, scores_M, measured_M=np.arange(40) < 7)


@pytest.mark.parametrize("kind", ["gaussian_process", "quadratic"])
def test_a_domain_that_was_dropped_is_predicted_at_none_of_it(kind) -> None:
    """Old proxies have some of a domain that helps; predictions are for mixtures without it."""
    rng = np.random.default_rng(0)
    old_MD, new_MD, wanted_MD = (rng.dirichlet(np.ones(n), m) for n, m in ((4, 60), (3, 12), (3, 100)))
    shares_MD = np.concatenate([np.pad(new_MD, ((0, 0), (0, 1))), old_MD])

    def score(s: np.ndarray) -> np.ndarray:
        return 2 - s[:, 0] + 2 * s[:, 1] * s[:, 2] - (s[:, 3] if s.shape[1] > 3 else 0)

    surrogate = fit_surrogate(shares_MD, score(shares_MD), kind, num_dropped=1)
    mean_M, std_M = surrogate.predict(wanted_MD)
    assert np.abs(mean_M - score(wanted_MD)).max() < 0.1
    assert std_M.shape == (100,)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s, y: (s[:7], y[:7]), IncompatibleInputs, "code: 7 proxies are too few for a surrogate, expected at least 8"),
        (lambda s, y: (s, np.full(20, 2.5)), IncompatibleInputs, r"code: all 20 scores are 2\.5: nothing to learn"),
        (
            lambda s, y: (s, np.where(np.arange(20) == 4, np.nan, y)),
            IncompatibleInputs,
            r"score of proxy 4 is not a finite number \(1 ",
        ),
        (lambda s, y: (np.where(s == s[3, 0], np.inf, s), y), IncompatibleInputs, "shares of proxy 3 is not a finite number"),
        (lambda s, y: (s, y[:9]), IncompatibleInputs, r"\(20, 3\) shares do not go with \(9,\) scores"),
    ],
)
def test_scores_that_teach_nothing_are_refused(change, error, message) -> None:
    shares_MD = SPACE.shares(sample_mixtures(SPACE, 20, 1, landmarks=False))
    with pytest.raises(error, match=message):
        fit_surrogate(*change(shares_MD, loss(shares_MD)), "ridge", name="code")


def test_an_unknown_kind_names_the_known_ones() -> None:
    shares_MD = mixtures(20, 1)
    with pytest.raises(ConfigError, match="surrogate kind 'forest' is unknown; expected one of auto, gaussian_process"):
        fit_surrogate(shares_MD, loss(shares_MD), "forest")


@pytest.mark.parametrize("kind", [kind for kind in REGRESSORS if kind != "lightgbm"])
def test_what_a_fold_is_predicted_by_has_not_seen_it(kind) -> None:
    shares_MD = mixtures(24, 1)
    noise_M = np.random.default_rng(0).standard_normal(24)
    seen, held_out_MD = np.arange(24) % 3 > 0, mixtures(50, 2)
    whole, alone = REGRESSORS[kind](0), REGRESSORS[kind](0)
    whole.fit(shares_MD, noise_M)
    alone.fit(shares_MD[seen], noise_M[seen])
    again = whole.refit(shares_MD[seen], noise_M[seen], tune=True)
    np.testing.assert_array_equal(again.mean(held_out_MD), alone.mean(held_out_MD))


def test_runs_of_one_mixture_are_in_one_fold() -> None:
    shares_MD = mixtures(12, 1)
    folds_M = _folds(np.repeat(shares_MD, 3, axis=0), 0)
    assert all(len(set(folds_M[3 * k : 3 * k + 3])) == 1 for k in range(12))
    np.testing.assert_array_equal(folds_M[::3], _folds(shares_MD, 0))
    assert len(set(folds_M)) == 6, "in equal parts"
    with pytest.raises(IncompatibleInputs, match="7 proxies of different mixtures are too few"):
        fit_surrogate(np.repeat(shares_MD[:7], 3, axis=0), np.arange(21.0))


def test_the_order_of_the_proxies_chooses_nothing() -> None:
    rng = np.random.default_rng(0)
    shares_MD = mixtures(24, 1)
    scores_M = loss(shares_MD) + 0.05 * rng.standard_normal(24)
    first = fit_surrogate(shares_MD, scores_M)
    for order_M in (np.arange(24)[::-1], rng.permutation(24), rng.permutation(24)):
        again = fit_surrogate(shares_MD[order_M], scores_M[order_M])
        assert again.kind == first.kind
        assert again.cross_validation["kinds"] == pytest.approx(first.cross_validation["kinds"], rel=1e-3)


def test_the_order_of_many_proxies_does_not_decide_which_of_them_tune_a_process(monkeypatch) -> None:
    """Beyond 1,024 proxies, of which these are to stand for many, nothing but some of them is seen by what finds the scales."""
    monkeypatch.setattr(gaussian_process, "_TUNED", 24)
    monkeypatch.setattr(gaussian_process, "_POLISHED", 48)
    rng = np.random.default_rng(0)
    shares_MD = np.repeat(mixtures(40, 1), 2, axis=0)
    scores_M = loss(shares_MD) + 0.05 * rng.standard_normal(80)
    scales = []
    for order_M in (np.arange(80), np.arange(80)[::-1], rng.permutation(80)):
        process = GaussianProcess()
        process.fit(shares_MD[order_M], scores_M[order_M])
        scales.append(process._model.kernel_.theta)
    np.testing.assert_allclose(scales[1:], np.broadcast_to(scales[0], (2, len(scales[0]))), rtol=1e-2)


def test_the_digits_of_a_share_that_is_fixed_are_no_distance() -> None:
    space = SearchSpace(DOMAINS, Mixture.uniform(DOMAINS), 0.0, min_shares={"math": 1 / 3}, max_shares={"math": 1 / 3})
    shares_MD = sample_mixtures(space, 24, 1)
    surrogate = fit_surrogate(shares_MD, loss(shares_MD), "gaussian_process")
    rounded_MD = shares_MD.round(4) / shares_MD.round(4).sum(axis=1, keepdims=True)
    mean_M, std_M = surrogate.predict(rounded_MD)
    assert np.sqrt(np.mean((mean_M - loss(shares_MD)) ** 2)) < 2 * surrogate.cross_validation["rmse"] + 1e-3
    assert std_M.max() < 0.1 * np.ptp(loss(shares_MD))


@pytest.mark.parametrize(("num", "domains", "seed"), [(8, 4, 6), (8, 4, 2), (12, 7, 2)])
def test_a_law_of_few_proxies_does_not_explode(num, domains, seed) -> None:
    names = [f"d{d}" for d in range(domains)]
    space = SearchSpace(Mixture.proportional({n: 1.0 + d for d, n in enumerate(names)}), Mixture.uniform(names), 0.0)
    rng = np.random.default_rng(seed)
    shares_MD, everywhere_MD = sample_mixtures(space, num, seed), sample_mixtures(space, 400, seed + 99)
    gains_D = rng.dirichlet(np.ones(domains))
    scores_M = 3 - shares_MD**0.5 @ gains_D + 0.1 * rng.standard_normal(num)
    for kind in ("log_linear", "power_law"):
        mean_N, std_N = fit_surrogate(shares_MD, scores_M, kind).predict(everywhere_MD)
        assert np.isfinite(mean_N).all()
        assert np.isfinite(std_N).all()
        assert mean_N.min() > scores_M.min() - 2.5 * np.ptp(scores_M)
        assert mean_N.max() < scores_M.max() + 2.5 * np.ptp(scores_M)


def test_a_score_that_one_proxy_alone_has_is_unsure_and_no_more() -> None:
    """A task that small models solve once. All that is known without that proxy is that nothing differs."""
    scores_M = np.zeros(16)
    scores_M[4] = 1.0
    _, std_N = fit_surrogate(mixtures(16, 1), scores_M, "auto").predict(mixtures(100, 2))
    assert std_N.max() < 2
