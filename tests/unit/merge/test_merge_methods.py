"""What weights mean: averages, stretched deltas, task arithmetic, on disk and in memory."""

from pathlib import Path

import numpy as np
import pytest
import torch
from dist_checkpoints import bits, read_checkpoint, small_model, write_checkpoint

from megatron_demix.checkpoint.live import LiveTensor
from megatron_demix.errors import ConfigError
from megatron_demix.merge.engine import merge_checkpoints
from megatron_demix.merge.methods import Linear
from megatron_demix.merge.proxies import ProxyMerger

KEY = "decoder.layers.mlp.linear_fc1.weight"


@pytest.fixture
def parts(tmp_path):
    return {n: write_checkpoint(tmp_path / n, small_model(i, torch.float32)) for i, n in enumerate(("a", "b", "origin"))}


def expected(weights, scale):
    a, b, base = (small_model(i, torch.float32)[KEY].double() for i in range(3))
    return base + scale * (weights["a"] * (a - base) + weights["b"] * (b - base))


@pytest.mark.parametrize(
    ("weights", "scale", "normalize"),
    [
        ({"a": 0.25, "b": 0.75}, 1.5, "error"),
        ({"a": 0.25, "b": 0.75}, 0.5, "error"),
        ({"a": 0.9, "b": 0.6}, 1.0, "off"),
    ],
)
def test_deltas_from_a_base(parts, tmp_path, weights, scale, normalize):
    base = parts.pop("origin")
    method = Linear(base, scale)
    (path,) = merge_checkpoints(
        parts, {"m": weights}, tmp_path / "out", method=method, normalize=normalize, progress=False, verify="full"
    )
    merged = read_checkpoint(path / "release")[KEY]
    assert (merged.double() - expected(weights, scale)).abs().max() < 2e-6
    live = LiveTensor(KEY, (2, 64, 8), (0, 0, 0), torch.zeros(2, 64, 8))
    ProxyMerger(parts, [live], method=method).merge(weights, normalize=normalize)
    assert bits(live.tensor) == bits(merged)


def test_a_base_with_scale_one_changes_nothing(parts, tmp_path):
    base = parts.pop("origin")
    weights = {"a": 0.1 + 0.2, "b": 0.7}
    (with_base,) = merge_checkpoints(parts, {"m": weights}, tmp_path / "x", method=Linear(base), progress=False)
    (without,) = merge_checkpoints(parts, {"m": weights}, tmp_path / "y", progress=False)
    assert bits(read_checkpoint(with_base / "release")[KEY]) == bits(read_checkpoint(without / "release")[KEY])
    assert np.array_equal(Linear(base).coefficients(np.array([[0.1, 0.9]])), [[0.1, 0.9, 0.0]])


def test_methods_that_make_no_sense():
    with pytest.raises(ConfigError, match=r"scale 1.5 needs a base"):
        Linear(scale=1.5)
    with pytest.raises(ConfigError, match=r"scale is nan, expected a finite number"):
        Linear(Path("x"), float("nan"))
    with pytest.raises(ConfigError, match=r"a component is called 'base'"):
        Linear(Path("x")).sources({"base": Path("y")})
