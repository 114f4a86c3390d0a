"""Merging checkpoints on disk: what is written, and when it is there already."""

import json
import os
import re
import resource
import warnings
import zlib

import pytest
import torch
import yaml
from dist_checkpoints import bits, one_large_tensor, read_checkpoint, saved, small_model, three_components, write_checkpoint
from folders import contents

import megatron_demix
from megatron_demix.checkpoint import output
from megatron_demix.checkpoint.layout import TRACKER
from megatron_demix.checkpoint.reader import Checkpoint
from megatron_demix.errors import (
    ConfigError,
    CorruptInput,
    OutputExists,
    StorageError,
)
from megatron_demix.merge import engine
from megatron_demix.merge.command import main
from megatron_demix.merge.engine import check_means, merge_checkpoints, plan_merge, write_merge

WEIGHTS = {"a": 0.5, "b": 0.25, "c": 0.25}


@pytest.fixture
def parts(tmp_path):
    return three_components(tmp_path)


def test_one_hot_is_a_bit_identical_copy_across_layouts(parts, tmp_path):
    written = merge_checkpoints(parts, {f"only_{k}": {k: 1.0} for k in parts}, tmp_path / "out", progress=False, verify="full")
    assert written == [tmp_path / "out" / f"only_{k}" for k in parts]
    for seed, path in enumerate(written):
        merged, expected = read_checkpoint(path / "release"), small_model(seed)
        assert merged.keys() == expected.keys()
        assert all(bits(merged[k]) == bits(expected[k]) for k in expected)


def test_output_is_a_run_that_loads_from_its_start(parts, tmp_path):
    (path,) = merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "m", into_output=True, progress=False)
    assert (path / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert sorted(p.name for p in (path / "release").iterdir()) == [
        ".metadata",
        "__0_0.distcp",
        "common.pt",
        "demix_merge.json",
        "metadata.json",
    ]
    merged = Checkpoint(path)
    assert {k: merged.blob(v, k).tobytes() for k, v in merged.model_objects.items()} == {
        "x._extra_state/shard_0_1": saved(["a"])
    }
    common = torch.load(path / "release" / "common.pt", weights_only=False)
    assert common["iteration"] == 0
    assert common["args"].consumed_train_samples == 0
    provenance = json.loads((path / "release" / "demix_merge.json").read_text())
    assert provenance["weights"] == WEIGHTS
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_release_is_of_iteration_0_wherever_its_components_were(parts, tmp_path):
    """Megatron-LM would skip the samples of the iterations before it."""
    run = tmp_path / "run"
    run.mkdir()
    parts["a"].rename(run / "iter_0000100")
    (run / TRACKER).write_text("100")
    (path,) = merge_checkpoints(parts | {"a": run}, {"m": WEIGHTS}, tmp_path / "out", progress=False)
    common = torch.load(path / "release" / "common.pt", weights_only=False)
    assert (common["iteration"], common["args"].iteration) == (0, 0)


def test_iteration_layout(parts, tmp_path):
    (path,) = merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "out", layout="iter", progress=False)
    assert (path / "latest_checkpointed_iteration.txt").read_text() == "100"
    assert torch.load(path / "iter_0000100" / "common.pt", weights_only=False)["iteration"] == 100
    common = torch.load(parts["a"] / "common.pt", weights_only=False)
    for iteration, said in ((-1, "is of iteration -1, and Megatron-LM loads no"), (None, "does not say its iteration")):
        torch.save(common | {"iteration": iteration}, parts["a"] / "common.pt")
        with pytest.raises(ConfigError, match=said):
            merge_checkpoints(parts, {"n": WEIGHTS}, tmp_path / "out", layout="iter", progress=False)


def test_a_merge_of_releases_has_no_iteration_layout(parts, tmp_path):
    """They are of iteration 0, and Megatron-LM stops at a tracker that names it."""
    (released,) = merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "out", progress=False)
    with pytest.raises(ConfigError, match=r"release is of iteration 0, and Megatron-LM loads no folder of"):
        merge_checkpoints({"m": released}, {"n": {"m": 1.0}}, tmp_path / "out", layout="iter", progress=False)


