"""A short run of the coverage-guided fuzzer, from the committed corpus. Long runs: tests/native/fuzz_readers.py itself."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris has no build for this Python")
@pytest.mark.parametrize("target", ["metadata", "payload", "common"])
def test_readers_survive(target, tmp_path):
    command = [sys.executable, str(HERE / "fuzz_readers.py"), target, "-runs=3000", "-seed=1", "-max_len=8192"]
    # The first folder takes new inputs; the committed ones are only read.
    (tmp_path / "found").mkdir()
    done = subprocess.run(
        [*command, str(tmp_path / "found"), str(HERE / "corpus" / target)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Done 3000 runs" in done.stderr
