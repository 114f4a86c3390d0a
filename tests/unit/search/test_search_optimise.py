from dataclasses import replace

import joblib
import numpy as np
import pytest
from feasible_mixtures import feasible

from megatron_demix.errors import IncompatibleInputs, MixtureError
from megatron_demix.mixture import Mixture
from megatron_demix.search import processes
from megatron_demix.search.objective import Objective, _Ranks
from megatron_demix.search.optimise import choose_mixture, pareto_front, propose
from megatron_demix.search.sample import sample_mixtures
from megatron_demix.search.space import SearchSpace
from megatron_demix.search.surrogate import Scale, Surrogate, fit_surrogate
from megatron_demix.search.uncertainty import optimum_distribution

DOMAINS = ("general", "code", "math")
NATURAL = Mixture({"general": 0.6, "code": 0.3, "math": 0.1})
OBJECTIVE = {"general": 0.1, "code": 0.6, "math": 0.3}


def losses(shares_MD: np.ndarray) -> dict[str, np.ndarray]:
    """-log of the own share: the objective's optimum is then its weights themselves."""
    return {name: 2 - 0.5 * np.log(shares_MD[:, d] + 1e-3) for d, name in enumerate(DOMAINS)}


def fitted(space: SearchSpace, num: int = 48) -> dict[str, Surrogate]:
    shares_MD = space.shares(sample_mixtures(space, num, 1))
    return {name: fit_surrogate(shares_MD, values, "gaussian_process") for name, values in losses(shares_MD).items()}


@pytest.fixture(scope="module")
def free() -> tuple[SearchSpace, dict[str, Surrogate]]:
    space = SearchSpace(NATURAL, Mixture.uniform(NATURAL), 0.1)
    return space, fitted(space)


def test_the_known_optimum_is_found(free) -> None:
    choice = choose_mixture(Objective(*free, OBJECTIVE), candidates=20_000, top=64)
    for name in DOMAINS:
        assert choice.shares[name] == pytest.approx(OBJECTIVE[name], abs=0.04)
        assert choice.shares[name] == pytest.approx(0.1 / 3 + 0.9 * choice.weights[name])
    truth = losses(np.array([list(choice.shares.values())]))
    for name, (mean, std) in choice.predicted.items():
        assert abs(truth[name][0] - mean) < 0.03
        assert 0 < std < 0.1
    gain, std = choice.expected_gain
    best, natural = (
        sum(OBJECTIVE[n] * v[0] for n, v in losses(np.array([list(m.values())])).items()) for m in (choice.shares, NATURAL)
    )
    assert gain == pytest.approx(natural - best, abs=0.02)


