"""Merge methods against their definitions on whole logical tensors in float64, written out here; and that nothing but the
components' values decides the bits: not how they are cut, named or stored, not threads, memory, instruction sets or company."""

import math

import numpy as np
import pytest
import torch
from dist_checkpoints import bits, read_checkpoint
from merge_models import NAMES, logical_tensors, model, per_layer, write_components

from megatron_demix import native
from megatron_demix.checkpoint.live import LiveTensor
from megatron_demix.errors import VerificationFailed
from megatron_demix.merge.engine import merge_checkpoints
from megatron_demix.merge.methods_by_name import OPTIONS, make_method
from megatron_demix.merge.oracle_methods import make_oracle
from megatron_demix.merge.proxies import ProxyMerger
from megatron_demix.merge.sparse import THINNINGS
from megatron_demix.merge.verify import verify_merge
from megatron_demix.native import DeltaRules, MergePlan

MIXTURES = {"even": {"a": 0.5, "b": 0.3, "c": 0.2}, "two": {"a": 0.25, "b": 0.75}, "one": {"c": 1.0}}
BF16 = torch.bfloat16


def method_of(name, base, *, deltas=True, **options):
    if "density" in OPTIONS[name]:
        options = {"density": 0.6} | options
    return make_method(name, base if deltas or name in THINNINGS else None, **options)


def merged(root, parts, method, mixtures=MIXTURES, **settings):
    settings = {"progress": False, "verify": "none"} | settings
    paths = merge_checkpoints(parts, mixtures, root, method=method, **settings)
    return {name: read_checkpoint(path / "release") for name, path in zip(mixtures, paths, strict=True)}


# --- definitions ----------------------------------------------------------------------------------------------------


def multislerp(vectors, weights):
    """As the method is described: unit vectors, their tangents at the normalised mean, a step along these, rescaled."""
    norms = torch.stack([v.norm() for v in vectors])
    units = [v / (n + 1e-8) for v, n in zip(vectors, norms, strict=True)]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    mean = mean / mean.norm()
    tangent = sum(w * (u - (u @ mean) * mean) for w, u in zip(weights, units, strict=True))
    angle = tangent.norm() + 1e-8
    return (mean * torch.cos(angle) + tangent * torch.sin(angle) / angle) * (norms * torch.tensor(weights)).sum()


def karcher(vectors, weights):
    norms = [v.norm() for v in vectors]
    units = [v / n for v, n in zip(vectors, norms, strict=True)]
    mean = units[0]
    for _ in range(60):
        step = torch.zeros_like(mean)
        for w, u in zip(weights, units, strict=True):
            across = u - (u @ mean) * mean
            if across.norm() > 1e-15:
                step += w * torch.atan2(across.norm(), u @ mean) * across / across.norm()
        size = step.norm()
        mean = torch.cos(size) * mean + torch.sin(size) * step / max(size, 1e-300)
        mean = mean / mean.norm()
    return mean * sum(w * n for w, n in zip(weights, norms, strict=True))


def ties(deltas, weights):
    kept = []
    for d in deltas:
        k = max(1, int(0.6 * d.numel()))
        kept.append(torch.where(d.abs() >= d.abs().sort(descending=True).values[k - 1], d, 0))
    terms = torch.stack([w * d for w, d in zip(weights, kept, strict=True)])
    sign = torch.where(terms.sum(0) >= 0, 1.0, -1.0)
    agree = terms.sign() == sign
    used = (agree * torch.tensor(weights)[:, None]).sum(0)
    return (terms * agree).sum(0) / torch.where(used == 0, 1.0, used)


def breadcrumbs(deltas, weights):
    total = torch.zeros_like(deltas[0])
    for w, d in zip(weights, deltas, strict=True):
        n = d.numel()
        lowest = max(0, n - int(0.6 * n) - int(0.1 * n))
        ranks = d.abs().argsort().argsort()
        total += w * torch.where((ranks >= lowest) & (ranks < lowest + int(0.6 * n)), d, 0)
    return total


DEFINED = {
    "multislerp": (multislerp, False, {}),
    "multislerp of deltas": (multislerp, True, {}),
    "karcher": (karcher, False, {}),
    "karcher of deltas": (karcher, True, {}),
    "ties": (ties, True, {}),
    "breadcrumbs": (breadcrumbs, True, {"gamma": 0.1}),
}


