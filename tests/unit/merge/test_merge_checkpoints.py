"""Merging checkpoints on disk: what is written, what is refused, and that nothing wrong is ever published."""

import argparse
import errno
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch
import yaml
from dist_checkpoints import bits, parallel_cuts, read_checkpoint, small_model, write_checkpoint

from megatron_demix import native
from megatron_demix.checkpoint import output
from megatron_demix.checkpoint.layout import TRACKER
from megatron_demix.checkpoint.reader import Checkpoint
from megatron_demix.errors import (
    ConfigError,
    CorruptInput,
    IncompatibleInputs,
    MixtureError,
    OutputExists,
    StorageError,
    VerificationFailed,
)
from megatron_demix.merge import engine
from megatron_demix.merge.command import main
from megatron_demix.merge.engine import merge_checkpoints

WEIGHTS = {"a": 0.5, "b": 0.25, "c": 0.25}


@pytest.fixture
def parts(tmp_path):
    """Three components of one model, cut for different tensor parallelism, at odd addresses."""
    return {
        name: write_checkpoint(
            tmp_path / name,
            small_model(seed),
            parallel_cuts(tp),
            num_files=tp,
            odd=True,
            objects={"x._extra_state/shard_0_1": name.encode()},
        )
        for seed, (name, tp) in enumerate({"a": 1, "b": 2, "c": 4}.items())
    }


def files_of(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


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
    assert {k: merged.blob(v, k).tobytes() for k, v in merged.model_objects.items()} == {"x._extra_state/shard_0_1": b"a"}
    common = torch.load(path / "release" / "common.pt", weights_only=False)
    assert common["iteration"] == 0
    assert common["args"].consumed_train_samples == 0
    provenance = json.loads((path / "release" / "demix_merge.json").read_text())
    assert provenance["weights"] == WEIGHTS
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_iteration_layout(parts, tmp_path):
    (path,) = merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "out", layout="iter", progress=False)
    assert (path / "latest_checkpointed_iteration.txt").read_text() == "100"
    assert torch.load(path / "iter_0000100" / "common.pt", weights_only=False)["iteration"] == 100
    (parts["a"] / "common.pt").unlink()
    with pytest.raises(ConfigError, match=r"does not say its iteration. Use --layout release"):
        merge_checkpoints(parts, {"n": WEIGHTS}, tmp_path / "out", layout="iter", progress=False)


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


INTERRUPTED_TWICE = """
import os, signal, sys, time
from pathlib import Path
import numpy as np
from megatron_demix.native import MergePlan

num = 1 << 25
plan = MergePlan(1)
record = plan.add_record(np.zeros(num, np.float32).view(np.uint8), 0)
plan.add_region(plan.add_target([num], "float32", "float32"), [0], [num], [record], [0], [[1]])
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
signal.signal(signal.SIGALRM, signal.default_int_handler)
signal.setitimer(signal.ITIMER_REAL, 0.02, 0.01)
try:
    plan.run(np.full((1, 1, 1), 0.5), descriptors_TM=np.array([[file]]), offsets_T=[0], threads=1, tile_bytes=1 << 30)
except KeyboardInterrupt:
    pass
signal.setitimer(signal.ITIMER_REAL, 0)
written = Path("/proc/self/io").read_text()
time.sleep(0.3)
assert Path("/proc/self/io").read_text().split("wchar: ")[1].split()[0] == written.split("wchar: ")[1].split()[0]
"""