class Logs:
    """-sum of importances_D x log(share), which is least at these shares themselves; a refit draws other importances."""

    def __init__(self, importances_D: np.ndarray, drawn: list[np.ndarray]) -> None:
        self.importances_D, self.drawn = importances_D, drawn

    def mean(self, shares_ND: np.ndarray) -> np.ndarray:
        return -np.log(shares_ND) @ self.importances_D

    def predict(self, shares_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.mean(shares_ND), np.full(len(shares_ND), 0.1)

    def refit(self, shares_MD: np.ndarray, scores_M: np.ndarray, *, tune: bool) -> "Logs":
        other_D = self.importances_D * np.exp(np.random.default_rng(len(self.drawn)).normal(0, 0.2, len(self.importances_D)))
        self.drawn.append(other_D / other_D.sum())
        return Logs(self.drawn[-1], self.drawn)


@pytest.mark.parametrize("cap", [1.0, 0.06])
@pytest.mark.parametrize("num", [5, 24])
def test_however_many_domains_the_optimum_is_found_and_what_it_loses_on_other_proxies(num, cap) -> None:
    names = [f"d{i}" for i in range(num)]
    cap *= 24 / num
    natural = Mixture.uniform(names)
    space = SearchSpace(natural, natural, 0.1, dict.fromkeys(names, cap) if cap < 1 else {})
    importances_D = 0.2 / num + 0.8 * np.random.default_rng(1).dirichlet(np.ones(num))

    def least(logs: Logs) -> float:
        low, high = 1.0, 1e6
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if np.minimum(middle * logs.importances_D, cap).sum() < 1 else (low, middle)
        return float(logs.mean(np.minimum(low * logs.importances_D, cap)[None])[0])

    logs, measured_MD = Logs(importances_D, []), space.shares(sample_mixtures(space, 20, 1))
    surrogates = {"loss": Surrogate("logs", ((1.0, logs),), measured_MD, logs.mean(measured_MD), {}, Scale(False, 0, 1), 1.0)}
    goal = Objective(space, surrogates, {"loss": 1})
    choice = choose_mixture(goal, candidates=50_000)
    assert feasible(space, np.array([list(choice.weights.values())])).all()
    possible = logs.mean(space.shares(space.centre_D[None]))[0] - least(logs)
    assert choice.expected_gain[0] > 0.98 * possible

    spread = optimum_distribution(goal, choice, num=6, candidates=20_000)
    shares_1D = np.array([list(choice.shares.values())])
    others = [Logs(drawn_D, []) for drawn_D in logs.drawn[:6]]  # two more for the halves
    regrets_B = np.array([other.mean(shares_1D)[0] - least(other) for other in others])
    assert (spread.regrets_B <= regrets_B + 1e-9).all()
    assert spread.expected_regret > 0.8 * regrets_B.mean()


def test_caps_bind_the_choice_exactly_where_the_optimum_lies_beyond_them() -> None:
    space = SearchSpace(NATURAL, Mixture.uniform(NATURAL), 0.1, {"code": 0.35})
    choice = choose_mixture(Objective(space, fitted(space), OBJECTIVE), candidates=20_000, top=64)
    assert feasible(space, np.array([list(choice.weights.values())])).all()
    assert 0.33 < choice.shares["code"] <= 0.35 + 1e-12
    # Given the cap, the rest splits as .3 to .1.
    assert choice.shares["math"] == pytest.approx(0.65 * 0.75, abs=0.05)


def test_a_score_of_which_more_is_better_is_maximised(free) -> None:
    space, surrogates = free
    values, stds = Objective(space, surrogates, {"code": 2.0}, higher_is_better={"code"}).predict(np.eye(3))
    mean, std = surrogates["code"].predict(np.eye(3))
    np.testing.assert_allclose(values, -mean)
    np.testing.assert_allclose(stds, std)
    choice = choose_mixture(Objective(space, surrogates, {"code": 1}, higher_is_better={"code"}), candidates=5000, top=8)
    assert choice.shares["code"] < 0.1


def test_the_next_round_is_good_feasible_and_spread(free) -> None:
    space, surrogates = free
    goal = Objective(space, surrogates, OBJECTIVE, seed=4)
    weights_MD = propose(goal, num=16, candidates=20_000)
    assert weights_MD.shape == (16, 3)
    assert feasible(space, weights_MD).all()
    assert np.array_equal(weights_MD, propose(goal, num=16, candidates=20_000))
    values_M, pool_M = goal.means(space.shares(weights_MD)), goal.means(space.shares(sample_mixtures(space, 5000, 9)))
    assert values_M.max() < np.quantile(pool_M, 0.05)
    gaps = np.abs(weights_MD[:, None] - weights_MD).sum(axis=2)[np.triu_indices(16, k=1)]
    assert gaps.min() > 0.002
    # The surer the surrogates, the narrower the region worth exploring.
    unsure = {name: replace(surrogate, widen=8 * surrogate.widen) for name, surrogate in surrogates.items()}
    wider_MD = propose(Objective(space, unsure, OBJECTIVE, seed=4), num=16, candidates=20_000)
    assert np.ptp(wider_MD[:, 1]) > np.ptp(weights_MD[:, 1])


def test_what_was_measured_is_not_proposed_again(free) -> None:
    space, surrogates = free
    first_MD = propose(Objective(space, surrogates, OBJECTIVE, seed=4), num=16, candidates=20_000)
    shares_MD = surrogates["code"].shares_MD
    known_MD = np.concatenate([shares_MD, space.shares(first_MD)])
    again = {
        name: replace(s, shares_MD=known_MD, scores_M=np.append(s.scores_M, np.full(16, np.nan)))
        for name, s in surrogates.items()
    }
    second_MD = propose(Objective(space, again, OBJECTIVE, seed=4), num=16, candidates=20_000)
    assert np.abs(first_MD[:, None] - second_MD).max(axis=2).min() > 1e-6
    # Bounds that leave one mixture leave nothing else.
    third = dict.fromkeys(DOMAINS, 1 / 3)
    only = SearchSpace(NATURAL, Mixture.uniform(NATURAL), 0.1, third, third)
    measured_MD = np.concatenate([shares_MD[1:], only.shares(only.centre_D[None])])
    tight = {"code": fit_surrogate(measured_MD, losses(measured_MD)["code"], "ridge")}
    np.testing.assert_allclose(propose(Objective(only, tight, {"code": 1}), num=2, candidates=500), 1 / 3, atol=1e-6)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"law": 1}, "objective: score 'law' was not measured; the scores are general, code, math"),
        ({"code": -1}, "objective: weight of 'code' is -1, expected >= 0"),
        ({"code": 0}, "objective: all weights are 0"),
    ],
)
def test_bad_objectives_are_refused(free, objective, message) -> None:
    with pytest.raises(MixtureError, match=message):
        Objective(*free, objective)


