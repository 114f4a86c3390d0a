import time

import numpy as np
import pytest
from feasible_mixtures import feasible

from megatron_demix.errors import MixtureError
from megatron_demix.mixture import Mixture
from megatron_demix.search.linear import Features
from megatron_demix.search.sample import _i_optimal, distinct, farthest, sample_candidates, sample_mixtures
from megatron_demix.search.space import Group, SearchSpace
from megatron_demix.search.walk import walk_inside

NATURAL = Mixture({"general": 0.6, "code": 0.25, "math": 0.1, "law": 0.05})
SPACE = SearchSpace(NATURAL, Mixture.uniform(NATURAL), 0.5, {"math": 0.25, "law": 0.3})


@pytest.mark.parametrize("design", ["dirichlet", "sobol", "lattice", "optimal"])
@pytest.mark.parametrize("num", [1, 5, 64])
def test_every_design_is_feasible_exact_and_reproducible(design, num) -> None:
    weights_MD = sample_mixtures(SPACE, num, 7, design=design)
    assert weights_MD.shape == (num, 4)
    assert feasible(SPACE, weights_MD).all()
    assert (weights_MD.sum(axis=1) == 1).all()
    assert (SPACE.shares(weights_MD) <= SPACE.bounds_D2[:, 1] + 1e-15).all()
    assert np.array_equal(weights_MD, sample_mixtures(SPACE, num, 7, design=design))
    if design != "lattice":
        assert not np.array_equal(weights_MD[-1], sample_mixtures(SPACE, num, 8, design=design)[-1])


def test_landmarks_are_centroid_natural_and_corners_as_far_as_caps_allow() -> None:
    weights_MD = sample_mixtures(SPACE, 12, 0)
    np.testing.assert_allclose(weights_MD[0], 0.25, atol=1e-11)
    np.testing.assert_allclose(weights_MD[1], list(NATURAL.values()), atol=1e-11)
    np.testing.assert_allclose(weights_MD[2], [1, 0, 0, 0], atol=1e-11)
    # The cap of .25 on math's share is a weight of .25 at b = .5 and a uniform anchor.
    assert weights_MD[4][2] == pytest.approx(0.25)
    assert not np.allclose(sample_mixtures(SPACE, 12, 0, landmarks=False)[0], 0.25)
    assert not np.allclose(sample_mixtures(SPACE, 11, 0)[0], 0.25)


def test_small_weights_are_zero_and_the_mean_follows_the_natural_shares() -> None:
    space = SearchSpace(NATURAL, NATURAL, 0.0)
    weights_MD = sample_mixtures(space, 20_000, 0, landmarks=False)
    assert not ((weights_MD > 0) & (weights_MD < 1.9e-4)).any()
    assert (weights_MD == 0).any()
    tempered = np.array(list(NATURAL.values())) ** 0.7
    np.testing.assert_allclose(weights_MD.mean(axis=0), tempered / tempered.sum(), atol=0.01)


def test_200_000_candidates_take_seconds() -> None:
    started = time.process_time()
    weights_MD = sample_candidates(SPACE, 200_000, 0)
    # 2 s on an idle machine; the bound leaves room for a slower, busy one.
    assert time.process_time() - started < 20
    assert feasible(SPACE, weights_MD).all()


def test_designs_spread_better_than_random_draws() -> None:
    space = SearchSpace(Mixture.uniform("abcde"), Mixture.uniform("abcde"), 0.0)

    def mean_variance(weights_MD: np.ndarray) -> float:
        left, right = np.triu_indices(5, k=1)
        features = [np.concatenate([w, w[:, left] * w[:, right]], axis=1) for w in (weights_MD, pool_MD)]
        inverse = np.linalg.inv(features[0].T @ features[0] + 1e-9 * np.eye(15))
        return float(np.einsum("nf,fg,ng->n", features[1], inverse, features[1]).mean())

    pool_MD = sample_mixtures(space, 2000, 99, landmarks=False)
    drawn = [mean_variance(sample_mixtures(space, 40, seed, landmarks=False)) for seed in range(5)]
    designed = mean_variance(sample_mixtures(space, 40, 0, design="optimal", landmarks=False))
    assert designed < 0.7 * min(drawn)


