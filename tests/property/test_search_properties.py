"""Whatever the bounds, a mixture that leaves the search space's hands is feasible and sums to exactly 1."""

import numpy as np
import pytest
from feasible_mixtures import feasible
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

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


@st.composite
def spaces_around(draw) -> tuple[SearchSpace, np.ndarray]:
    """Some merge weights, and a space whose every bound leaves them in, many of them by nothing."""
    num = draw(st.integers(2, 6))
    names = [f"d{i}" for i in range(num)]
    natural = Mixture.proportional({name: draw(st.floats(1e-3, 1.0)) for name in names})
    anchor = draw(st.sampled_from([natural, Mixture.uniform(names), Mixture.one_hot(names, names[0])]))
    free = SearchSpace(natural, anchor, draw(st.sampled_from([0.0, 0.25, 0.5, 0.9])))
    amounts_D = np.array(draw(st.lists(amount, min_size=num, max_size=num).filter(any)))
    weights_MD = free.nearest(amounts_D[None])
    shares = dict(zip(names, free.shares(weights_MD)[0].tolist(), strict=True))
    room = st.one_of(st.just(0.0), st.floats(0, 0.5))

    def highest(share: float) -> float:
        return min(1.0, share + draw(room))

    def some() -> list[str]:
        return [name for name in names if draw(st.booleans())]

    order = draw(st.permutations(names))
    first = draw(st.integers(0, num))
    second = draw(st.integers(first, num))
    members = {"g": tuple(order[:first]), "h": tuple(order[first:second])}
    sums = {label: sum(shares[name] for name in m) for label, m in members.items() if m}
    bounds = {
        "max_shares": {name: highest(shares[name]) for name in some()},
        "min_shares": {name: max(0.0, shares[name] - draw(room)) for name in some()},
        "epoch_caps": {name: highest(shares[name]) for name in some()},
        "groups": {
            label: Group(members[label], min(1.0, max(0.0, total - draw(room))), highest(total))
            for label, total in sums.items()
        },
        "max_kl": draw(st.one_of(st.none(), st.just(float(free.kl(weights_MD)[0])))),
    }
    return SearchSpace(natural, anchor, free.anchor_share, **bounds), weights_MD


@settings(max_examples=100, deadline=None)
@given(spaces_around())
def test_a_mixture_within_all_bounds_is_neither_refused_nor_moved(space_and_weights: tuple[SearchSpace, np.ndarray]) -> None:
    space, weights_MD = space_and_weights
    assert feasible(space, weights_MD).all()
    np.testing.assert_allclose(space.nearest(weights_MD), weights_MD, atol=1e-8)


@settings(max_examples=50, deadline=None)
@given(spaces_around())
def test_ranges_of_shares_are_those_of_a_linear_programme(space_and_weights: tuple[SearchSpace, np.ndarray]) -> None:
    space, _ = space_and_weights
    rows, limits = [np.ones(len(space.domains))], []
    for group in space.groups.values():
        rows.append(np.isin(space.domains, group.domains).astype(float))
        limits += [group.highest + 1e-9, 1e-9 - group.lowest]
    signed = [sign * row for row in rows[1:] for sign in (1.0, -1.0)]
    slack_D2 = space.bounds_D2 + np.array([-1e-9, 1e-9])
    for d, (low, high) in enumerate(space.ranges_D2):
        for sign, end in ((1.0, low), (-1.0, high)):
            cost_D = sign * np.eye(len(space.domains))[d]
            found = linprog(cost_D, signed or None, limits or None, [rows[0]], [1.0], slack_D2)
            assert found.success
            np.testing.assert_allclose(sign * found.fun, end, atol=1e-7)


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


@pytest.mark.filterwarnings("error")
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
