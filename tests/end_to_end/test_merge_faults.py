"""A few faults of each kind under merges. Many of them: benchmarks/merge_faults.py itself; its record is committed."""

import json
import subprocess
import sys
from pathlib import Path

COMMAND = Path(__file__).parents[2] / "benchmarks" / "merge_faults.py"


def test_nothing_wrong_is_published_and_nothing_stops_the_next_run(tmp_path):
    arguments = ["--faults", "20", "--seed", "7", "--work", str(tmp_path / "work"), "--output", str(tmp_path / "out.json")]
    done = subprocess.run([sys.executable, str(COMMAND), *arguments], capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["broken_promises"] == 0
    assert sum(n for found in result["outcomes"].values() for n in found.values()) == 20
    # The machinery does harm at all, and only the disk that fills needs root.
    assert set(result["outcomes"]["byte of a payload"]) == {"refused (7)"}
    assert set(result["outcomes"]["file size limit"]) == {"refused (74)"}
    assert len(result["outcomes"]) in (9, 10)
