"""What holds for every pool, mixture, target and seed."""

import math
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from indexed_data import make_pool

from megatron_demix import native
from megatron_demix.data import blend_data
from megatron_demix.data.blend import build_blend, plan_blend
from megatron_demix.data.pool import Domain, OpenPool, Source
from megatron_demix.data.quota import fitting_target, quotas
from megatron_demix.data.verify import verify_blend
from megatron_demix.errors import MixtureError
from megatron_demix.indexed.reader import Index, IndexedReader
from megatron_demix.indexed.writer import IndexedWriter
from megatron_demix.mixture import Mixture


def domain(name: str, lengths: list[list[int]], max_epochs: float, base: int) -> Domain:
    indexes, bases = [], []
    for part in lengths:
        array = np.array(part, np.int32)
        pointers = 2 * (np.cumsum(array, dtype=np.int64) - array)
        indexes.append(
            Index(
                f"{name}",
                np.dtype("<u2"),
                array,
                pointers,
                np.arange(len(part) + 1),
                int(array.sum()),
                2 * int(array.sum()),
                False,
            )
        )
        bases.append(base)
        base += indexes[-1].bin_bytes
    return Domain(name, max_epochs, tuple(indexes), tuple(bases))


@st.composite
def pools(draw, most_domains=5):
    domains, base = {}, 0
    for n in range(draw(st.integers(1, most_domains))):
        parts = draw(st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=40), min_size=1, max_size=3))
        d = domain(f"d{n}", parts, draw(st.sampled_from([1.0, 1.5, 2.0, 4.0])), base)
        domains[d.name] = d
        base += sum(i.bin_bytes for i in d.indexes)
    return OpenPool(domains, np.dtype("<u2"), "")


@st.composite
def problems(draw):
    pool = draw(pools())
    weights = draw(st.lists(st.integers(0, 10), min_size=len(pool.domains), max_size=len(pool.domains)).filter(any))
    mixture = Mixture.proportional(dict(zip(pool.domains, weights, strict=True)))
    # Also what the domains hold to the token, and one more.
    most = [sum(pool.domains[n].most_tokens for n in pool.domains if mixture[n] > 0), fitting_target(pool.domains, mixture)]
    edges = [target for m in most for target in (m, m + 1) if 1 <= target <= 4000]
    return pool, mixture, draw(st.integers(1, 4000) | st.sampled_from(edges or [1])), draw(st.integers(0, 2**32))


def order(plan, threads=1):
    documents = plan.order()
    pieces = [(p.lengths, p.pointers, p.owners) for _, p in documents.pieces(threads)]
    return *(np.concatenate(arrays) for arrays in zip(*pieces, strict=True)), documents.drift


@settings(max_examples=120, deadline=None)
@given(problems())
def test_plan_is_exact(problem):
    pool, mixture, target, seed = problem
    try:
        plan = plan_blend(pool, mixture, target, seed=seed)
    except MixtureError:
        limits = {n: d.most_tokens for n, d in pool.domains.items()}
        assert any(math.ceil(mixture[n] * target) > limits[n] for n in pool.domains)
        return
    assert sum(quotas(pool.domains, mixture, target, "error").values()) == target
    lengths, pointers, owners, _ = order(plan)
    longest = int(lengths.max(initial=0))
    assert target <= plan.tokens == lengths.sum() < target + longest
    for number, part in enumerate(plan.parts):
        mine = owners == number
        assert (mine.sum(), lengths[mine].sum()) == (part.documents, part.tokens)
        assert abs(part.tokens - part.planned) < max(int(i.lengths.max()) for i in part.domain.indexes)
        times = np.unique(pointers[mine], return_counts=True)[1]
        assert times.max() <= math.ceil(part.domain.max_epochs)
        # No document twice before all once: every whole epoch of the stream is a permutation of the domain.
        n = part.domain.documents
        stream = pointers[mine]
        for start in range(0, len(stream), n):
            epoch = stream[start : start + n]
            assert len(set(epoch.tolist())) == len(epoch)


@settings(max_examples=120, deadline=None)
@given(problems())
def test_every_prefix_is_even(problem):
    """In every prefix every domain is within one longest document of its share, so in every window within two."""
    pool, mixture, target, seed = problem
    try:
        plan = plan_blend(pool, mixture, target, seed=seed)
    except MixtureError:
        return
    lengths, _, owners, drift = order(plan)
    longest, total = int(lengths.max()), int(lengths.sum())
    ends = np.cumsum(lengths)
    for number, part in enumerate(plan.parts):
        mine = np.cumsum(np.where(owners == number, lengths, 0))
        off = mine - ends * (part.tokens / total)
        assert np.abs(off).max() <= longest + 1e-6
        ahead, behind = drift[number]
        assert off.max() <= ahead + 1e-6 <= longest + 2
        assert -off.min() <= behind + 1e-6 <= longest + 2


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(2, 5))
def test_same_seed_same_order_whatever_the_threads(problem, threads):
    pool, mixture, target, seed = problem
    plan = plan_blend(pool, mixture, target, seed=seed, on_shortfall="cap")
    again = plan_blend(pool, mixture, target, seed=seed, on_shortfall="cap", threads=threads)
    for a, b in zip(order(plan)[:3], order(again, threads)[:3], strict=True):
        assert np.array_equal(a, b)