def test_an_optimal_design_is_the_greedy_one() -> None:
    """Against the inverse made anew for each row that might be picked."""
    features, rng = Features(pairs=True), np.random.default_rng(0)
    pool_MD, first_MD = rng.dirichlet(np.ones(5), 60), rng.dirichlet(np.ones(5), 3)
    pool_MF = features(pool_MD)
    moment_FF = pool_MF.T @ pool_MF / len(pool_MF)
    left, expected = list(range(60)), []
    for _ in range(25):

        def mean_variance(row: int) -> float:
            rows_NF = np.concatenate([features(first_MD), pool_MF[[*expected, row]]])
            precision_FF = rows_NF.T @ rows_NF + 1e-3 * moment_FF + 1e-9 * np.eye(len(moment_FF))
            return float(np.trace(np.linalg.solve(precision_FF, moment_FF)))

        expected.append(min(left, key=mean_variance))
        left.remove(expected[-1])
    np.testing.assert_array_equal(_i_optimal(pool_MD, first_MD, 25), pool_MD[expected])


def test_an_optimal_design_of_very_many_domains_is_refused() -> None:
    natural = Mixture.uniform([f"d{i}" for i in range(101)])
    with pytest.raises(MixtureError, match=r"every pair of the 101 domains, and may do so for 100 at most\. Choose dirichlet"):
        sample_mixtures(SearchSpace(natural, natural, 0.5), 8, 0, design="optimal")


