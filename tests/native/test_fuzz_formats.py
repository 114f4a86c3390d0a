"""The parsers of .idx files, JSON Lines and pickles' opcodes under AddressSanitizer and UBSan, fed with mutated files."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXECUTIONS = 200_000


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ builds the fuzz target")
def test_no_input_makes_the_parsers_read_astray(tmp_path):
    parsers = [ROOT / "csrc" / f"{name}.cpp" for name in ("index_file", "json_lines", "pickle_scan")]
    sources = [ROOT / "tests/native/fuzz_formats.cpp", *parsers]
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{ROOT / 'csrc'}"]
    build = subprocess.run(["g++", *flags, *sources, "-o", tmp_path / "fuzz"], capture_output=True, text=True, timeout=600)
    if "cannot find" in build.stderr and "asan" in build.stderr:
        pytest.skip("the compiler has no AddressSanitizer run-time")
    assert build.returncode == 0, build.stderr
    run = subprocess.run([tmp_path / "fuzz", str(EXECUTIONS), "1"], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    executions, indexes, lines, pickles = map(int, run.stdout.split())
    assert executions == EXECUTIONS
    # The mutations must leave some inputs sound, or nothing behind the checks was reached.
    assert indexes > EXECUTIONS / 50
    assert lines > EXECUTIONS / 10
    assert pickles > EXECUTIONS / 10