def test_other_arguments_are_another_merge(parts, tmp_path):
    """What no weights decide counts as well: elements may be equal, and the model's function not."""
    merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "out", progress=False)
    assert merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "out", progress=False) == [tmp_path / "out" / "m"]
    for path in parts.values():
        common = torch.load(path / "common.pt", weights_only=False)
        common["args"].rotary_base = 777
        torch.save(common, path / "common.pt")
    with pytest.raises(OutputExists, match=r"made from other inputs or settings"):
        merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "out", progress=False)


def test_payload_checksums_are_right(parts, tmp_path):
    (path,) = merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "out", progress=False)
    merged = Checkpoint(path)
    for info in merged.model_tensors.values():
        for chunk in info.chunks:
            payload = merged.payload(info, chunk)
            assert zlib.crc32(payload.record) == payload.crc


def test_bytes_do_not_depend_on_threads_memory_or_company(parts, tmp_path):
    def merged(name, mixtures, **settings):
        merge_checkpoints(parts, mixtures, tmp_path / name, progress=False, **settings)
        return contents(tmp_path / name / "m")

    alone = merged("alone", {"m": WEIGHTS}, threads=1)
    assert merged("threads", {"m": WEIGHTS}, threads=5, max_memory=10 * 65536) == alone
    many = {f"x{i}": {"a": i / 8, "b": 1 - i / 8} for i in range(9)} | {"m": WEIGHTS}
    assert merged("many", many, threads=2) == alone


@pytest.mark.parametrize("max_memory", [1 << 20, 4 << 20, 256 << 20])
def test_bytes_do_not_depend_on_how_sources_are_read(tmp_path, max_memory):
    """Through maps, or in pieces of several sizes, of files that do not end with a whole one."""
    parts = {name: one_large_tensor(tmp_path / name, seed, 1_000_003) for seed, name in enumerate("ab")}
    (path,) = merge_checkpoints(
        parts, {"m": {"a": 0.5, "b": 0.5}}, tmp_path / "out", threads=2, max_memory=max_memory, progress=False
    )
    merged = read_checkpoint(path / "release")["decoder.final_layernorm.weight"]
    a, b = (read_checkpoint(parts[name])["decoder.final_layernorm.weight"].float() for name in "ab")
    assert torch.equal(merged, (a * 0.5 + b * 0.5).bfloat16())


def test_optimizer_state_is_not_carried(tmp_path):
    tensors = small_model(0) | {"optimizer.state.exp_avg.w": torch.ones(4)}
    a = write_checkpoint(tmp_path / "a", tensors, objects={"rng_state/shard_0_1": b"r"})
    b = write_checkpoint(tmp_path / "b", small_model(1))
    (path,) = merge_checkpoints({"a": a, "b": b}, {"m": {"a": 0.5, "b": 0.5}}, tmp_path / "out", progress=False)
    assert read_checkpoint(path / "release").keys() == small_model(0).keys()
    assert Checkpoint(path).metadata.objects == {}


RUN_CONFIG = """\
model: {_target_: megatron.bridge.models.GPTModelProvider, num_layers: 2, activation_func: {_target_: torch.nn.functional.silu}}
checkpoint: {save: /runs/a, save_optim: true, save_rng: true}
"""


def test_a_bridge_run_config_is_carried_along(parts, tmp_path):
    """Megatron-Bridge builds the model from it, and asks it what else to load."""
    (parts["a"] / "run_config.yaml").write_text(RUN_CONFIG)
    (path,) = merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "out", progress=False)
    carried = yaml.safe_load((path / "release" / "run_config.yaml").read_text())
    assert carried == {
        "model": yaml.safe_load(RUN_CONFIG)["model"],
        "checkpoint": {"save": "/runs/a", "save_optim": False, "save_rng": False},
    }
    merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "out", progress=False)
    (parts["a"] / "run_config.yaml").write_text("model: {}")
    with pytest.raises(OutputExists, match=r"made from other inputs"):
        merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "out", progress=False)
    (parts["a"] / "run_config.yaml").write_text("model: !!python/object/apply:os.system [exit]")
    with pytest.raises(CorruptInput, match=r"run_config.yaml: cannot be read .*take it away"):
        merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "other", progress=False)


