"""A study small enough for a private SLURM of two nodes, and what tests do with it there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from folders import contents
from processes import processes
from slurm_cluster import Cluster, missing_programs

needs_slurm = pytest.mark.skipif(bool(missing_programs()), reason=f"not installed: {', '.join(missing_programs())} (slurm-wlm)")
DEMIX = [sys.executable, "-m", "megatron_demix.cli"]
STUDY = """
name: two-nodes
seed: 7
tokenizer: {type: byte}
prepare: {workers: 1, split: [0.8, 0.1, 0.1]}
domains:
  - {name: code, inputs: ["corpus/code.jsonl"], max_epochs: 8}
  - {name: english, inputs: ["corpus/english.jsonl"], max_epochs: 8}
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 2}
parallel: {data: 2}
train: {seq_length: 32, micro_batch_size: 4, global_batch_size: 8, lr: 3e-3, precision: fp32, save_interval: 50}
base: {tokens: 2560}
component: {maturity_seeds: 0, tokens: 76800}                # 300 steps, long enough to be disturbed
search: {rounds: [8], objective: {code: 0.7, english: 0.3}, candidates: 1000, top: 16}
evaluate: {tokens_per_domain: 1k}
final: {tokens: 2560, baselines: [], blend: materialise}
launch:
  backend: slurm
  slurm:
    {ranks_per_node: 1, cpus_per_task: 1, time: 10min, setup: "export GLOO_SOCKET_IFNAME=lo",
     parts: {data: 2, rounds: 2, blend: 2}}
"""
LIMIT_S = 600


def write_study(folder: Path, corpus: Path) -> Path:
    """The study's file, in a folder that has a corpus beside it."""
    folder.mkdir(exist_ok=True)
    (folder / "corpus").symlink_to(corpus)
    (folder / "study.yaml").write_text(STUDY)
    return folder / "study.yaml"


def demix(cluster: Cluster, command: str, study: Path, *more: str) -> subprocess.Popen:
    arguments = [*DEMIX, command, str(study), "--runs", str(study.parent), *more]
    return subprocess.Popen(arguments, env=cluster.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def states(cluster: Cluster, study: Path, *more: str) -> dict[str, dict]:
    out, errors = demix(cluster, "status", study, "--json", *more).communicate(timeout=LIMIT_S)
    assert out, errors
    return {row["stage"]: row for row in json.loads(out)}


def wait_for(what: str, reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not reached():
        assert time.monotonic() < deadline, f"waited {LIMIT_S} s for {what}"
        time.sleep(0.05)


def iterations(run: Path, stage: str) -> int:
    for path in run.glob(f"logs/{stage}-*.heartbeat"):
        try:
            return json.loads(path.read_text())["done"]
        except (OSError, ValueError):
            pass
    return 0


def stop_components(run: Path, ranks: int, iteration: int = 60) -> dict[str, list[int]]:
    """SIGSTOP for the ranks of each component that is past an iteration, so that none ends while others still start."""
    stopped: dict[str, list[int]] = {}

    def both_stopped() -> bool:
        for name in {"code", "english"} - set(stopped):
            if iterations(run, f"components.{name}") > iteration:
                stopped[name] = processes("megatron_demix.pipeline.worker", f"{run}/logs/components.{name}-")
                for pid in stopped[name]:
                    os.kill(pid, signal.SIGSTOP)
        return len(stopped) == 2

    wait_for("both components", both_stopped)
    assert [len(pids) for pids in stopped.values()] == [ranks, ranks]
    return stopped


def is_asked_to_stop(pid: int) -> bool:
    """Whether SIGTERM waits for a process that is stopped."""
    status = Path(f"/proc/{pid}/status").read_text()
    pending = next(line.split()[1] for line in status.splitlines() if line.startswith("ShdPnd"))
    return bool(int(pending, 16) >> (signal.SIGTERM - 1) & 1)


def job_of(cluster: Cluster, study_name: str, group: str, index: int | str = "N/A") -> str:
    rows = cluster.run("squeue", "--noheader", "--array", "--format=%A %j %K").split("\n")
    return next(j for j, name, k in map(str.split, filter(None, rows)) if name == f"{study_name}.{group}" and k == str(index))


def make_again(run: Path, job: str, work: Path, *, ranks: int) -> dict[str, str]:
    """The same job on this machine, undisturbed."""
    path = work.with_suffix(".json")
    elsewhere = {"work": str(work), "heartbeat": None} | ({"tensorboard": None} if job.startswith("components") else {})
    path.write_text(json.dumps(json.loads((run / "logs" / job).read_text()) | elsewhere))
    work.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "megatron_demix.launch.ranks", "--standalone", f"--nproc-per-node={ranks}"]
    subprocess.run([*command, "-m", "megatron_demix.pipeline.worker", path], check=True, timeout=LIMIT_S, capture_output=True)
    return contents(work)
