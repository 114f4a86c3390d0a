"""A short run of benchmarks/faults.py: whatever is done to it, a study is finished, and with the same bytes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "faults.py"


@pytest.mark.timeout(1800)
def test_random_faults_change_nothing(tmp_path):
    options = ["--part", "train", "--studies", "1", "--faults", "3", "--gap", "2", "--seed", "5"]
    command = [sys.executable, str(BENCHMARK), *options, "--output", str(tmp_path / "faults.json")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1700)
    assert result.returncode == 0, result.stdout + result.stderr
    summary = json.loads((tmp_path / "faults.json").read_text())["total"]
    assert summary["studies finished"] == 1
    assert summary["artifacts different or missing"] == 0
    assert summary["faults"] >= 1
