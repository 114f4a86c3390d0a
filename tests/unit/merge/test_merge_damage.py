"""Merging checkpoints on disk: damage, full disks, limits and interrupts. Nothing wrong is ever published."""

import errno
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from dist_checkpoints import (
    one_large_tensor,
    three_components,
    write_checkpoint,
)
from refused_merges import refuse

from megatron_demix import native
from megatron_demix.checkpoint import output
from megatron_demix.checkpoint.layout import TRACKER
from megatron_demix.checkpoint.reader import Checkpoint
from megatron_demix.errors import (
    CorruptInput,
    StorageError,
    VerificationFailed,
)
from megatron_demix.merge import engine, oracle
from megatron_demix.merge.components import Components
from megatron_demix.merge.engine import merge_checkpoints
from megatron_demix.merge.verify import verify_merge

WEIGHTS = {"a": 0.5, "b": 0.25, "c": 0.25}


@pytest.fixture
def parts(tmp_path):
    return three_components(tmp_path)


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


def test_a_component_cut_short_while_it_is_merged(tmp_path, monkeypatch):
    parts = {name: one_large_tensor(tmp_path / name, seed) for seed, name in enumerate("ab")}
    (file,) = parts["b"].glob("*.distcp")
    monkeypatch.setattr(engine, "_check_place", lambda *_: os.truncate(file, 1 << 19))
    with pytest.raises(CorruptInput, match=rf"{file}: became unreadable while it was read"):
        merge_checkpoints(parts, {"m": {"a": 0.5, "b": 0.5}}, tmp_path / "out", progress=False)
    assert not list((tmp_path / "out").iterdir())


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
    mixtures = {"with": {"a": 0.75, "b": 0.25}, "beside": {"a": 1.0}}
    with pytest.warns(UserWarning, match="component 'b': NaN or infinity in 'norm', and so in what was merged"):
        merge_checkpoints(parts, mixtures, tmp_path / "out", progress=False)
    with pytest.warns(
        UserWarning, match="NaN or infinity in what was merged, .norm.*, but in no component: a sum is too large"
    ):
        merge_checkpoints(parts, {"twice": {"a": 2.0}}, tmp_path / "out", normalize="off", progress=False)


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


def test_each_disk_is_asked_for_what_lies_on_it(parts, tmp_path, monkeypatch):
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs two file systems")
    usage, weights = shutil.disk_usage(tmp_path), {"a": 0.5, "b": 0.5}
    with TemporaryDirectory(dir=shared) as other:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100 if Path(path) == Path(other) else 10**9))
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "second").symlink_to(Path(other, "second"))
        with pytest.raises(StorageError, match=rf"^{other}: 1 merged checkpoints of .* but 100 B are free"):
            merge_checkpoints(parts, {"first": weights, "second": weights}, tmp_path / "out", progress=False)
        merge_checkpoints(parts, {"first": weights}, tmp_path / "out", progress=False)
        assert os.listdir(other) == []


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


def test_one_wrong_element_is_noticed(parts):
    components = Components({"a": parts["a"]})

    def compare(off):
        def expected(key, places):
            (values,) = oracle.component_values(components, key, places)
            values[-1] += off
            return [oracle.Expected(values, np.zeros(len(values)))]

        verify_merge(parts["a"], components, expected, "full", "m")

    compare(0.0)
    with pytest.raises(VerificationFailed, match=r"expected .* within .* Not published"):
        compare(1.0)


def test_a_wrong_sum_is_noticed(parts, tmp_path, monkeypatch):
    from megatron_demix import native

    run = native.MergePlan.run
    monkeypatch.setattr(native.MergePlan, "run", lambda self, weights, **kw: run(self, np.roll(weights, 1, axis=2), **kw))
    refuse(VerificationFailed, "expected .* within .* Not published", parts, tmp_path, {"m": WEIGHTS}, verify="full")


@pytest.mark.parametrize("file", ["release/.metadata", "release/common.pt", "release/metadata.json", TRACKER])
def test_a_published_output_that_was_damaged_is_not_done(parts, tmp_path, file):
    (path,) = merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "out", progress=False)
    (path / file).write_bytes(b"")
    with pytest.raises(CorruptInput, match=f"{os.path.basename(file)}: .*Delete|{os.path.basename(file)}: holds ''"):
        merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "out", progress=False)
    (path / file).unlink()
    with pytest.raises(CorruptInput, match=os.path.basename(file)):
        merge_checkpoints(parts, {"m": WEIGHTS}, tmp_path / "out", progress=False)


_FEW_FILES = """
import resource, sys
from pathlib import Path
from megatron_demix.checkpoint import writer
from megatron_demix.exits import exit_code
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