def test_tensors_that_are_not_floats_come_from_the_first(tmp_path):
    parts = {n: write_checkpoint(tmp_path / n, {"w": torch.ones(4), "count": torch.tensor([i, 7])}) for i, n in enumerate("ab")}
    (path,) = merge_checkpoints(parts, {"m": {"a": 0.5, "b": 0.5}}, tmp_path / "out", progress=False)
    assert read_checkpoint(path / "release")["count"].tolist() == [0, 7]


def test_done_is_skipped_and_other_things_are_not_overwritten(parts, tmp_path):
    (path,) = merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "out", progress=False)
    before = os.stat(path / "release" / ".metadata").st_mtime_ns
    merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "out", progress=False)
    assert os.stat(path / "release" / ".metadata").st_mtime_ns == before
    with pytest.raises(
        OutputExists, match=r"already holds a checkpoint made from other inputs or settings. Nothing is overwritten"
    ):
        merge_checkpoints(parts, {"m": {"a": 1.0}}, tmp_path / "out", progress=False)
    with pytest.raises(OutputExists, match=r"already holds something else"):
        merge_checkpoints(parts, {"m": WEIGHTS}, parts["a"], into_output=True, progress=False)
    os.truncate(path / "release" / "__0_0.distcp", 100)
    with pytest.raises(CorruptInput, match=r"missing or not .* bytes long.*make it again"):
        merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "out", progress=False)


@pytest.mark.parametrize("order", [3, None, [["a"], 5]])
def test_what_others_have_said_of_a_checkpoint_is_something_else(parts, tmp_path, order):
    (path,) = merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "out", progress=False)
    said = path / "release" / "demix_merge.json"
    said.write_text(json.dumps(json.loads(said.read_text()) | {"order": order}))
    with pytest.raises(OutputExists, match="made from other inputs or settings"):
        merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "out", progress=False)


@pytest.mark.parametrize("workers", [[], ["--worker", "0", "--workers", "1"]])
def test_a_path_may_be_spelled_in_many_ways(parts, tmp_path, monkeypatch, workers, capsys):
    (tmp_path / "link").symlink_to(parts["b"])
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"

    def merge(a, b, *more):
        return main([f"{a}:0.75", f"{b}:0.25", "--output", str(out), "--quiet", *workers, *more])

    assert merge("a", "b") == 0
    before = os.stat(out / "release" / ".metadata").st_mtime_ns
    for a, b in (("./a", "b/"), (parts["a"], parts["b"]), ("../" + tmp_path.name + "/a", "link")):
        assert merge(a, b) == 0
    assert os.stat(out / "release" / ".metadata").st_mtime_ns == before
    assert json.loads((out / "release" / "demix_merge.json").read_text())["weights"] == {"a": 0.75, "b": 0.25}
    capsys.readouterr()
    assert merge("b", "a") == 6
    assert merge("a", "c") == 6
    assert merge("a", "b", "--normalize", "warn") == 6


# --- refusals -------------------------------------------------------------------------------------------------------


def test_another_order_is_another_merge(parts, tmp_path):
    """Sums, random streams and what is copied from the first depend on it."""
    merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "out", progress=False)
    backwards = dict(reversed(parts.items()))
    with pytest.raises(OutputExists, match="other inputs or settings"):
        merge_checkpoints(backwards, {"m": WEIGHTS}, tmp_path / "out", progress=False)


def test_who_makes_the_same_at_the_same_time_is_done_too(parts, tmp_path, monkeypatch):
    def other(*_):
        monkeypatch.undo()
        merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "out", progress=False)

    monkeypatch.setattr(engine, "verify_merge", other)
    written = merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "out", progress=False)
    assert written == [tmp_path / "out" / "m"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["m"]


def test_outputs_that_are_links_are_followed_and_those_that_cannot_be_renamed_to_are_refused(parts, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (path,) = merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "link", progress=False, into_output=True)
    assert path == tmp_path / "elsewhere"
    assert (tmp_path / "link" / TRACKER).read_text() == "release"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ConfigError, match=r"output '\.' is the current folder"):
        merge_checkpoints(parts, {"m": WEIGHTS}, ".", progress=False, into_output=True)
    with pytest.raises(ConfigError, match=r"output '/' is a mount point"):
        merge_checkpoints(parts, {"m": WEIGHTS}, "/", progress=False, into_output=True)