@pytest.mark.parametrize("case", DEFINED)
def test_a_method_is_its_definition_on_every_logical_tensor(case, tmp_path):
    definition, deltas, options = DEFINED[case]
    parts, base = write_components(tmp_path)
    found = merged(tmp_path / "out", parts, method_of(case.split()[0], base, deltas=deltas, **options))
    sources = [logical_tensors({k: v.double() for k, v in model(i, torch.float32).items()}) for i in range(3)]
    origin = logical_tensors({k: v.double() for k, v in model(None, torch.float32).items()})
    for name, weights in MIXTURES.items():
        used = [(sources[i], weights[n]) for i, n in enumerate(NAMES) if n in weights]
        for tensor, got in logical_tensors(found[name]).items():
            start = origin[tensor].reshape(-1)
            # A delta is a float32 before anything is decided about it.
            vectors = [s[tensor].reshape(-1) - deltas * start for s, _ in used]
            vectors = [v.float().double() for v in vectors]
            expected = definition(vectors, [w for _, w in used]) + deltas * start
            assert (got.reshape(-1).double() - expected).abs().max() < 3e-6, (name, tensor)


def test_multislerp_of_deltas_where_a_component_has_not_moved(tmp_path):
    parts, base = write_components(tmp_path)
    method = method_of("multislerp", base)
    found = merged(tmp_path / "out", parts | {"b": base}, method, {"even": MIXTURES["even"]}, verify="full")["even"]
    start, *sources = (logical_tensors(model(seed, torch.float32)) for seed in (None, 0, None, 2))
    for tensor, got in logical_tensors(found).items():
        vectors = [(source[tensor].double() - start[tensor].double()).reshape(-1) for source in sources]
        expected = multislerp(vectors, [0.5, 0.3, 0.2]) + start[tensor].double().reshape(-1)
        assert (got.reshape(-1).double() - expected).abs().max() < 3e-6, tensor


def test_dropping_at_random_is_fair_and_scaled_up(tmp_path):
    parts, base = write_components(tmp_path)
    for name in ("dare_linear", "della_linear"):
        found = merged(tmp_path / name, parts, method_of(name, base), {"a": {"a": 1.0}})["a"]
        start, source = model(None, torch.float32), model(0, torch.float32)
        kept = torch.cat([((found[k] - start[k]).abs() > 1e-5).reshape(-1) for k in found])
        size = torch.cat([(source[k] - start[k]).reshape(-1).double() for k in found])
        left = torch.cat([(found[k] - start[k]).reshape(-1).double() for k in found])
        n = len(kept)
        assert abs(kept.double().mean() - 0.6) < 4 * math.sqrt(0.24 / n)
        # The sum is kept on average: each term that stays is divided by its probability.
        assert abs(left.abs().sum() / size.abs().sum() - 1) < 4 / math.sqrt(n)
        large = size.abs() > size.abs().median()
        lead = kept[large].double().mean() - kept[~large].double().mean()
        assert abs(lead) < 0.08 if name == "dare_linear" else lead > 0.1


def test_components_drop_different_elements(tmp_path):
    parts, base = write_components(tmp_path)
    found = merged(tmp_path / "out", parts, method_of("dare_linear", base), {n: {n: 1.0} for n in "ab"})
    start = model(None, torch.float32)
    a, b = ((torch.cat([((found[n][k] - start[k]).abs() > 1e-5).reshape(-1) for k in start])) for n in "ab")
    assert 0.3 < (a & b).double().mean() < 0.42


def test_the_random_stream_is_splitmix64():
    """The generator's published first outputs for seed 1234567: an element stays if its upper half is in the lower half."""
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    sources = [np.ones(5, np.float32), np.zeros(5, np.float32)]
    plan = MergePlan(2)
    records = [plan.add_record(s.view(np.uint8), native.crc32(s.tobytes())) for s in sources]
    target = plan.add_target([5], "float32", "float32")
    plan.add_region(target, [0], [5], records, [0, 0], [[1], [1]], index=0, index_strides=[1])
    rules = DeltaRules("random", density=0.5, streams_SK=np.array([[1234567]], np.uint64))
    out = np.empty(5, np.float32)
    plan.run(np.ones((1, 1, 2)), addresses_TM=np.array([[out.ctypes.data]]), deltas=rules)
    assert out.tolist() == [2.0 if x >> 63 == 0 else 0.0 for x in outputs]


# --- nothing else decides -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_layout_threads_memory_company_and_instruction_set_do_not_matter(name, tmp_path, monkeypatch):
    parts, base = write_components(tmp_path / "x", BF16)
    expected = merged(tmp_path / "1", parts, method_of(name, base), threads=1)
    other, other_base = write_components(tmp_path / "y", BF16, layouts=(4, 1, 2, 2))
    monkeypatch.setenv("MEGATRON_DEMIX_ISA", "scalar")
    alone = {m: merged(tmp_path / "2", other, method_of(name, other_base), {m: MIXTURES[m]}, threads=3)[m] for m in MIXTURES}
    for m, tensors in expected.items():
        assert all(bits(alone[m][key]) == bits(value) for key, value in tensors.items())


