import time

import numpy as np
import pytest

from megatron_demix.errors import MixtureError
from megatron_demix.mixture import Mixture
from megatron_demix.search.sample import farthest, sample_mixtures
from megatron_demix.search.space import SearchSpace

NATURAL = Mixture({"general": 0.6, "code": 0.25, "math": 0.1, "law": 0.05})
SPACE = SearchSpace(NATURAL, Mixture.uniform(NATURAL), 0.5, {"math": 0.25, "law": 0.3})


@pytest.mark.parametrize("design", ["dirichlet", "sobol", "lattice", "optimal"])
@pytest.mark.parametrize("num", [1, 5, 64])
def test_every_design_is_feasible_exact_and_reproducible(design, num) -> None:
    weights_MD = sample_mixtures(SPACE, num, 7, design=design)
    assert weights_MD.shape == (num, 4)
    assert SPACE.feasible(weights_MD).all()
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


def test_200_000_mixtures_take_seconds() -> None:
    started = time.process_time()
    weights_MD = sample_mixtures(SPACE, 200_000, 0)
    # 2 s on an idle machine; the bound leaves room for a slower, busy one.
    assert time.process_time() - started < 20
    assert SPACE.feasible(weights_MD).all()


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


def test_farthest_starts_with_the_first_row_and_spreads() -> None:
    pool_MD = np.array([[0.5, 0.5, 0.0], [0.51, 0.49, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    assert farthest(pool_MD, 3).tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    assert farthest(pool_MD, 1, chosen_MD=pool_MD[:1]).tolist() == [[0.0, 0.0, 1.0]]


def test_bad_arguments() -> None:
    with pytest.raises(MixtureError, match="asked for 0 mixtures, expected at least 1"):
        sample_mixtures(SPACE, 0, 0)
    with pytest.raises(MixtureError, match="design 'grid' is unknown; expected one of dirichlet, sobol, lattice, optimal"):
        sample_mixtures(SPACE, 4, 0, design="grid")  # type: ignore[arg-type]