def test_a_later_version_finds_what_is_there(parts, tmp_path, monkeypatch):
    made = merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "out", progress=False)
    monkeypatch.setattr(output, "__version__", "99.0")
    assert merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "out", progress=False) == made
    provenance = json.loads((made[0] / "release" / "demix_merge.json").read_text())
    assert provenance["software"] == f"megatron_demix {megatron_demix.__version__}"


def test_a_dry_run_looks_at_the_place_and_writes_nothing(parts, tmp_path):
    def dry(mixtures, output):
        merge = plan_merge(parts, mixtures, output)
        check_means(merge)
        return [merge.targets[m] for m in merge.todo]

    assert dry({"m": WEIGHTS}, tmp_path / "new" / "er") == [tmp_path / "new" / "er" / "m"]
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="nothing can be written there"):
        dry({"m": WEIGHTS}, tmp_path / "file" / "x")
    merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "out", progress=False)
    assert dry({"m": WEIGHTS, "n": {"a": 1.0}}, tmp_path / "out") == [tmp_path / "out" / "n"]


def test_only_what_is_written_raises_the_limit_of_open_files(parts, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = (256, before[1])
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, few)
        merge = plan_merge(parts, {"m": WEIGHTS}, tmp_path / "out")
        check_means(merge)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == few
        write_merge(merge, progress=False)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) > few
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_strided_sources_whose_runs_end_with_a_single_element(tmp_path):
    """Of a block of elements, that is: 16384 of them are in work at a time."""
    whole = {
        name: {"w": small_model(seed)["embedding.word_embeddings.weight"].flatten().repeat(500)[: 3 * 16385].view(3, -1)}
        for seed, name in enumerate("ab")
    }
    parts = {name: write_checkpoint(tmp_path / name, tensors, transposed=["w"]) for name, tensors in whole.items()}
    (path,) = merge_checkpoints(parts, {"m": {"a": 0.5, "b": 0.5}}, tmp_path / "out", progress=False, verify="full")
    found = read_checkpoint(path / "release")["w"].float()
    expected = (whole["a"]["w"].float() + whole["b"]["w"].float()) / 2
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-6)


def test_objects_that_are_not_known_are_named(tmp_path):
    state = {
        "rng_state/shard_0_1": b"x",
        "rerun_state_machine_state/shard_0_1": b"x",
        "x._extra_state/shard_0_1": saved([None]),
    }
    own = {"router.map/shard_0_2": b"x", "router.map/shard_1_2": b"x"}
    extra = {"rng_state_emb": torch.ones(4)}
    parts = {
        name: write_checkpoint(tmp_path / name, small_model(0) | extra, objects=state | (own if name == "b" else {}))
        for name in "abc"
    }
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        merge_checkpoints({k: parts[k] for k in "ac"}, {"m": {"a": 1.0}}, tmp_path / "out", progress=False)
        assert said == []
        merge_checkpoints(parts, {"n": {"a": 1.0}}, tmp_path / "out", progress=False)
    (warning,) = said
    assert re.fullmatch(
        r"component 'b' holds objects that are not known .* not merged: 'router.map'\. A model .*", str(warning.message)
    )
    said_of = {name: json.loads((tmp_path / "out" / name / "release" / "demix_merge.json").read_text()) for name in "mn"}
    assert said_of["n"]["unknown_objects"] == ["router.map"]
    assert "unknown_objects" not in said_of["m"]
    del said_of["n"]["unknown_objects"]
    (tmp_path / "out" / "n" / "release" / "demix_merge.json").write_text(json.dumps(said_of["n"]))
    with pytest.warns(UserWarning, match="are not merged"):  # an earlier version said nothing of them, and made the same
        merge_checkpoints(parts, {"n": {"a": 1.0}}, tmp_path / "out", progress=False)
    assert "rng_state_emb" in Checkpoint(tmp_path / "out" / "m").model_tensors