@pytest.mark.parametrize("name", ["multislerp", "ties", "dare_linear", "della", "breadcrumbs"])
def test_stacked_layers_and_layers_under_their_own_keys_agree(name, tmp_path):
    parts, base = write_components(tmp_path / "x", BF16)
    apart, apart_base = write_components(tmp_path / "y", BF16, change=per_layer)
    stacked = merged(tmp_path / "1", parts, method_of(name, base))["even"]
    layers = merged(tmp_path / "2", apart, method_of(name, apart_base))["even"]
    assert {k: bits(v) for k, v in per_layer(stacked).items()} == {k: bits(v) for k, v in layers.items()}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_live_model_gets_the_bits_of_the_disk_on_every_rank(name, ranks, tmp_path):
    parts, base = write_components(tmp_path, BF16)
    disk = merged(tmp_path / "out", parts, method_of(name, base), {"even": MIXTURES["even"]})["even"]
    axes = {"linear_proj.weight": 2, "linear_fc2.weight": 2, "linear_qkv.weight": 1, "linear_fc1.weight": 1}
    for rank in range(ranks):
        live, wanted = [], []
        for key, whole in disk.items():
            axis = next((a for k, a in axes.items() if key.endswith(k)), None)
            halves = whole[1:2] if key.startswith("decoder.layers") and ranks > 1 else whole  # a pipeline stage, too
            if axis is not None:
                halves = halves.chunk(ranks, axis)[rank]
            offset = [0] * whole.dim()
            offset[0] = 1 if halves.shape[0] < whole.shape[0] and key.startswith("decoder.layers") else 0
            if axis is not None:
                offset[axis] = rank * halves.shape[axis]
            live.append(LiveTensor(key, tuple(whole.shape), tuple(offset), torch.zeros(halves.shape, dtype=BF16)))
            wanted.append(halves)
        merger = ProxyMerger(parts, live, method=method_of(name, base), threads=2)
        for mixture in ("two", "even"):
            merger.merge(MIXTURES[mixture])
        assert all(bits(t.tensor) == bits(w) for t, w in zip(live, wanted, strict=True))


# --- verification ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, BF16) for name in OPTIONS),
        *((n, d) for n in ("karcher", "ties", "della") for d in (torch.float32, torch.float16)),
    ],
)
def test_every_method_passes_full_verification(name, dtype, tmp_path):
    parts, base = write_components(tmp_path, dtype)
    merged(tmp_path / "out", parts, method_of(name, base), verify="full")


def test_verification_knows_when_a_density_leaves_no_element(tmp_path):
    """bfloat16 deltas of one magnitude are common, and an empty range of ranks may begin among them."""
    parts, base = write_components(tmp_path, BF16)
    method = method_of("breadcrumbs", base, density=0.001, gamma=0.5)
    found = merged(tmp_path / "out", parts, method, {"even": MIXTURES["even"]}, verify="full")["even"]
    assert {key: bits(value) for key, value in found.items()} == {key: bits(value) for key, value in model(None, BF16).items()}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ties", {"density": 0.5}),
        ("dare_linear", {"seed": 1}),
        ("della_linear", {"epsilon": 0.3}),
        ("breadcrumbs", {"gamma": 0.2}),
    ],
)
def test_verification_notices_another_option(name, options, tmp_path):
    parts, base = write_components(tmp_path)
    merged(tmp_path / "out", parts, method_of(name, base), {"even": MIXTURES["even"]})
    other = method_of(name, base, **options)
    from megatron_demix.merge.components import Components

    components = Components(other.sources(parts))
    dtypes = {key: info.dtype for key, info in components.tensors.items()}
    expected = make_oracle(components, other.bind(components), dtypes).mixture(np.array([0.5, 0.3, 0.2]), "even")
    with pytest.raises(VerificationFailed, match=r"decoder|embedding"):
        verify_merge(tmp_path / "out" / "even" / "release", components, expected, "full", "even")


@pytest.mark.parametrize("name", ["ties", "dare_ties", "della", "breadcrumbs"])
def test_nan_and_infinity_are_not_hidden(name, tmp_path):
    """A component's NaN is seen in the result wherever the method keeps that element, and nowhere else."""

    def spoil(tensors):
        tensors["decoder.final_layernorm.weight"][3] = float("nan")
        tensors["decoder.final_layernorm.weight"][5] = float("inf")
        return tensors

    parts, base = write_components(tmp_path / "sound")
    spoiled, _ = write_components(tmp_path / "spoiled", change=spoil)
    method = method_of(name, base)
    found = merged(tmp_path / "out", parts | {"a": spoiled["a"]}, method, {"even": MIXTURES["even"]}, verify="full")["even"]
    norm = found["decoder.final_layernorm.weight"]
    assert torch.isfinite(norm[[0, 1, 2, 4, 6, 7]]).all()
    if name == "ties":
        assert not torch.isfinite(norm[[3, 5]]).any()