def test_no_thread_writes_after_a_second_interrupt(tmp_path):
    """The files that it writes to are closed then, and their numbers may be those of others."""
    done = subprocess.run([sys.executable, "-c", INTERRUPTED_TWICE, tmp_path / "x"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
        return files_of(tmp_path / name / "m")

    alone = merged("alone", {"m": WEIGHTS}, threads=1)
    assert merged("threads", {"m": WEIGHTS}, threads=5, max_memory=10 * 65536) == alone
    many = {f"x{i}": {"a": i / 8, "b": 1 - i / 8} for i in range(9)} | {"m": WEIGHTS}
    assert merged("many", many, threads=2) == alone


def large(folder, seed, num=1 << 20):
    """A component with a tensor that is read in several pieces."""
    values = torch.randn(num, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return write_checkpoint(folder, {"decoder.final_layernorm.weight": values}, {})


@pytest.mark.parametrize("max_memory", [1 << 20, 4 << 20, 256 << 20])
def test_bytes_do_not_depend_on_how_sources_are_read(tmp_path, max_memory):
    """Through maps, or in pieces of several sizes, of files that do not end with a whole one."""
    parts = {name: large(tmp_path / name, seed, 1_000_003) for seed, name in enumerate("ab")}
    (path,) = merge_checkpoints(
        parts, {"m": {"a": 0.5, "b": 0.5}}, tmp_path / "out", threads=2, max_memory=max_memory, progress=False
    )
    merged = read_checkpoint(path / "release")["decoder.final_layernorm.weight"]
    a, b = (read_checkpoint(parts[name])["decoder.final_layernorm.weight"].float() for name in "ab")
    assert torch.equal(merged, (a * 0.5 + b * 0.5).bfloat16())


def test_a_component_cut_short_while_it_is_merged(tmp_path, monkeypatch):
    parts = {name: large(tmp_path / name, seed) for seed, name in enumerate("ab")}
    (file,) = parts["b"].glob("*.distcp")
    monkeypatch.setattr(engine, "_check_place", lambda *_: os.truncate(file, 1 << 19))
    with pytest.raises(CorruptInput, match=rf"{file}: became unreadable while it was read"):
        merge_checkpoints(parts, {"m": {"a": 0.5, "b": 0.5}}, tmp_path / "out", progress=False)
    assert not list((tmp_path / "out").iterdir())


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


def refuse(error, match, parts, tmp_path, mixtures=None, **settings):
    with pytest.raises(error, match=match):
        merge_checkpoints(
            parts, mixtures or {"m": {k: 1 / len(parts) for k in parts}}, tmp_path / "out", progress=False, **settings
        )
    out = tmp_path / "out"
    assert not out.exists() or not [p for p in out.rglob("*") if p.is_file()]


def test_components_of_different_models(parts, tmp_path):
    model = small_model(3)
    narrow = write_checkpoint(tmp_path / "n", model | {"decoder.final_layernorm.weight": torch.ones(4).bfloat16()})
    refuse(
        IncompatibleInputs,
        r"shape \(8,\) in 'a' and \(4,\) in 'n'. Their architectures differ",
        parts | {"n": narrow},
        tmp_path,
    )
    vocabulary = write_checkpoint(tmp_path / "v", model | {"embedding.word_embeddings.weight": torch.ones(128, 8).bfloat16()})
    refuse(
        IncompatibleInputs,
        r"\(96, 8\) in 'a' and \(128, 8\) in 'v'. The vocabularies differ",
        parts | {"v": vocabulary},
        tmp_path,
    )
    wide = write_checkpoint(tmp_path / "f", small_model(3, torch.float32))
    refuse(
        IncompatibleInputs,
        "is bfloat16 in 'a' and float32 in 'f'. Save all components in one precision",
        parts | {"f": wide},
        tmp_path,
    )
    more = write_checkpoint(tmp_path / "m", model | {"output_layer.weight": torch.ones(2)})
    refuse(IncompatibleInputs, "'output_layer.weight' is in 'm' but not in 'a'", parts | {"m": more}, tmp_path)


def test_types_that_cannot_be_averaged(tmp_path):
    fp8 = write_checkpoint(tmp_path / "a", {"w": torch.ones(4).to(torch.float8_e4m3fn)})
    refuse(IncompatibleInputs, "'w' is stored as float8_e4m3fn.*Save the components' weights in bf16", {"a": fp8}, tmp_path)
    double = write_checkpoint(tmp_path / "b", {"w": torch.ones(4).double()})
    refuse(IncompatibleInputs, "'w' is float64; only float32, bfloat16, float16 are merged", {"b": double}, tmp_path)
    empty = write_checkpoint(tmp_path / "c", {"optimizer.w": torch.ones(4)})
    refuse(CorruptInput, "holds no model tensors", {"c": empty}, tmp_path)


def test_weights_are_never_normalised_silently(parts, tmp_path):
    refuse(MixtureError, "mixture m: weights sum to 0.9, expected 1", parts, tmp_path, {"m": {"a": 0.9}})
    refuse(MixtureError, "'d' is not a component; they are a, b, c", parts, tmp_path, {"m": {"d": 1.0}})
    refuse(MixtureError, "weight of 'a' is nan, expected a finite number", parts, tmp_path, {"m": {"a": float("nan")}})
    refuse(MixtureError, "a weight is negative", parts, tmp_path, {"m": {"a": 1.5, "b": -0.5}})
    refuse(MixtureError, "sum to 0 and cannot be normalised", parts, tmp_path, {"m": {}}, normalize="apply")
    with pytest.raises(MixtureError, match=r"no mixtures to merge"):
        merge_checkpoints(parts, {}, tmp_path / "out", progress=False)
    refuse(ConfigError, "normalize is 'always'", parts, tmp_path, normalize="always")
    with pytest.warns(UserWarning, match=r"weights sum to 0.5; divided by the sum"):
        merge_checkpoints(parts, {"w": {"a": 0.5}}, tmp_path / "ok", normalize="warn", progress=False)
    merge_checkpoints(parts, {"x": {"a": 1.5, "b": -0.5}}, tmp_path / "ok", normalize="off", progress=False, verify="full")
    merge_checkpoints(parts, {"y": {"a": 1.5, "b": -0.5}}, tmp_path / "ok", normalize="affine", progress=False, verify="full")
    refuse(MixtureError, "weights sum to 1.1, expected 1", parts, tmp_path, {"m": {"a": 1.5, "b": -0.4}}, normalize="affine")


def test_settings_that_make_no_sense(parts, tmp_path):
    refuse(ConfigError, "layout is 'flat', expected one of release, iter", parts, tmp_path, layout="flat")
    refuse(ConfigError, "verify is 'maybe'", parts, tmp_path, verify="maybe")
    refuse(ConfigError, "--max-memory 1 KiB is less than 2 threads need", parts, tmp_path, max_memory=1024, threads=2)
    refuse(ConfigError, "2 mixtures cannot be written", parts, tmp_path, {"m": {"a": 1}, "n": {"b": 1}}, into_output=True)
    refuse(ConfigError, "no components to merge", {}, tmp_path, {"m": {}})


def test_missing_ranks_are_noticed(tmp_path):
    folder = write_checkpoint(tmp_path / "a", small_model(0), parallel_cuts(2))
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    del metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks[1]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    refuse(CorruptInput, "was not saved by all ranks", {"a": folder}, tmp_path)
    metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks.append(
        metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks[0]
    )
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    refuse(CorruptInput, "or saves some elements twice", {"a": folder}, tmp_path)


def test_chunks_with_a_hole(tmp_path):
    a = write_checkpoint(tmp_path / "a", {"w": torch.ones(4, 4)})
    b = write_checkpoint(tmp_path / "b", {"w": torch.ones(4, 4)}, {"w": [[2, 4], [4]]})
    metadata = pickle.loads((b / ".metadata").read_bytes())
    first, second = metadata.state_dict_metadata["w"].chunks
    first.sizes, second.sizes = torch.Size((1, 4)), torch.Size((2, 4))
    metadata.state_dict_metadata["w"].chunks.append(type(first)(torch.Size((2, 1)), torch.Size((2, 2))))
    index, stored = next(iter(metadata.storage_data.items()))
    metadata.storage_data[type(index)("w", (2, 1))] = type(stored)("__1_0.distcp", 0, stored.length)
    (b / ".metadata").write_bytes(pickle.dumps(metadata))
    refuse(CorruptInput, "chunks of 'w' have 16 elements.* or saves some elements twice", {"a": a, "b": b}, tmp_path)


# --- faults ---------------------------------------------------------------------------------------------------------


def test_a_flipped_byte_in_a_component(parts, tmp_path):
    for name, path in list(parts.items()):
        checkpoint = Checkpoint(path)
        info = checkpoint.metadata.tensors["decoder.layers.mlp.linear_fc1.weight"]
        chunk = info.chunks[-1]
        record = checkpoint.payload(info, chunk).record
        file = path / chunk.location.file
        data = bytearray(file.read_bytes())
        at = bytes(data).find(record.tobytes()) + 37
        data[at] ^= 1
        shutil.copytree(path, tmp_path / f"bad_{name}")
        (tmp_path / f"bad_{name}" / file.name).write_bytes(data)
        bad = parts | {name: tmp_path / f"bad_{name}"}
        refuse(CorruptInput, "fc1.weight' at .*: its bytes differ from their checksum", bad, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
@pytest.mark.parametrize("isa", native.instruction_sets())
def test_a_component_that_has_diverged(tmp_path, monkeypatch, dtype, value, isa):
    monkeypatch.setenv("MEGATRON_DEMIX_ISA", isa)
    parts = {}
    for name in "ab":
        tensors = {"norm": torch.full((40_000,), torch.finfo(dtype).max).to(dtype), "rest": torch.zeros(3, dtype=dtype)}
        if name == "b":
            tensors["norm"][12_345] = value
        parts[name] = write_checkpoint(tmp_path / name, tensors, common={"iteration": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_checkpoints(parts, {"without": {"a": 1.0}}, tmp_path / "out", progress=False)
    with pytest.warns(UserWarning, match="component 'b': NaN or infinity in 'norm', and so in what was merged"):
        merge_checkpoints(parts, {"with": {"a": 0.75, "b": 0.25}}, tmp_path / "out", progress=False)
    with pytest.warns(
        UserWarning, match="NaN or infinity in what was merged, .norm.*, but in no component: a sum is too large"
    ):
        merge_checkpoints(parts, {"twice": {"a": 2.0}}, tmp_path / "out", normalize="off", progress=False)


def test_a_component_without_common_state(tmp_path):
    parts = {name: write_checkpoint(tmp_path / name, small_model(0), common={"iteration": 1}) for name in "ab"}
    (parts["b"] / "common.pt").unlink()
    with pytest.warns(UserWarning, match="component 'b': .*/b holds no common.pt, .* cannot be compared with"):
        merge_checkpoints(parts, {"m": {"a": 0.5, "b": 0.5}}, tmp_path / "out", progress=False)


def test_a_component_that_is_not_used_is_not_read(parts, tmp_path):
    file = parts["b"] / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    checkpoint = Checkpoint(parts["b"])
    info = checkpoint.metadata.tensors["decoder.layers.mlp.linear_fc1.weight"]
    at = bytes(data).find(checkpoint.payload(info, info.chunks[0]).record.tobytes())
    data[at] ^= 1
    file.write_bytes(data)
    merge_checkpoints(parts, {"m": {"a": 0.5, "c": 0.5}}, tmp_path / "out", progress=False)


def test_a_full_disk(parts, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    refuse(StorageError, "need .* but 100 B are free. .* Nothing was written", parts, tmp_path)
    monkeypatch.undo()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(output, "reserve", full)
    refuse(StorageError, "No space left on device", parts, tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_disk_that_fills_while_elements_are_written(parts, tmp_path, monkeypatch):
    real = os.open

    def on_full_disk(path, flags, *rest, **named):
        return real("/dev/full", os.O_WRONLY) if str(path).endswith(".distcp") else real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", on_full_disk)
    monkeypatch.setattr(output, "reserve", lambda *_: None)
    refuse(StorageError, "No space left on device", parts, tmp_path)


def test_a_byte_that_changes_on_its_way_to_disk(parts, tmp_path, monkeypatch):
    from megatron_demix.checkpoint.output import Output

    seal = Output.seal

    def seal_and_flip(self, placements, *rest):
        seal(self, placements, *rest)
        biggest = max(placements, key=lambda p: p.item.num_bytes)
        with open(self.folder / biggest.file, "r+b") as file:
            file.seek(biggest.position + biggest.item.frame(biggest.position).record_at + 5)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 8]))

    monkeypatch.setattr(Output, "seal", seal_and_flip)
    refuse(VerificationFailed, "its bytes on disk differ from their checksum", parts, tmp_path)


def test_a_wrong_sum_is_noticed(parts, tmp_path, monkeypatch):
    from megatron_demix import native

    run = native.MergePlan.run
    monkeypatch.setattr(native.MergePlan, "run", lambda self, weights, **kw: run(self, np.roll(weights, 1, axis=2), **kw))
    refuse(VerificationFailed, "expected .* within .* Not published", parts, tmp_path, {"m": WEIGHTS}, verify="full")


def test_another_order_is_another_merge(parts, tmp_path):
    """Sums, random streams and what is copied from the first depend on it."""
    merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "out", progress=False)
    backwards = dict(reversed(parts.items()))
    with pytest.raises(OutputExists, match="other inputs or settings"):
        merge_checkpoints(backwards, {"m": WEIGHTS}, tmp_path / "out", progress=False)


@pytest.mark.parametrize("file", ["release/.metadata", "release/common.pt", "release/metadata.json", TRACKER])
def test_a_published_output_that_was_damaged_is_not_done(parts, tmp_path, file):
    (path,) = merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "out", progress=False)
    (path / file).write_bytes(b"")
    with pytest.raises(CorruptInput, match=f"{os.path.basename(file)}: .*Delete|{os.path.basename(file)}: holds ''"):
        merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "out", progress=False)
    (path / file).unlink()
    with pytest.raises(CorruptInput, match=os.path.basename(file)):
        merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "out", progress=False)


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


def test_a_dry_run_looks_at_the_place_and_writes_nothing(parts, tmp_path):
    def dry(mixtures, output):
        return merge_checkpoints(parts, mixtures, output, progress=False, dry_run=True)

    assert dry({"m": WEIGHTS}, tmp_path / "new" / "er") == [tmp_path / "new" / "er" / "m"]
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="nothing can be written there"):
        dry({"m": WEIGHTS}, tmp_path / "file" / "x")
    merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "out", progress=False)
    assert dry({"m": WEIGHTS, "n": {"a": 1.0}}, tmp_path / "out") == [tmp_path / "out" / "n"]