def test_other_aims(free) -> None:
    space, surrogates = free
    goal = Objective(space, surrogates, dict.fromkeys(DOMAINS, 1), aim="worst")
    worst = choose_mixture(goal, candidates=20_000, top=16)
    pool_M = goal.means(space.shares(sample_mixtures(space, 5000, 9)))
    assert worst.objective[0] <= pool_M.min() + 0.02
    z = [
        (surrogates[name].predict(np.array([list(worst.shares.values())]))[0][0] - s.scores_M.mean()) / s.scores_M.std()
        for name, s in surrogates.items()
    ]
    assert worst.objective[0] == pytest.approx(max(z))
    ranked = choose_mixture(Objective(space, surrogates, OBJECTIVE, aim="percentile_rank"), candidates=20_000, top=16)
    assert 0 <= ranked.objective[0] < 0.5
    # A rank, unlike a mean, does not change when a score's unit does.
    squashed = dict(surrogates)
    shares_MD = surrogates["code"].shares_MD
    squashed["code"] = fit_surrogate(shares_MD, 1000 * surrogates["code"].scores_M, "gaussian_process")
    again = choose_mixture(Objective(space, squashed, OBJECTIVE, aim="percentile_rank"), candidates=20_000, top=16)
    for name in DOMAINS:
        assert again.shares[name] == pytest.approx(ranked.shares[name], abs=0.02)
    with pytest.raises(MixtureError, match="aim 'worst' compares scores as equals"):
        Objective(space, surrogates, OBJECTIVE, aim="worst")
    with pytest.raises(MixtureError, match="aim 'best' is unknown; expected one of mean, worst, percentile_rank"):
        Objective(space, surrogates, OBJECTIVE, aim="best")
    with pytest.raises(MixtureError, match="higher_is_better: score 'law' was not measured"):
        Objective(space, surrogates, OBJECTIVE, higher_is_better={"law"})


def test_ranks_tell_mixtures_apart_that_are_better_than_all_they_are_ranked_among(free) -> None:
    space, surrogates = free
    goal = Objective(space, surrogates, {"code": 1}, aim="percentile_rank")
    # Shares of code up to the most that there is, most of them beyond any random mixture's.
    code_M = np.linspace(0.0, 1 - 0.1 * 2 / 3, 400)
    shares_MD = np.stack([(1 - code_M) / 2, code_M, (1 - code_M) / 2], axis=1)
    ranks_M, losses_M = goal.means(shares_MD), surrogates["code"].mean(shares_MD)
    assert (np.diff(ranks_M[np.argsort(losses_M)]) > 0).all()
    # In another unit, the same.
    other = {"code": fit_surrogate(surrogates["code"].shares_MD, 1000 * surrogates["code"].scores_M, "gaussian_process")}
    again = Objective(space, other, {"code": 1}, aim="percentile_rank")
    np.testing.assert_allclose(again.means(shares_MD), ranks_M, atol=0.02)
    ranks = _Ranks(np.linspace(2.0, 3.0, 4096))
    np.testing.assert_allclose(ranks.of(np.array([1.5, 2.0, 2.5, 3.0, 4.0])), [-0.5, 0, 0.5, 1, 2], atol=1e-9)
    tied = _Ranks(np.repeat([1.0, 3.0], 2048))
    assert tied.of(np.array([0.0]))[0] == pytest.approx(-0.5)
    assert (_Ranks(np.ones(4096)).of(np.array([0.0, 1.0, 2.0])) == [0, 1, 1]).all()


