"""The merge kernels against a float64 oracle, on every instruction set, with a bound for each element.

The oracle is NumPy and torch in float64; the bound is half a unit of the output type plus (K + 1) * 2^-24 * sum |w x|.
"""

import numpy as np
import pytest
import torch

from megatron_demix import native
from megatron_demix.native import MergePlan

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HALF_ULP = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
TINY = {"float32": 2.0**-150, "bfloat16": 2.0**-134, "float16": 2.0**-25}
EDGES = [0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), float("nan"), 1e-40, -1e-40, 6e-8, 3e-5, 65504.0, 65519.0, 3.3e38]


def merge(sources, weights_MK, out, *, offset=0, shifts=(0,), threads=1, tile_bytes=1 << 18, check=False):
    """M merged tensors of dtype `out`. offset: bytes by which every source's address is off alignment; shifts: elements by
    which those of the results are, in turn."""
    plan = MergePlan(len(sources))
    records = []
    for source in sources:
        raw = source.contiguous().view(torch.uint8).numpy().reshape(-1)
        padded = np.zeros(raw.size + offset, np.uint8)
        padded[offset:] = raw
        records.append(plan.add_record(padded[offset:], native.crc32(raw.tobytes())))
    n = sources[0].numel()
    target = plan.add_target([n], str(sources[0].dtype).removeprefix("torch."), out)
    if n:
        plan.add_region(target, [0], [n], records, [0] * len(sources), [[1]] * len(sources))
    outs = [torch.empty(n + 64, dtype=DTYPES[out])[shifts[m % len(shifts)] :][:n] for m in range(len(weights_MK))]
    addresses = np.array([[o.data_ptr() for o in outs]], np.int64)
    outcome = plan.run(
        np.array(weights_MK)[None], addresses_TM=addresses, threads=threads, tile_bytes=tile_bytes, check_sources=check
    )
    assert not outcome["damaged"]
    return outs


def random_sources(dtype, n, k=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, generator=generator) * 3).to(DTYPES[dtype]) for _ in range(k)]


@pytest.fixture(params=native.instruction_sets())
def isa(request, monkeypatch):
    monkeypatch.setenv("MEGATRON_DEMIX_ISA", request.param)
    return request.param


