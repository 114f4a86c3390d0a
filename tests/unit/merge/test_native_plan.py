"""What the native layer refuses before it touches memory, and its checksum."""

import os
import subprocess
import sys
import zlib

import numpy as np
import pytest

from megatron_demix import native
from megatron_demix.errors import ConfigError
from megatron_demix.native import MergePlan


def test_crc32_is_zlibs():
    data = os.urandom(70000)
    for n in (0, 1, 15, 16, 63, 64, 127, 128, 129, 255, 256, 511, 512, 513, 1023, 4096, 65537):
        assert native.crc32(data[:n]) == zlib.crc32(data[:n])
        assert native.crc32(memoryview(data)[3 : 3 + n]) == zlib.crc32(data[3 : 3 + n])


def test_unknown_instruction_set(monkeypatch):
    assert native.instruction_sets()[0] == "scalar"
    monkeypatch.setenv("MEGATRON_DEMIX_ISA", "mmx")
    with pytest.raises(ConfigError, match=r"MEGATRON_DEMIX_ISA is 'mmx'; this processor has scalar"):
        native.instruction_set()


@pytest.fixture
def plan():
    plan = MergePlan(2)
    for _ in range(2):
        plan.add_record(np.zeros(64, np.uint8), 0)
    plan.add_target([4, 4], "float32", "float32")
    return plan


@pytest.mark.parametrize(
    ("lo", "hi", "offsets", "strides", "says"),
    [
        ([0, 0], [4, 5], [0, 0], [[4, 1]] * 2, "a region leaves its target"),
        ([0, 2], [4, 2], [0, 0], [[4, 1]] * 2, "a region leaves its target"),
        ([0, 0], [4, 4], [0, 4], [[4, 1]] * 2, "a source leaves its record"),
        ([0, 0], [4, 4], [0, 2**63], [[4, 1]] * 2, "a source leaves its record"),
        ([0, 0], [4, 4], [0, 0], [[4, 1], [2**62, 2**62]], "a source leaves its record"),
        ([0, 0], [4, 4], [0, 0], [[4, 1], [-4, 1]], "a source has a negative stride"),
        ([0], [4], [0, 0], [[4, 1]] * 2, "do not have the sizes"),
    ],
)
def test_regions_that_leave_memory(plan, lo, hi, offsets, strides, says):
    with pytest.raises(ValueError, match=says):
        plan.add_region(0, lo, hi, [0, 1], offsets, strides)


def test_targets_and_runs_that_do_not_fit(plan):
    with pytest.raises(ValueError, match=r"1 to 8 dimensions"):
        plan.add_target([1] * 9, "float32", "float32")
    with pytest.raises(ValueError, match=r"must be finite"):
        plan.run(np.full((1, 1, 2), np.inf), addresses_TM=np.zeros((1, 1), np.int64))
    with pytest.raises(ValueError, match=r"addresses have shape \(2, 1\), expected \(1, 1\)"):
        plan.run(np.ones((1, 1, 2)), addresses_TM=np.zeros((2, 1), np.int64))
    with pytest.raises(ValueError, match=r"either addresses or descriptors"):
        plan.run(np.ones((1, 1, 2)))
    with pytest.raises(ValueError, match=r"weights must be \[sets, M, K\]"):
        plan.run(np.ones((1, 1, 3)), addresses_TM=np.zeros((1, 1), np.int64))
    with pytest.raises(ValueError, match=r"contiguous uint8"):
        plan.add_record(np.zeros(8, np.float32), 0)


def test_a_write_that_fails_names_its_cause(tmp_path):
    plan = MergePlan(1)
    plan.add_record(np.zeros(64, np.uint8), 0)
    plan.add_target([16], "float32", "float32")
    plan.add_region(0, [0], [16], [0], [0], [[1]])
    with open(os.devnull, "rb") as read_only, pytest.raises(OSError, match=r"Bad file descriptor"):
        plan.run(np.ones((1, 1, 1)), descriptors_TM=np.array([[read_only.fileno()]]), offsets_T=[0])


# Where a stack of 8 MiB fits for a few of the threads, or for none.
@pytest.mark.parametrize("mib", [5, 30])
def test_fewer_threads_than_asked_for(tmp_path, mib):
    code = f"""
import resource, sys
import numpy as np
from megatron_demix.native import MergePlan
n = 1 << 16
plan = MergePlan(2)
for k in range(2):
    plan.add_record(np.full(n, k + 1, np.float32).view(np.uint8), 0)
plan.add_target([n], "float32", "float32")
plan.add_region(0, [0], [n], [0, 1], [0, 0], [[1], [1]])
weights, out = np.array([[[0.25, 0.75]]]), np.zeros(n, np.float32)
resource.setrlimit(resource.RLIMIT_STACK, (8 << 20, resource.getrlimit(resource.RLIMIT_STACK)[1]))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + ({mib} << 20), resource.RLIM_INFINITY))
plan.run(weights, addresses_TM=np.array([[out.ctypes.data]]), threads=64, tile_bytes=4096)
assert (out == 1.75).all()
with open(sys.argv[1], "wb") as file:
    plan.run(weights, descriptors_TM=np.array([[file.fileno()]]), offsets_T=[0], threads=64, tile_bytes=4096)
assert plan._plan.done_bytes() == out.nbytes
core = sys.modules["megatron_demix.native.core"].core
assert core.gram(plan._plan, False, 64, "scalar") == [n, 2 * n, 2 * n, 4 * n]
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (np.fromfile(tmp_path / "out", np.float32) == 1.75).all()


def test_progress_and_interruption(tmp_path):
    plan = MergePlan(1)
    plan.add_record(np.zeros(1 << 20, np.uint8), 0)
    plan.add_target([1 << 18], "float32", "float32")
    plan.add_region(0, [0], [1 << 18], [0], [0], [[1]])
    out, seen = np.empty(1 << 20, np.uint8), []
    plan.run(np.ones((1, 1, 1)), addresses_TM=np.array([[out.ctypes.data]]), progress=seen.append)
    assert seen[-1] == 1 << 20

    def interrupt(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan.run(np.ones((1, 1, 1)), addresses_TM=np.array([[out.ctypes.data]]), progress=interrupt)


def test_scan_pickle():
    import pickle

    assert native.scan_pickle(b"") == 0
    for protocol in range(6):
        assert native.scan_pickle(pickle.dumps({"a": [1, 2.0, "x" * 300, b"y", (None, True)], 3: 10**30}, protocol)) == -1
    assert native.scan_pickle(b"\x80\x02Nr\xff\xff\xff\x7f.") == 3
    assert native.scan_pickle(b"Np99999\n.") == 1
    assert native.scan_pickle(b"X\xff\xff\xff\xffabc.") == 0
    assert native.scan_pickle(b"\xff.") == 0
    assert native.scan_pickle(b"N") == 1
