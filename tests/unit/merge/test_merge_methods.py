"""What weights mean: averages, stretched deltas, task arithmetic, on disk and in memory; and methods on the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from dist_checkpoints import bits, read_checkpoint, small_model, write_checkpoint
from merge_models import write_components

from megatron_demix.checkpoint.layout import TRACKER
from megatron_demix.checkpoint.live import LiveTensor
from megatron_demix.errors import ConfigError, MixtureError, OutputExists
from megatron_demix.merge.command import main
from megatron_demix.merge.engine import merge_checkpoints
from megatron_demix.merge.methods import Linear, Recipe
from megatron_demix.merge.methods_by_name import OPTIONS, make_method
from megatron_demix.merge.proxies import ProxyMerger
from megatron_demix.merge.rules import Rule
from megatron_demix.merge.sparse import Sparse

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
    with pytest.raises(ConfigError, match=r"scale is 1e\+39, expected a finite number \(in float32, so at most 3.4e\+38\)"):
        Linear(Path("x"), 1e39)
    with pytest.raises(ConfigError, match=r"scale is -1e\+39, expected a finite number"):
        Sparse(Path("x"), scale=-1e39, name="ties", density=0.5)
    with pytest.raises(MixtureError, match=r"weights and scale make a coefficient 1e\+40, expected at most 3.4e\+38"):
        Recipe(Linear(Path("x"), 1e20).coefficients(np.array([[1e20, 0]]))[np.newaxis])
    with pytest.raises(ConfigError, match=r"a component is called 'base'"):
        Linear(Path("x")).sources({"base": Path("y")})


def test_methods_on_the_command_line(tmp_path, capsys):
    parts, base = write_components(tmp_path / "x", torch.bfloat16)
    weighted = [f"{path}:{weight}" for path, weight in zip(parts.values(), (0.5, 0.25, 0.25), strict=True)]
    command = [*weighted, "--output", str(tmp_path / "out"), "--quiet"]
    ties = ["--method", "ties", "--base", str(base), "--density", "0.4", "--scale", "1.1"]
    assert main([*command, *ties, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "method ties, scale 1.1, density 0.4: 18 logical tensors" in shown
    assert "fused projections: num_query_groups 2, kv_channels 3, swiglu True" in shown
    assert not (tmp_path / "out").exists()
    assert main([*command, *ties, "--verify", "full"]) == 0
    described = json.loads((tmp_path / "out" / "release" / "demix_merge.json").read_text())
    assert described["method"] == {
        "name": "ties",
        "base": "base",
        "scale": 1.1,
        "density": 0.4,
        "fused": {"num_query_groups": 2, "kv_channels": 3, "swiglu": True},
    }
    assert list(described["weights"].values()) == [0.5, 0.25, 0.25]
    (tmp_path / "rules.yaml").write_text("- {layers: 1, scale: 1.5}")
    assert main([*command, "--dry-run"]) == 6  # what is there was made in another way
    command[command.index("--output") + 1] = str(tmp_path / "other")
    assert main([*command, "--base", str(base), "--rules", str(tmp_path / "rules.yaml"), "--dry-run"]) == 0
    assert "rule: tensors *, layers 1-1, scale 1.5" in capsys.readouterr().out
    assert main([*command, "--method", "karcher", "--density", "0.4"]) == 2
    assert "method karcher has no density" in capsys.readouterr().err
    assert main([*command, "--max-chunk", "many"]) == 2
    assert "'many' is not understood" in capsys.readouterr().err
    assert main([*weighted, f"{parts['a'].parent}/./{parts['a'].name}/:0.5", "--output", str(tmp_path / "o")]) == 2
    assert "are one checkpoint" in capsys.readouterr().err


def test_a_run_and_the_iteration_that_its_tracker_names_are_one(tmp_path, capsys):
    for name in ("iter_0000100", "iter_0000200"):
        write_checkpoint(tmp_path / "run" / name, small_model(0))
    (tmp_path / "run" / TRACKER).write_text("100")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "weights.csv").write_text("name,a,b\nm,0.5,0.5\n")
    named = ["--weights", str(tmp_path / "weights.csv"), "--output", str(tmp_path / "out"), "--quiet", "--components"]
    for other in ("run/iter_0000100", "link"):
        assert main([f"{tmp_path}/run:0.5", f"{tmp_path}/{other}:0.5", "--output", str(tmp_path / "out")]) == 2
        assert "are one checkpoint, " in capsys.readouterr().err
        assert main([*named, f"a={tmp_path}/run", f"b={tmp_path}/{other}"]) == 2
        assert "'a' and 'b' are one checkpoint, " in capsys.readouterr().err
    assert main([*named, f"a={tmp_path}/run", f"b={tmp_path}/run/iter_0000200"]) == 0


def test_mixed_components_on_the_command_line(tmp_path, capsys):
    parts, _ = write_components(tmp_path / "x")
    mixed, weights, output = tmp_path / "mixed.jsonl", tmp_path / "weights.jsonl", tmp_path / "out"
    mixed.write_text('{"name": "b", "weights": {"a": 0.5, "c": 0.5}}')
    weights.write_text('{"name": "m", "weights": {"a": 0.25, "c": 0.75}}')
    command = ["--components", *(f"{name}={path}" for name, path in parts.items()), "--output", str(output), "--quiet"]
    command += ["--weights", str(weights), "--mixed", str(mixed)]
    assert main([*command, "--verify", "full"]) == 0
    described = json.loads((output / "m" / "release" / "demix_merge.json").read_text())
    assert described["weights"] == {"a": -0.125, "b": 0.75, "c": 0.375}  # b: 4 x .25 x .75
    mixtures = {"weights": {"a": 0.25, "c": 0.75}, "mixed": {"b": {"a": 0.5, "c": 0.5}}}
    assert described["second_order"] == mixtures
    assert main(command) == 0
    for arguments, message in (
        (["--method", "karcher"], "--mixed goes with --components, --method linear"),
        (["--normalize", "off"], "--mixed goes with --components, --method linear"),
        (["--components", f"z={parts['a']}"], "--mixed: 'b' is not among --components, which are z"),
    ):
        assert main([*command, *arguments]) == 2
        assert message in capsys.readouterr().err
    mixed.write_text('{"name": "b", "weights": {"a": 0.5}}')
    assert main(command) == 4
    assert "weights sum to 0.5" in capsys.readouterr().err


def test_an_output_within_a_component_is_refused(tmp_path, capsys):
    parts, _ = write_components(tmp_path / "x")
    (tmp_path / "link").symlink_to(parts["b"])
    weighted = [f"{parts['a']}:0.5", f"{parts['b']}:0.5", "--quiet", "--output"]
    for output in (parts["a"] / "merged", tmp_path / "link" / "x" / "merged"):
        assert main([*weighted, str(output)]) == 2
        assert "lies within" in capsys.readouterr().err
        assert not output.parent.joinpath("merged").exists()
    assert main([*weighted, str(parts["a"].parent / "merged")]) == 0


OTHER = {
    "scale": (1.0, 1.5),
    "density": (0.4, 0.5),
    "gamma": (0.01, 0.02),
    "epsilon": (0.1, 0.2),
    "seed": (0, 1),
    "rules": ((), (Rule(scale=2.0),)),
}


@pytest.mark.parametrize(("name", "option"), [(name, option) for name, options in OPTIONS.items() for option in options])
def test_every_option_of_a_method_tells_merges_apart(name, option):
    needed = {"density": 0.4} if "density" in OPTIONS[name] else {}
    one, other = (make_method(name, Path("base"), **needed | {option: value}).describe("m") for value in OTHER[option])
    assert one != other


def test_a_merge_by_another_method_is_another_merge(tmp_path):
    parts, base = write_components(tmp_path / "x")
    mixture = {"m": {"a": 0.5, "b": 0.5}}
    for seed in (1, 1):
        method = make_method("dare_linear", base, density=0.5, seed=seed)
        merge_checkpoints(parts, mixture, tmp_path / "out", method=method, progress=False)
    method = make_method("dare_linear", base, density=0.5, seed=2)
    with pytest.raises(OutputExists, match=r"made from other inputs or settings"):
        merge_checkpoints(parts, mixture, tmp_path / "out", method=method, progress=False)