@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_bound_of_every_element(dtype, out, isa):
    sources = random_sources(dtype, 1003)
    weights = [[0.2, 0.3, 0.5], [0.7, -0.4, 0.7], [1 / 3, 1 / 3, 1 / 3], [0.0, 0.999, 0.001]]
    exact = np.array(weights) @ np.stack([s.double().numpy() for s in sources])
    magnitude = np.abs(weights) @ np.stack([s.double().abs().numpy() for s in sources])
    for got, want, size in zip(merge(sources, weights, out), exact, magnitude, strict=True):
        sums = (len(sources) + 1) * 2.0**-24 * size
        bound = sums + (np.abs(want) + sums) * HALF_ULP[out] * 1.0001 + TINY[out]
        error = np.abs(got.double().numpy() - want)
        assert (error <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_instruction_sets_agree_bit_for_bit(dtype, monkeypatch):
    sources = random_sources(dtype, 777)
    for source in sources:
        source[: len(EDGES)] = torch.tensor(EDGES, dtype=torch.float64).to(source.dtype)
    sources[1] = sources[1].flip(0)
    # The last six are summed as a block of four and two alone.
    weights = [[0.2, 0.3, 0.5], [-1.5, 1.0, 1.5], [0.0, 2.0, 0.0], [1.0, 0.0, 0.0], [1e-30, 1e30, 1.0]]
    weights += [[0.1 * i, 1 - 0.3 * i, 1e-39 * i] for i in range(1, 6)]
    found = set()
    for name in native.instruction_sets():
        monkeypatch.setenv("MEGATRON_DEMIX_ISA", name)
        for out in DTYPES:
            bytes_of = [o.view(torch.uint8).numpy().tobytes() for o in merge(sources, weights, out)]
            one_by_one = [merge(sources, [w], out)[0].view(torch.uint8).numpy().tobytes() for w in weights]
            assert bytes_of == one_by_one
            found.add((out, tuple(bytes_of)))
    assert len(found) == len(DTYPES)


@pytest.mark.parametrize("num", [8, 9, 17, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_sources_have_the_bits_of_one_sum_in_their_order(dtype, num, isa, monkeypatch):
    """One mixture of more than eight sources is summed in groups; what four mixtures share, source by source."""
    sources = random_sources(dtype, 5003, num)
    sources[0][: len(EDGES)] = torch.tensor(EDGES, dtype=torch.float64).to(sources[0].dtype)
    sources[0][len(EDGES) : len(EDGES) + 3] = sources[-1][len(EDGES) : len(EDGES) + 3] = -0.0
    weights = np.random.default_rng(num).dirichlet(np.ones(num), 4)
    for out in DTYPES:
        together = merge(sources, weights, out)
        alone = [merge(sources, [row], out, check=True)[0] for row in weights]
        monkeypatch.setenv("MEGATRON_DEMIX_ISA", "scalar")
        plain = merge(sources, weights, out)
        monkeypatch.setenv("MEGATRON_DEMIX_ISA", isa)
        for a, b, c in zip(together, alone, plain, strict=True):
            assert a.view(torch.uint8).numpy().tobytes() == b.view(torch.uint8).numpy().tobytes()
            assert a.view(torch.uint8).numpy().tobytes() == c.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_hot_copies_every_bit_pattern(dtype, isa):
    width = torch.int32 if dtype == "float32" else torch.int16
    if width == torch.int16:
        patterns = torch.arange(-(2**15), 2**15, dtype=width)
    else:
        patterns = torch.arange(-(2**31), 2**31, 65521, dtype=torch.int64).to(width)
    first = patterns.view(DTYPES[dtype])
    other = torch.full_like(first, float("nan"))
    (copied,) = merge([other, first, other], [[0.0, 1.0, 0.0]], dtype)
    assert torch.equal(copied.view(width), patterns)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_is_torchs(dtype, isa):
    """Every half-precision value between neighbours, ties included, rounds as torch rounds (nearest even)."""
    patterns = torch.arange(0, 2**15, dtype=torch.int16).view(DTYPES[dtype]).float()
    middle = (patterns[:-1].double() + patterns[1:].double()) / 2
    values = torch.cat([patterns, middle.float(), torch.nextafter(middle.float(), torch.tensor(0.0)), -middle.float()])
    values = values[~values.isnan()]
    zeros = torch.zeros_like(values)
    (got,) = merge([values, zeros], [[1.0, 1.0]], dtype)
    want = values.to(DTYPES[dtype])
    assert torch.equal(got.view(torch.int16), want.view(torch.int16))


def test_denormals_survive_a_caller_that_flushes_them(isa):
    tiny = torch.full((64,), 1e-40)
    torch.set_flush_denormal(True)
    try:
        (got,) = merge([tiny, tiny], [[0.5, 0.5]], "float32")
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(got.view(torch.int32), tiny.view(torch.int32))


def test_nan_and_infinity_propagate(isa):
    x = torch.tensor([float("inf"), float("inf"), 1.0, float("nan")] * 20)
    y = torch.tensor([1.0, -float("inf"), float("nan"), 0.0] * 20)
    for out in DTYPES:
        (got,) = merge([x, y], [[0.5, 0.5]], out)
        assert torch.isinf(got[0])
        assert torch.isnan(got[1:4]).all()
    (got,) = merge([x, y], [[0.0, 0.0]], "float32")
    assert torch.equal(got.view(torch.int32), torch.zeros(80, dtype=torch.int32))


@pytest.mark.parametrize("offset", [1, 2, 3, 7, 63])
@pytest.mark.parametrize("n", [0, 1, 7, 8, 15, 16, 17, 63, 64, 65, 127, 8191, 8192, 8193, 20000])
def test_any_address_and_length(offset, n):
    for dtype in ("bfloat16", "float32"):
        sources = random_sources(dtype, n, k=2)
        weights = [[0.25, 0.75], [0.5, 0.5], [1.0, 0.0], [0.9, 0.1]]
        aligned = merge(sources, weights, dtype)
        shifted = merge(sources, weights, dtype, offset=offset, threads=3, tile_bytes=4096, check=True)
        assert all(torch.equal(a, b) for a, b in zip(aligned, shifted, strict=True))


@pytest.mark.parametrize("shifts", [(1,), (8,), (31,), (0, 5, 0, 0, 32)])
@pytest.mark.parametrize("out", DTYPES)
def test_any_address_of_the_results(shifts, out, isa):
    sources = random_sources("bfloat16", 5000, k=3)
    weights = [[0.1 * i, 0.5, 0.5 - 0.1 * i] for i in range(9)]
    for mixtures in (weights, weights[:1]):
        aligned, shifted = merge(sources, mixtures, out), merge(sources, mixtures, out, shifts=shifts)
        assert all(torch.equal(a, b) for a, b in zip(aligned, shifted, strict=True))


@pytest.mark.parametrize("special", [1e-40, -1e-40, float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("num_mixtures", [1, 5])
def test_one_number_of_many_is_special(special, num_mixtures, monkeypatch):
    weights = [[0.5 - 0.01 * m, 0.25, 0.25 + 0.01 * m] for m in range(num_mixtures)]
    for at in (0, 700, 4999):
        sources = random_sources("bfloat16", 5000, k=3)
        for k, source in enumerate(sources):
            source[at] = special if k < 2 else 0.0
        found = set()
        for name in native.instruction_sets():
            monkeypatch.setenv("MEGATRON_DEMIX_ISA", name)
            found.add(b"".join(o.view(torch.uint8).numpy().tobytes() for o in merge(sources, weights, "bfloat16")))
        assert len(found) == 1


def test_many_sources():
    sources = random_sources("bfloat16", 5000, k=40)
    weights = [[1 / 40] * 40, [0.0] * 20 + [0.05] * 20, [1.0] + [0.0] * 39]
    got = merge(sources, weights, "bfloat16")
    want = np.array(weights) @ np.stack([s.double().numpy() for s in sources])
    assert np.abs(got[0].double().numpy() - want[0]).max() < 0.02
    assert torch.equal(got[2], sources[0])
    alone = merge(sources, weights[:1], "bfloat16")
    assert torch.equal(alone[0], got[0])