@settings(max_examples=100, deadline=None)
@given(problems(), st.data())
def test_the_target_that_is_said_to_fit_does_and_no_larger_one(problem, data):
    """Also where earlier stages have used a part."""
    pool, mixture, _, _ = problem
    taken = {n: data.draw(st.integers(0, d.most_tokens)) for n, d in pool.domains.items() if data.draw(st.booleans())}
    fits = fitting_target(pool.domains, mixture, taken)
    if fits:
        planned = quotas(pool.domains, mixture, fits, "error", taken=taken)
        assert all(planned[n] + taken.get(n, 0) <= pool.domains[n].most_tokens for n in planned)
    # By so much that the share of the domain that limits it grows by more than the token that rounding may take away.
    larger = fits + math.ceil(2 / min(share for share in mixture.values() if share > 0))
    with pytest.raises(MixtureError, match=f"a target of at most {fits:,} tokens"):
        quotas(pool.domains, mixture, larger, "error", taken=taken)


@pytest.mark.parametrize(("share", "target"), [(0.1, 1000), (0.3, 333), (0.7, 142), (1.0, 100)])
def test_the_target_that_fits_is_that_of_shares_as_they_are_written(share, target):
    """100 tokens of a domain, in decimal shares that binary numbers miss by a little."""
    domains = {"a": domain("a", [[100]], 1.0, 0), "b": domain("b", [[1000]], 1.0, 200)}
    mixture = Mixture({"a": share, "b": 1 - share})
    assert fitting_target(domains, mixture) == target
    assert quotas(domains, mixture, target, "error")["a"] <= 100


@settings(max_examples=100, deadline=None)
@given(problems())
def test_redistribution_keeps_the_total_and_the_limits(problem):
    pool, mixture, target, _ = problem
    try:
        planned = quotas(pool.domains, mixture, target, "redistribute")
    except MixtureError:
        assert sum(pool.domains[n].most_tokens for n in pool.domains if mixture[n] > 0) < target
        return
    assert sum(planned.values()) == target
    assert all(planned[n] <= pool.domains[n].most_tokens for n in planned)
    free = [n for n in planned if planned[n] < pool.domains[n].most_tokens]
    rest, shares = sum(planned[n] for n in free), sum(mixture[n] for n in free)
    assert all(abs(planned[n] - rest * mixture[n] / shares) < 1 + 1e-6 for n in free)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=300), st.integers(0, 2**64 - 1))
def test_one_domain_is_a_permutation(lengths, seed):
    array = np.array(lengths, np.int32)
    pointers = np.arange(len(lengths), dtype=np.int64)
    stream = native.DocumentStream([(array, pointers, 0, 0)], seed)
    first, second = stream.read(0, len(lengths)), stream.read(len(lengths), len(lengths))
    for drawn, places in (first, second):
        assert sorted(places.tolist()) == list(range(len(lengths)))
        assert np.array_equal(array[places], drawn)


@settings(max_examples=100, deadline=None)
@given(pools(1), st.integers(0, 300), st.integers(0, 9000), st.integers(1, 3))
def test_advance_is_what_walking_gives(pool, begin, budget, threads):
    d = pool.domains["d0"]
    stream = d.stream(5)
    documents, tokens, following = stream.advance(begin, budget, d.tokens, threads=threads)
    lengths, _ = stream.read(begin, documents + 1)
    assert tokens == lengths[:-1].sum() <= budget < tokens + following
    assert following == lengths[-1]


