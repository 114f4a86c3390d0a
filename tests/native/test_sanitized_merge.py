"""The merge core, compiled with AddressSanitizer and UndefinedBehaviorSanitizer, over random plans and hostile bytes."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    "merge.cpp",
    "merge_plan.cpp",
    "merge_tile.cpp",
    "merge_sum.cpp",
    "merge_write.cpp",
    "read_ahead.cpp",
    "delta_sum.cpp",
    "delta_kernels.cpp",
    "row_reader.cpp",
    "tensor_statistics.cpp",
    "crc32.cpp",
    "record_check.cpp",
    "kernels_scalar.cpp",
    "kernels_avx2.cpp",
    "kernels_avx512.cpp",
    "kernels_avx512bf16.cpp",
    "pickle_scan.cpp",
]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize(("sanitizers", "plans", "pickles"), [("address,undefined", 400, 200_000), ("thread", 150, 0)])
def test_nothing_for_the_sanitizers_to_report(tmp_path, sanitizers, plans, pickles):
    program = tmp_path / "sanitized_merge"
    command = ["g++", "-std=c++17", "-O1", "-g1", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-pthread"]
    command += ["-I", str(ROOT / "csrc"), str(ROOT / "tests/native/sanitized_merge.cpp")]
    command += [str(ROOT / "csrc" / name) for name in SOURCES]
    subprocess.run([*command, "-o", str(program)], check=True, timeout=600, capture_output=True)
    done = subprocess.run([str(program), "1", str(plans), str(pickles)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"{plans} plans, {pickles} pickles: no error\n"