def test_the_pareto_front_runs_from_one_scores_best_to_the_others(free) -> None:
    space, surrogates = free
    goal = Objective(space, surrogates, OBJECTIVE)
    front = pareto_front(goal, ("code", "math"), candidates=8000)
    assert 10 <= len(front.weights_MD) <= 64
    assert feasible(space, front.weights_MD).all()
    assert (np.diff(front.predicted_MT[:, 0]) > 0).all()
    assert (np.diff(front.predicted_MT[:, 1]) < 0).all()
    # Only code and math matter to these two scores, so general gets no more than the anchor's part.
    assert np.median(front.shares_MD[:, 0]) < 0.06
    pool_MT = np.stack(
        [surrogates[name].mean(space.shares(sample_mixtures(space, 2000, 5))) for name in ("code", "math")], axis=1
    )
    for point in front.predicted_MT:
        assert not (pool_MT < point - 0.02).all(axis=1).any()
    with pytest.raises(MixtureError, match="Pareto front: 1 scores given, expected at least 2"):
        pareto_front(goal, ("code",))
    with pytest.raises(MixtureError, match="Pareto front: score 'law' was not measured"):
        pareto_front(goal, ("code", "law"))


def test_noise_widens_the_optimum_and_the_regret(free) -> None:
    space, _ = free
    shares_MD, rng = space.shares(sample_mixtures(space, 40, 1)), np.random.default_rng(0)
    found = {}
    for noise in (0.002, 0.6):
        surrogates = {
            name: fit_surrogate(shares_MD, values + noise * rng.standard_normal(40), "ridge")
            for name, values in losses(shares_MD).items()
        }
        goal = Objective(space, surrogates, OBJECTIVE)
        choice = choose_mixture(goal, candidates=4000, top=16)
        found[noise] = optimum_distribution(goal, choice, num=20, candidates=2000)
    quiet, noisy = found[0.002], found[0.6]
    assert quiet.domains == DOMAINS
    assert quiet.shares["code"][0] == pytest.approx(0.6, abs=0.1)
    assert quiet.shares["code"][1] < noisy.shares["code"][1]
    assert quiet.expected_regret < noisy.expected_regret
    assert quiet.probability_of_gain == 1
    assert quiet.enough(0.05)
    assert not noisy.enough(0.05)
    mixed = {
        "code": fit_surrogate(shares_MD, losses(shares_MD)["code"], "ridge"),
        "math": fit_surrogate(shares_MD[:20], losses(shares_MD)["math"][:20], "ridge"),
    }
    with pytest.raises(IncompatibleInputs, match="different numbers of proxies"):
        optimum_distribution(Objective(space, mixed, {"code": 1, "math": 1}), choice)


def test_how_sure_the_optimum_is_does_not_depend_on_processes(free, monkeypatch) -> None:
    space, _ = free
    shares_MD, rng = space.shares(sample_mixtures(space, 40, 1)), np.random.default_rng(0)
    surrogates = {
        name: fit_surrogate(shares_MD, values + 0.1 * rng.standard_normal(40), "power_law")
        for name, values in losses(shares_MD).items()
    }
    goal = Objective(space, surrogates, OBJECTIVE)
    choice = choose_mixture(goal, candidates=1000, top=16)
    alone = optimum_distribution(goal, choice, num=20, candidates=1000)
    monkeypatch.setattr(processes, "_PAYS", 0.0)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 2)
    started, in_processes = [], processes._in_processes
    monkeypatch.setattr(processes, "_in_processes", lambda *args: started.append(args) or in_processes(*args))
    shared = optimum_distribution(goal, choice, num=20, candidates=1000)
    assert [len(jobs) for jobs, _ in started] == [18, 2]
    for name in ("shares_BD", "regrets_B", "gains_H"):
        np.testing.assert_array_equal(getattr(shared, name), getattr(alone, name))


