"""Whatever the bounds, a mixture that leaves the search space's hands is feasible and sums to exactly 1."""

import numpy as np
from feasible_mixtures import feasible
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_demix.errors import MixtureError
from megatron_demix.mixture import Mixture
from megatron_demix.search.sample import distinct, sample_mixtures
from megatron_demix.search.space import Group, SearchSpace
from megatron_demix.search.waterfill import waterfill

amount = st.one_of(st.just(0.0), st.floats(1e-9, 1e3))


@st.composite
def spaces(draw) -> SearchSpace | None:
    num = draw(st.integers(2, 6))
    names = [f"d{i}" for i in range(num)]
    natural = Mixture.proportional({name: draw(st.floats(1e-3, 1.0)) for name in names})
    share = draw(st.sampled_from([0.0, 0.25, 0.5, 0.9]))
    caps = {name: draw(st.floats(0.05, 1.0)) for name in names if draw(st.booleans())}
    floors = {names[0]: draw(st.floats(0.0, 0.3))} if draw(st.booleans()) else {}
    groups = {"g": Group(tuple(names[:2]), draw(st.floats(0, 0.2)), draw(st.floats(0.2, 1.0)))} if draw(st.booleans()) else {}
    kl = draw(st.one_of(st.none(), st.floats(0.05, 2.0)))
    anchor = draw(st.sampled_from([natural, Mixture.uniform(names)]))
    try:
        return SearchSpace(natural, anchor, share, caps, floors, groups, kl)
    except MixtureError:
        return None


@settings(max_examples=150, deadline=None)
@given(spaces(), st.integers(0, 2**32 - 1))
def test_samples_are_feasible_and_sum_to_exactly_1(space: SearchSpace | None, seed: int) -> None:
    if space is None:
        return
    weights_MD = sample_mixtures(space, 40, seed)
    assert feasible(space, weights_MD).all()
    assert (weights_MD >= 0).all()
    assert (weights_MD.sum(axis=1) == 1).all()
    assert (weights_MD[:, ::-1].cumsum(axis=1)[:, -1] == 1).all()
    assert (space.shares(weights_MD) <= space.bounds_D2[:, 1] + 2e-12).all()
    np.testing.assert_allclose(space.nearest(weights_MD), weights_MD, atol=1e-9)
    # Mixtures repeat only in a space that is hardly more than one point.
    assert len(distinct(weights_MD)) == 40 or np.ptp(weights_MD, axis=0).max() < 1e-3


@settings(max_examples=100, deadline=None)
@given(spaces(), st.integers(0, 2**32 - 1), st.sampled_from(["sobol", "lattice", "optimal"]))
def test_other_designs_are_feasible_and_distinct(space: SearchSpace | None, seed: int, design: str) -> None:
    if space is None:
        return
    weights_MD = sample_mixtures(space, 20, seed, design=design)  # type: ignore[arg-type]
    assert feasible(space, weights_MD).all()
    assert (weights_MD.sum(axis=1) == 1).all()
    assert len(distinct(weights_MD)) == 20 or np.ptp(weights_MD, axis=0).max() < 1e-3


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_waterfill_meets_bounds_and_total_and_keeps_free_proportions(data) -> None:
    num = data.draw(st.integers(1, 6))
    lows = np.array(data.draw(st.lists(st.integers(0, 10**6), min_size=num, max_size=num)))
    highs = lows + np.array(data.draw(st.lists(st.integers(0, 10**6), min_size=num, max_size=num)))
    total = data.draw(st.integers(int(lows.sum()), int(highs.sum())))
    amounts_D = np.array(data.draw(st.lists(amount, min_size=num, max_size=num)))
    (counts_D,) = waterfill(amounts_D[None], lows, highs, np.array([total]))
    assert counts_D.sum() == total
    assert (counts_D >= lows).all()
    assert (counts_D <= highs).all()
    free = np.flatnonzero((counts_D > lows + num) & (counts_D < highs - num) & (amounts_D > 1e-3 * amounts_D.max()))
    if len(free) > 1:
        scales = counts_D[free] / amounts_D[free]
        slack = (num + 1) / counts_D[free].min()
        assert np.ptp(scales) <= scales.max() * slack * 2