def test_farthest_starts_with_the_first_row_and_spreads() -> None:
    pool_MD = np.array([[0.5, 0.5, 0.0], [0.51, 0.49, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    assert farthest(pool_MD, 3).tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    assert farthest(pool_MD, 1, chosen_MD=pool_MD[:1]).tolist() == [[0.0, 0.0, 1.0]]
    assert len(farthest(np.repeat(pool_MD, 2, axis=0), 9)) == 4, "each once"


def test_bad_arguments() -> None:
    with pytest.raises(MixtureError, match="asked for 0 mixtures, expected at least 1"):
        sample_mixtures(SPACE, 0, 0)
    with pytest.raises(MixtureError, match="design 'grid' is unknown; expected one of dirichlet, sobol, lattice, optimal"):
        sample_mixtures(SPACE, 4, 0, design="grid")  # type: ignore[arg-type]


def bounded_spaces() -> dict[str, SearchSpace]:
    def space(num: int, share: float, **bounds) -> SearchSpace:
        natural = Mixture.proportional({f"d{i}": 1 / (i + 1) for i in range(num)})
        return SearchSpace(natural, Mixture.uniform(natural), share, **bounds)

    def box(num: int, low: float, high: float) -> dict:
        names = [f"d{i}" for i in range(num)]
        return {"min_shares": dict.fromkeys(names, low), "max_shares": dict.fromkeys(names, high)}

    groups = {"g": Group(("d0", "d1"), 0.3, 0.35), "h": Group(("d2", "d3"), 0.2, 0.3)}
    return {
        "two domains": space(2, 0.0, min_shares={"d0": 0.4}, max_shares={"d0": 0.5}),
        "two caps": space(3, 0.0, max_shares={"d0": 0.4, "d1": 0.4}),
        "an anchor": space(4, 0.3, **box(4, 0.2, 0.3)),
        "a fixed share": space(4, 0.0, min_shares={"d0": 0.5}, max_shares={"d0": 0.5, "d1": 0.3}),
        "groups and a leash": space(6, 0.2, groups=groups, max_kl=0.5),
        "a short leash": space(5, 0.0, max_kl=0.02),
        "17 domains": space(17, 0.0, **box(17, 0.03, 0.08)),
    }


@pytest.mark.parametrize("design", ["dirichlet", "sobol", "lattice", "optimal"])
@pytest.mark.parametrize("bounds", bounded_spaces())
def test_no_mixture_is_scored_twice_however_tight_the_bounds(design, bounds) -> None:
    space = bounded_spaces()[bounds]
    weights_MD = sample_mixtures(space, 40, 3, design=design)
    assert feasible(space, weights_MD).all()
    assert (weights_MD.sum(axis=1) == 1).all()
    gaps = np.abs(weights_MD[:, None] - weights_MD).max(axis=2)[np.triu_indices(40, k=1)]
    assert gaps.min() > 5e-7
    assert np.array_equal(weights_MD, sample_mixtures(space, 40, 3, design=design))


@pytest.mark.parametrize("design", ["dirichlet", "sobol", "lattice", "optimal"])
def test_a_space_without_bounds_repeats_nothing_either(design) -> None:
    for num_domains in (2, 3, 5):
        natural = Mixture.uniform([f"d{i}" for i in range(num_domains)])
        weights_MD = sample_mixtures(SearchSpace(natural, natural, 0.5), 64, 3, design=design)
        assert len(distinct(weights_MD)) == 64


def test_sobol_draws_inside_the_bounds_and_not_on_them() -> None:
    """Uniform over a box: each share is spread over its whole range, and most mixtures touch no bound."""
    space = bounded_spaces()["17 domains"]
    shares_MD = space.shares(sample_mixtures(space, 400, 0, design="sobol", landmarks=False))
    touches_MD = (shares_MD < 0.03 + 1e-6) | (shares_MD > 0.08 - 1e-6)
    assert touches_MD.mean() < 0.02
    assert (np.quantile(shares_MD, 0.9, axis=0) - np.quantile(shares_MD, 0.1, axis=0) > 0.02).all()


def test_a_walk_is_uniform_over_the_feasible_space() -> None:
    # A triangle cut by two caps and a group: the parts of its area against exact ones, from the simplex by rejection.
    space = SearchSpace(
        Mixture.uniform("abc"), Mixture.uniform("abc"), 0.0, {"a": 0.5, "c": 0.6}, {}, {"g": Group(("a", "b"), 0.5, 0.8)}
    )
    walked_MD = walk_inside(space, 20_000, np.random.default_rng(0))
    assert feasible(space, walked_MD).all()
    drawn_MD = np.random.default_rng(1).dirichlet(np.ones(3), size=200_000)
    drawn_MD = drawn_MD[feasible(space, drawn_MD)]
    for d in range(3):
        np.testing.assert_allclose(
            np.quantile(walked_MD[:, d], np.linspace(0.05, 0.95, 10)),
            np.quantile(drawn_MD[:, d], np.linspace(0.05, 0.95, 10)),
            atol=0.01,
        )
    leash = SearchSpace(Mixture.uniform("abc"), Mixture.uniform("abc"), 0.0, max_kl=0.1)
    drawn_MD = np.random.default_rng(1).dirichlet(np.ones(3), size=200_000)
    drawn_MD = drawn_MD[feasible(leash, drawn_MD)]
    walked_MD = walk_inside(leash, 20_000, np.random.default_rng(0))
    np.testing.assert_allclose(leash.kl(walked_MD).mean(), leash.kl(drawn_MD).mean(), rtol=0.03)


def test_a_space_of_one_mixture_repeats_it() -> None:
    thirds = dict.fromkeys("abc", 1 / 3)
    space = SearchSpace(Mixture.uniform("abc"), Mixture.uniform("abc"), 0.0, thirds)
    for design in ("dirichlet", "sobol", "lattice", "optimal"):
        weights_MD = sample_mixtures(space, 12, 0, design=design)
        np.testing.assert_allclose(weights_MD, 1 / 3, atol=1e-11)
        assert len(distinct(weights_MD)) == 1
