"""Merge methods against mergekit's own code, on the same logical tensors in float32. Skips itself where it is not installed.

mergekit wants other versions of packages than this project does: run it from an environment of its own,
`PYTHONPATH=. python -m pytest tests/numerics/test_against_mergekit.py`. docs/DECISIONS.md says where definitions differ.
"""

import math

import pytest
import torch
from dist_checkpoints import read_checkpoint
from merge_models import NAMES, logical_tensors, model, write_components

from megatron_demix.merge.engine import merge_checkpoints
from megatron_demix.merge.methods_by_name import OPTIONS, make_method
from megatron_demix.merge.sparse import THINNINGS

registry = pytest.importorskip("mergekit.merge_methods.registry", reason="needs mergekit 0.1.5")
base_module = pytest.importorskip("mergekit.merge_methods.base")

WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}
EQUAL = dict.fromkeys(NAMES, 1 / 3)


@pytest.fixture(scope="module")
def sources():
    """[K + 1] the components' and the base's logical tensors."""
    return [logical_tensors(model(seed, torch.float32)) for seed in (0, 1, 2, None)]


def ours(tmp_path, name, weights, *, deltas=True, **options):
    parts, base = write_components(tmp_path)
    method = make_method(name, base if deltas or name in THINNINGS else None, **options)
    (path,) = merge_checkpoints(parts, {"m": weights}, tmp_path / "out", method=method, progress=False, verify="full")
    return logical_tensors(read_checkpoint(path / "release"))


def theirs(name, tensors, weights, *, deltas=True, **options):
    """One logical tensor by mergekit. tensors: [K + 1], the base last."""
    chosen = [t.clone() for t in (tensors if deltas else tensors[:-1])]
    group = base_module.TensorGroup.from_tensors(chosen, ids=range(len(chosen)), base_index=3 if deltas else None)
    each = {k: base_module.PerInputValues([(i, v) for i in range(3)]) for k, v in options.items() if k != "eps"}
    weight = base_module.PerInputValues(list(enumerate(weights.values())))
    method = registry.get(name)
    if name == "karcher":
        return method.merge_group(group, max_iter=100, tol=1e-7)
    if name == "multislerp":
        return method.merge_group(group, weight=weight)
    defaults = {p.name: p.default for p in method.spec.parameters if p.name not in ("weight", "density", "gamma", "epsilon")}
    return method.merge_group(group, **defaults, weight=weight, **each)


def differences(sources, name, found, weights, **options):
    return {
        tensor: (got - theirs(name, [s[tensor] for s in sources], weights, **options)).abs().max().item()
        for tensor, got in found.items()
    }


def test_linear(tmp_path, sources):
    found = ours(tmp_path, "linear", WEIGHTS, deltas=False)
    for tensor, got in found.items():
        batch = base_module.TensorBatch(tuple(s[tensor][None] for s in sources[:3]))
        expected = registry.get("linear").implementation(batch, weight=torch.tensor([list(WEIGHTS.values())]))
        assert (got - expected[0]).abs().max() < 1e-6


@pytest.mark.parametrize("deltas", [False, True])
def test_multislerp(tmp_path, sources, deltas):
    found = ours(tmp_path, "multislerp", WEIGHTS, deltas=deltas)
    assert max(differences(sources, "multislerp", found, WEIGHTS, deltas=deltas).values()) < 3e-6


def test_karcher(tmp_path, sources):
    """mergekit's has equal weights only, and works in float32 throughout."""
    found = ours(tmp_path, "karcher", EQUAL, deltas=False)
    assert max(differences(sources, "karcher", found, EQUAL, deltas=False).values()) < 1e-5


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("name", ["ties", "breadcrumbs", "breadcrumbs_ties"])
def test_methods_with_thresholds(tmp_path, sources, name, density):
    options = {"density": density} | ({"gamma": 0.05} if "gamma" in OPTIONS[name] else {})
    found = ours(tmp_path, name, WEIGHTS, **options)
    assert max(differences(sources, name, found, WEIGHTS, **options).values()) < 1e-6


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_methods_that_drop_at_random_agree_when_nothing_is_dropped(tmp_path, sources, name):
    options = {"density": 1.0} | ({"epsilon": 0.1} if "epsilon" in OPTIONS[name] else {})
    found = ours(tmp_path, name, WEIGHTS, **options)
    assert max(differences(sources, name, found, WEIGHTS, **options).values()) < 1e-6


@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_as_much_stays_of_small_and_large_deltas_as_in_mergekit(tmp_path, sources, name):
    """Random masks cannot be equal: the share of elements that stay, by the rank of their magnitude in their row, can."""
    options = {"density": 0.6} | ({"epsilon": 0.3} if "epsilon" in OPTIONS[name] else {})
    only = {"a": 1.0, "b": 0.0, "c": 0.0}
    found = ours(tmp_path, name, only, **options)
    torch.manual_seed(0)
    kept = {"ours": [[] for _ in range(8)], "theirs": [[] for _ in range(8)]}
    for tensor, got in found.items():
        if not tensor.endswith("fc1.weight[gate]") and not tensor.endswith("word_embeddings.weight"):
            continue
        parts = [s[tensor] for s in sources]
        ranks = (parts[0] - parts[3]).abs().argsort(dim=1).argsort(dim=1)
        for _ in range(10):  # theirs may be drawn again
            stays = {"ours": (got - parts[3]).abs() > 1e-6, "theirs": theirs(name, parts, only, **options) != parts[3]}
            for who, mask in stays.items():
                for rank in range(8):
                    kept[who][rank].append(mask[ranks == rank].double())
    rows = len(torch.cat(kept["ours"][0])) / 10
    for rank in range(8):
        mine, other = (torch.cat(kept[who][rank]).mean().item() for who in ("ours", "theirs"))
        assert abs(mine - other) < 4.5 * math.sqrt(0.25 / rows)
