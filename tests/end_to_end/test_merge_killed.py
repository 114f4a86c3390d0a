"""A merge that is killed leaves nothing published, and the next one starts clean. The tool, as users run it."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from dist_checkpoints import write_checkpoint
from folders import contents

TOOL = Path(__file__).parents[2] / "tools" / "merge_dist_ckpt.py"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    tensors = [{f"w{i}": torch.full((512, 512), float(k + i)) for i in range(8)} for k in range(3)]
    return {f"c{k}": write_checkpoint(root / f"c{k}", t) for k, t in enumerate(tensors)}


def command(parts, weights, output):
    named = [f"{name}={path}" for name, path in parts.items()]
    return [sys.executable, str(TOOL), "--components", *named, "--weights", str(weights), "--output", str(output), "--quiet"]


def test_kill_at_random_moments_then_run_again(parts, tmp_path):
    weights = tmp_path / "weights.jsonl"
    rows = [{"name": f"m{i}", "weights": {"c0": i / 8, "c1": 1 - i / 8}} for i in range(6)]
    weights.write_text("".join(json.dumps(row) + "\n" for row in rows))
    started = time.monotonic()
    subprocess.run(command(parts, weights, tmp_path / "whole"), check=True, capture_output=True, timeout=200)
    took = time.monotonic() - started
    whole = contents(tmp_path / "whole")

    chance, out = random.Random(4), tmp_path / "out"
    for _ in range(6):
        child = subprocess.Popen(command(parts, weights, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(took * chance.uniform(0.3, 1.0))
        child.send_signal(signal.SIGKILL)
        child.wait()
        # What bears its final name is whole; everything else is temporary.
        for name in os.listdir(out) if out.exists() else ():
            if not name.startswith("."):
                assert {f"{name}/{file}": data for file, data in contents(out / name).items()}.items() <= whole.items()
    subprocess.run(command(parts, weights, out), check=True, capture_output=True, timeout=200)
    assert contents(out) == whole


def test_a_quiet_merge_that_is_asked_to_stop_leaves_nothing(parts, tmp_path):
    """SIGTERM while the core is at work: a pass of many outputs, whose files are seen to be there."""
    weights, out = tmp_path / "weights.jsonl", tmp_path / "out"
    weights.write_text(
        "".join(json.dumps({"name": f"m{i}", "weights": {"c0": i / 40, "c1": 1 - i / 40}}) + "\n" for i in range(40))
    )
    child = subprocess.Popen(command(parts, weights, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while child.poll() is None and not list(out.rglob("*.distcp")):
        time.sleep(0.002)
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=200)
    assert (child.returncode, said) == (130, "stopped; nothing was published.\n")
    assert not list(out.iterdir())


def test_the_tool_reports_errors_by_exit_code(parts, tmp_path):
    def run(*arguments):
        done = subprocess.run([sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True, timeout=200)
        return done.returncode, done.stdout, done.stderr

    a, b = parts["c0"], parts["c1"]
    code, out, _ = run(f"{a}:0.5", f"{b}:0.5", "--output", tmp_path / "m", "--dry-run")
    assert code == 0
    assert "2 components, 8 tensors, 8.03 MiB each" in out
    assert not (tmp_path / "m").exists()
    assert run(f"{a}:0.5", "--output", tmp_path / "m")[0] == 4
    code, _, err = run(a, "--output", tmp_path / "m")
    assert (code, "expected PATH:WEIGHT" in err) == (2, True)
    assert run(f"{a}:0.5", f"{tmp_path / 'absent'}:0.5", "--output", tmp_path / "m")[0] == 2
    assert run("--components", f"x={a}", "--output", tmp_path / "m")[0] == 2
    assert run(f"{a}:0.5", f"{b}:0.5", "--output", tmp_path / "m")[0] == 0
    assert run(f"{a}:1", "--output", tmp_path / "m")[0] == 6