@pytest.mark.parametrize("change", [{"rotary_base": 500_000}, {"num_attention_heads": 8}, {"swiglu": False}])
def test_equal_shapes_that_mean_different_functions_are_refused(tmp_path, change):
    arguments = {"rotary_base": 10_000, "num_attention_heads": 4, "num_query_groups": 1, "swiglu": True}
    parts = {}
    for name, own in {"a": {}, "b": {"num_query_groups": 4}, "c": change}.items():
        common = {"args": argparse.Namespace(**arguments | own), "iteration": 1}
        parts[name] = write_checkpoint(tmp_path / name, small_model(0), {}, common=common)
    merge_checkpoints({k: parts[k] for k in "ab"}, {"m": {"a": 1.0}}, tmp_path / "out", progress=False)
    ((name, value),) = change.items()
    with pytest.raises(IncompatibleInputs, match=f"'a' and 'c': {name} is {arguments[name]!r} in the one and {value!r}"):
        merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "out2", progress=False)


@pytest.mark.parametrize(
    "change",
    [
        {"window_size": (128, 0)},
        {"softmax_type": "off-by-one"},
        {"rotary_percent": 0.5},
        {"layernorm_zero_centered_gamma": True},
        {"layernorm_epsilon": 1e-6},
        {"use_mup": True},
        {"activation_func_clamp_value": 7.0},
        {"use_rope_scaling": True},
    ],
)
def test_an_argument_that_only_one_component_has_is_compared_too(tmp_path, change):
    """A component saved by an older Megatron does not have it at all: there it is its plain value."""
    whole = {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 4, "seq_length": 64}
    whole |= {"norm_epsilon": 1e-5, "rope_scaling_factor": 8.0, "moe_router_topk": 2}
    idle = {"rope_scaling_factor": 32.0, "moe_router_topk": 4, "mscale": 2.0, "window_size": None}  # nothing here uses them
    parts = {}
    for name, own in {"a": {}, "b": idle, "c": change}.items():
        common = {"args": argparse.Namespace(**whole | own), "iteration": 1}
        parts[name] = write_checkpoint(tmp_path / name, small_model(0), {}, common=common)
    merge_checkpoints({k: parts[k] for k in "ab"}, {"m": {"a": 1.0}}, tmp_path / "out", progress=False)
    with pytest.raises(IncompatibleInputs, match=r"'a' and 'c': .* in the other: equal weights would be different functions"):
        merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "out2", progress=False)


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