def test_what_noise_alone_seems_to_win_is_judged_by_proxies_that_did_not_choose(free) -> None:
    space, _ = free
    predicted, judged = [], []
    for seed in range(8):
        rng, shares_MD = np.random.default_rng(seed), space.shares(sample_mixtures(space, 40, seed))
        surrogates = {name: fit_surrogate(shares_MD, 5 + rng.standard_normal(40), "ridge") for name in OBJECTIVE}
        goal = Objective(space, surrogates, OBJECTIVE)
        choice = choose_mixture(goal, candidates=2000, top=16)
        spread = optimum_distribution(goal, choice, num=20, candidates=1000)
        predicted.append(choice.expected_gain[0])
        judged.append((spread.expected_gain, spread.probability_of_gain))
    gain, probability = np.mean(judged, axis=0)
    assert gain < 0.5 * np.mean(predicted)
    assert probability < 0.8


def test_a_score_of_noise_hardly_has_ranks() -> None:
    """Next to one that follows the shares: it may not turn the choice away from what that one asks for."""
    space = SearchSpace(NATURAL, Mixture.uniform(NATURAL), 0.1)
    shares_MD, rng = space.shares(sample_mixtures(space, 48, 1)), np.random.default_rng(0)
    scores = {"code": losses(shares_MD)["code"]} | {f"noise {n}": rng.standard_normal(48) for n in range(3)}
    surrogates = {name: fit_surrogate(shares_MD, values_M, "ridge") for name, values_M in scores.items()}
    goal = Objective(space, surrogates, dict.fromkeys(scores, 1.0), aim="percentile_rank")
    choice = choose_mixture(goal, candidates=4000, top=16)
    alone = choose_mixture(Objective(space, surrogates, {"code": 1}), candidates=4000, top=16)
    assert choice.shares["code"] == pytest.approx(alone.shares["code"], abs=0.15)
    assert choice.objective[1] < 0.5, "in ranks from 0 to 1"


def test_errors_that_scores_share_do_not_average_out(free) -> None:
    space, _ = free
    shares_MD, rng = space.shares(sample_mixtures(space, 64, 1)), np.random.default_rng(0)
    stds = {}
    for shared in (0.0, 1.0):
        common_M, names = rng.standard_normal(64), [f"s{n}" for n in range(8)]
        errors = {name: 0.5 * (shared * common_M + (1 - shared) * rng.standard_normal(64)) for name in names}
        surrogates = {
            name: fit_surrogate(shares_MD, losses(shares_MD)["code"] + error_M, "ridge") for name, error_M in errors.items()
        }
        _, std_1 = Objective(space, surrogates, dict.fromkeys(names, 1)).predict(space.shares(space.centre_D[None]))
        stds[shared] = std_1[0]
    assert stds[1.0] > 2 * stds[0.0]


@pytest.mark.parametrize("aim", ["mean", "worst", "percentile_rank"])
def test_proxies_that_lack_a_score_have_no_objective_and_still_count(aim) -> None:
    """Ten of forty have the loss of math; each sample of the proxies has ten such, too."""
    space = SearchSpace(NATURAL, Mixture.uniform(NATURAL), 0.1)
    shares_MD, few_M = space.shares(sample_mixtures(space, 40, 1)), np.arange(40) >= 30
    values = losses(shares_MD)
    surrogates = {
        "code": fit_surrogate(shares_MD, values["code"], "ridge"),
        "math": fit_surrogate(shares_MD, values["math"], "ridge", measured_M=few_M),
    }
    goal = Objective(space, surrogates, {"code": 1, "math": 1}, aim=aim)
    np.testing.assert_array_equal(np.isfinite(goal.measured()), few_M)
    choice = choose_mixture(goal, candidates=2000, top=16)
    assert choice.shares["general"] < 0.1
    spread = optimum_distribution(goal, choice, num=10, candidates=1000)
    assert np.isfinite(spread.shares_BD).all()
    assert spread.shares["code"][1] > 0
