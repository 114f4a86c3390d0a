import numpy as np
import pytest

from megatron_demix.errors import MixtureError
from megatron_demix.mixture import Mixture
from megatron_demix.search.optimise import choose_mixture, objective_values, propose
from megatron_demix.search.sample import sample_mixtures
from megatron_demix.search.space import SearchSpace
from megatron_demix.search.surrogate import Surrogate, fit_surrogate

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
    space, surrogates = free
    choice = choose_mixture(space, surrogates, OBJECTIVE, candidates=20_000, top=64)
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


def test_caps_bind_the_choice_exactly_where_the_optimum_lies_beyond_them() -> None:
    space = SearchSpace(NATURAL, Mixture.uniform(NATURAL), 0.1, {"code": 0.35})
    choice = choose_mixture(space, fitted(space), OBJECTIVE, candidates=20_000, top=64)
    assert space.feasible(np.array([list(choice.weights.values())])).all()
    assert 0.33 < choice.shares["code"] <= 0.35 + 1e-12
    # Given the cap, the rest splits as .3 to .1.
    assert choice.shares["math"] == pytest.approx(0.65 * 0.75, abs=0.05)


def test_a_score_of_which_more_is_better_is_maximised(free) -> None:
    space, surrogates = free
    values, stds = objective_values(np.eye(3), surrogates, {"code": 2.0}, higher_is_better={"code"})
    mean, std = surrogates["code"].predict(np.eye(3))
    np.testing.assert_allclose(values, -mean)
    np.testing.assert_allclose(stds, std)
    choice = choose_mixture(space, surrogates, {"code": 1}, candidates=5000, top=8, higher_is_better={"code"})
    assert choice.shares["code"] < 0.1


def test_the_next_round_is_good_feasible_and_spread(free) -> None:
    space, surrogates = free
    weights_MD = propose(space, surrogates, OBJECTIVE, num=16, candidates=20_000, seed=4)
    assert weights_MD.shape == (16, 3)
    assert space.feasible(weights_MD).all()
    assert np.array_equal(weights_MD, propose(space, surrogates, OBJECTIVE, num=16, candidates=20_000, seed=4))
    values_M, _ = objective_values(space.shares(weights_MD), surrogates, OBJECTIVE)
    pool_M, _ = objective_values(space.shares(sample_mixtures(space, 5000, 9)), surrogates, OBJECTIVE)
    assert values_M.max() < np.quantile(pool_M, 0.05)
    gaps = np.abs(weights_MD[:, None] - weights_MD).sum(axis=2)[np.triu_indices(16, k=1)]
    assert gaps.min() > 0.01


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
        choose_mixture(*free, objective)