@settings(max_examples=80, deadline=None)
@given(pools(1), st.integers(0, 2**32))
def test_a_blend_of_one_domain_is_a_permutation(pool, seed):
    """One epoch of one domain: every document once."""
    own = pool.domains["d0"]
    plan = plan_blend(pool, Mixture({"d0": 1.0}), own.tokens, seed=seed)
    _, pointers, _, _ = order(plan)
    places = [base + int(p) for i, base in zip(own.indexes, own.bases, strict=True) for p in i.pointers]
    assert sorted(pointers.tolist()) == sorted(places)


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=30, max_size=200), st.integers(1, 5), st.permutations(range(5)), st.integers(0, 99)
)
def test_any_workers_in_any_order_write_the_same_bytes(lengths, num_workers, order_of_workers, seed):
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(blend_data, "SHARD_BYTES", 1)
        patch.setattr(blend_data, "SHARD_STEP_DOCUMENTS", 7)
        pool = make_pool(Path(name, "pool"), {"a": lengths, "b": lengths[::3]})
        arguments = pool, Mixture({"a": 0.7, "b": 0.3}), sum(lengths)
        options = {"mode": "materialise", "seed": seed, "progress": False}
        whole = build_blend(*arguments, Path(name, "whole"), **options)
        workers = [(i, num_workers) for i in order_of_workers if i < num_workers]
        manifests = [build_blend(*arguments, Path(name, "b"), worker=worker, **options) for worker in workers]
        assert [bool(m["files"]) for m in manifests] == [False] * (num_workers - 1) + [True]
        assert manifests[-1] == whole
        for suffix in whole["files"]:
            assert Path(f"{name}/b{suffix}").read_bytes() == Path(f"{name}/whole{suffix}").read_bytes()


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=9), min_size=1, max_size=3), min_size=1, max_size=4),
    st.integers(1, 400),
    st.sampled_from(["view", "materialise"]),
    st.integers(0, 99),
)
def test_what_is_read_are_the_documents_of_the_domain_that_is_named(lengths, target, mode, seed):
    """Each domain of one indexed data set or several; every token says which document of which it is of."""
    with tempfile.TemporaryDirectory() as name:
        number, owner, length = 0, {}, {}
        pool = {}
        for d, parts in enumerate(lengths):
            prefixes = []
            for p, sizes in enumerate(parts):
                prefixes.append(Path(name, "pool", f"d{d}_{p}"))
                prefixes[-1].parent.mkdir(exist_ok=True)
                numbers = range(number, number + len(sizes))
                number += len(sizes)
                owner |= dict.fromkeys(numbers, d)
                length |= dict(zip(numbers, sizes, strict=True))
                with IndexedWriter(prefixes[-1], np.dtype(np.uint16)) as writer:
                    writer.add(np.repeat(np.array(numbers), sizes), np.array(sizes))
            pool[f"d{d}"] = Source(tuple(prefixes))
        prefix, arguments = Path(name, "b"), (Mixture.uniform(pool), target)
        options = {"mode": mode, "seed": seed, "on_shortfall": "cap", "progress": False}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # documents are long for such targets
            manifest = build_blend(pool, *arguments, prefix, **options)
        reader, domain_of = IndexedReader(prefix), np.load(f"{prefix}.domains.npy")
        times = dict.fromkeys(owner, 0)
        for document in range(reader.num_documents):
            (seen,) = set(reader.tokens(document).tolist())
            assert len(reader.tokens(document)) == length[seen]
            assert list(manifest["domains"])[domain_of[document]] == f"d{owner[seen]}"
            times[seen] += 1
        for d in range(len(lengths)):
            counts = [count for document, count in times.items() if owner[document] == d]
            assert max(counts) - min(counts) <= 1, "none comes again before all have come"
        assert verify_blend(prefix, progress=False)["sources"] == "compared"
        # Moved data is the same data.
        moved = {}
        Path(name, "pool").rename(Path(name, "moved"))
        for domain_name, source in pool.items():
            moved[domain_name] = Source(tuple(Path(name, "moved", path.name) for path in source.prefixes))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert build_blend(moved, *arguments, prefix, **options) == manifest


def test_windows_of_a_million_tokens():
    """The stated tolerance, on a blend of realistic size: at most two longest documents off, here 0.8 % of the window."""
    rng = np.random.default_rng(0)
    lengths = {
        name: np.clip(rng.lognormal(6, 1, n), 1, 4000).astype(int).tolist()
        for name, n in (("a", 9000), ("b", 4000), ("c", 600))
    }
    domains, base = {}, 0
    for name, own in lengths.items():
        domains[name] = domain(name, [own], 4.0, base)
        base += domains[name].indexes[0].bin_bytes
    mixture = Mixture({"a": 0.6, "b": 0.3, "c": 0.1})
    plan = plan_blend(OpenPool(domains, np.dtype("<u2"), ""), mixture, 5_000_000, seed=1)
    drawn, _, owners, _ = order(plan)
    ends = np.cumsum(drawn)
    last = np.searchsorted(ends, ends + 1_000_000)
    starts = np.flatnonzero(last < len(ends))
    window = ends[last[starts]] - ends[starts]
    for number, part in enumerate(plan.parts):
        mine = np.cumsum(np.where(owners == number, drawn, 0))
        off = (mine[last[starts]] - mine[starts]) - window * mixture[part.domain.name]
        assert np.abs(off).max() <= 2 * drawn.max()


def test_shuffles_are_uniform():
    """Every document is as likely at every place: chi-squared over 20 000 seeds, 24 documents, 576 cells."""
    n, seeds = 24, 20_000
    lengths, places = np.ones(n, np.int32), np.arange(n, dtype=np.int64)
    counts = np.zeros((n, n))
    for seed in range(seeds):
        counts[np.arange(n), native.DocumentStream([(lengths, places, 0, 0)], seed).read(0, n)[1]] += 1
    statistic = ((counts - seeds / n) ** 2 / (seeds / n)).sum()
    freedom = (n - 1) ** 2
    assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)
