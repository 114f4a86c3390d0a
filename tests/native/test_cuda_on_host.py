"""The CUDA merge's own lines, compiled for the CPU with sanitizers, against the portable kernels, bit for bit."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_bits_of_the_cpu_kernels(tmp_path):
    program = tmp_path / "cuda_on_host"
    sources = [ROOT / "tests/native/cuda_on_host.cpp", *sorted((ROOT / "csrc").glob("kernels_*.cpp"))]
    command = ["g++", "-std=c++17", "-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    command += ["-I", str(ROOT / "csrc"), *map(str, sources), "-o", str(program)]
    subprocess.run(command, check=True, timeout=600, capture_output=True)
    done = subprocess.run([program, "1", "1000", "1000000"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "1000 cases, 1000000 floats: the same bits\n"