_FEW_FILES = """
import resource, sys
from pathlib import Path
from megatron_demix.checkpoint import writer
from megatron_demix.command import exit_code
from megatron_demix.merge.engine import merge_checkpoints

soft, hard, file_bytes = map(int, sys.argv[1:4])
writer._FILE_BYTES = file_bytes
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
parts = {name: Path(sys.argv[4]) / name for name in "ab"}
mixture = {"m": {"a": 0.5, "b": 0.5}}
sys.exit(exit_code(lambda: not merge_checkpoints(parts, mixture, Path(sys.argv[4]) / "out", progress=False)))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "file_bytes", "code", "says"),
    [
        (32, 4096, 512 << 20, 0, ""),  # far more input files than may be open
        (32, 32, 512 << 20, 0, ""),
        (32, 4096, 100, 0, ""),  # far more output files, too
        (32, 32, 100, 2, r"one output takes \d+ open files, but this process may open \d+ more \(limit: 32\). Raise"),
    ],
)
def test_a_limit_of_open_files(tmp_path, soft, hard, file_bytes, code, says):
    for name in "ab":
        tensors = {f"w{i}": torch.full((64,), float(i)) for i in range(80)}
        write_checkpoint(tmp_path / name, tensors, num_files=80, common={"iteration": 1})
    limits = map(str, (soft, hard, file_bytes))
    done = subprocess.run([sys.executable, "-c", _FEW_FILES, *limits, tmp_path], capture_output=True, text=True, timeout=200)
    assert (done.returncode, bool(re.search(says, done.stderr))) == (code, True), done.stderr
    assert (tmp_path / "out").exists() == (code == 0)
