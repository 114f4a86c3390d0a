"""Which rank is behind its like. That a real slow rank is found is in tests/distributed/test_train_layouts.py."""

from megatron_demix.train.stragglers import RankTime, StepClock, slowest


def times(*seconds, places=None):
    places = places or [(0,)] * len(seconds)
    return [RankTime(i, f"node{i}", place, s) for i, (s, place) in enumerate(zip(seconds, places, strict=True))]


def test_the_slowest_is_named_with_its_ratio_to_the_median():
    found = slowest(times(1.0, 1.1, 2.2, 0.9))
    assert found
    assert (found.rank, found.host, found.ratio, found.is_notable) == (2, "node2", 2.2, True)


def test_of_two_the_faster_one_is_the_measure():
    found = slowest(times(1.0, 3.0))
    assert found
    assert (found.rank, found.ratio) == (1, 3.0)


def test_stages_are_compared_with_their_like_alone():
    """The second stage takes longer on every replica: nobody's fault."""
    found = slowest(times(1.0, 5.0, 1.2, 5.0, places=[(0,), (1,), (0,), (1,)]))
    assert found
    assert (found.rank, found.is_notable) == (2, False)


def test_without_its_like_nobody_is_slow():
    assert slowest(times(1.0, 5.0, places=[(0,), (1,)])) is None
    assert slowest(times(0.0, 0.0)) is None


def test_the_clock_forgets_what_it_has_told():
    clock = StepClock()
    clock.start()
    clock.stop()
    assert clock.mean_s() > 0
    assert clock.mean_s() == 0
