"""A study on a real SLURM of two nodes: sbatch, srun, torchrun and gloo across them, and faults while it runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from dist_checkpoints import small_model, write_checkpoint
from slurm_cluster import Cluster, missing_programs, private_cluster

from megatron_demix.artifact import hash_file
from megatron_demix.pipeline.dag import build_dag
from megatron_demix.study.load import load_study

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(missing_programs()), reason=f"not installed: {', '.join(missing_programs())} (slurm-wlm)"),
]
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
component: {tokens: 76800}                # 300 steps, long enough to be disturbed
search: {rounds: [8], objective: {code: 0.7, english: 0.3}, candidates: 1000, top: 16}
evaluate: {tokens_per_domain: 1k}
final: {tokens: 2560, baselines: [], blend: materialise}
launch:
  backend: slurm
  slurm:
    {ranks_per_node: 1, cpus_per_task: 1, time: 10min, setup: "export GLOO_SOCKET_IFNAME=lo",
     parts: {data: 2, rounds: 2, blend: 2}}
"""
LIMIT_S = 300


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    with private_cluster(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running


@pytest.fixture(scope="module")
def study(study_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two-nodes")
    (folder / "corpus").symlink_to(study_folder / "corpus")
    (folder / "study.yaml").write_text(STUDY)
    return folder / "study.yaml"


def demix(cluster: Cluster, command: str, study: Path, *more: str) -> subprocess.Popen:
    arguments = [*DEMIX, command, str(study), "--runs", str(study.parent), *more]
    return subprocess.Popen(arguments, env=cluster.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def states(cluster: Cluster, study: Path) -> dict[str, dict]:
    out, errors = demix(cluster, "status", study, "--json").communicate(timeout=60)
    assert out, errors
    return {row["stage"]: row for row in json.loads(out)}


def given_base(study: Path) -> list[str]:
    """Settings for a base of random tensors, from which a stand-in for Megatron-LM "trains" components."""
    tests = Path(__file__).parents[1]
    base = study.parent / "base"
    write_checkpoint(base / "release", small_model(0))
    (base / "latest_checkpointed_iteration.txt").write_text("release")
    checkout = study.parent / "Megatron-LM" / "megatron" / "core"
    checkout.mkdir(parents=True)
    (checkout / "package_info.py").write_text("MAJOR = 0\nMINOR = 16\n")
    trainer = {"backend": "megatron_lm", "checkout": "Megatron-LM", "script": tests / "stand_in_pretrain.py"}
    settings = ["name=stock", "base={checkpoint: base}", *(f"trainer.{k}={v}" for k, v in trainer.items())]
    return [word for setting in [*settings, "trainer.args=--stand-in early"] for word in ("--set", setting)]


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


def processes(*words: str) -> list[int]:
    """Processes whose command line has all these words, other than torchrun's, which repeats that of its ranks."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if "launch.ranks" not in line and all(word in line for word in words) and int(path.parent.name) != os.getpid():
            found.append(int(path.parent.name))
    return found


def job_of(cluster: Cluster, study_name: str, group: str, index: int | str = "N/A") -> str:
    rows = cluster.run("squeue", "--noheader", "--array", "--format=%A %j %K").split("\n")
    return next(j for j, name, k in map(str.split, filter(None, rows)) if name == f"{study_name}.{group}" and k == str(index))


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): hash_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_disturbed_study_is_finished_and_the_same(cluster, study, tmp_path):
    run = study.parent / "two-nodes"
    both = [demix(cluster, "submit", study) for _ in range(2)]
    said = [process.communicate(timeout=120) for process in both]
    assert sorted(process.returncode for process in both) == [0, 75], said
    loser = said[0 if both[0].returncode else 1][1]
    assert "another demix process that works on" in loser or "already being worked on by the SLURM jobs" in loser

    # The time limit nears for one component; the other loses a rank of the second node.
    wait_for("both components", lambda: iterations(run, "components.code") > 60 and iterations(run, "components.english") > 60)
    found = states(cluster, study)
    assert found["components/code"]["state"] == "running"
    assert found["final/scores"]["state"] == "queued"
    cluster.run("scancel", "--signal=USR1", "--batch", job_of(cluster, "two-nodes", "components", 0))
    workers = processes("megatron_demix.pipeline.worker", "/components.english-")
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    # The controller is not there for a while; the jobs go on.
    cluster.kill_daemon("slurmctld")
    time.sleep(1)
    cluster.start_daemon("slurmctld")

    # The batch script of the final run is killed: nothing puts it back into the queue, and what needs it is dropped.
    wait_for("the final run", lambda: bool(processes("megatron_demix.launch.stage", "final/found-seed0")))
    job = int(job_of(cluster, "two-nodes", "final.found-seed0"))
    (script,) = processes(f"{cluster.folder}/", f"/job{job:05d}/slurm_script")
    os.kill(script, signal.SIGKILL)

    wait_for("the report", lambda: (run / "report" / "index.html").exists())
    found = states(cluster, study)
    assert {row["state"] for row in found.values()} == {"done"}
    log = "".join(p.read_text() for p in sorted((run / "logs" / "slurm").glob("*.log")))
    assert "components/code is not finished (code 75): back into the queue" in log
    assert "components/english is not finished (code 75): back into the queue" in log
    assert "submitted again as" in log

    for name in ("code", "english"):
        published = next(run.glob(f"components/{name}-*"))
        undisturbed = run_again(run, f"components.{published.name}.json", tmp_path / name, ranks=2)
        assert {k: v for k, v in contents(published).items() if k != "manifest.json"} == undisturbed
    check_what_was_made_in_parts(study, run, tmp_path)

    again, errors = demix(cluster, "submit", study, "--json").communicate(timeout=120)
    assert list(json.loads(again)["jobs"]) == ["conclude"], errors


def check_what_was_made_in_parts(study: Path, run: Path, folder: Path) -> None:
    """An array for the domains, the round's proxies, the blend; and the bytes are those that one process makes."""
    logs = [p.name.rpartition("-")[0] for p in (run / "logs" / "slurm").glob("*.parts-*.log")]
    assert [logs.count(f"{group}.parts") for group in ("data", "rounds.1.scores", "blend.found")] == [4, 2, 2]
    dag = build_dag(load_study(study), study, folder / "alone")
    dag.tokenizer.finish()
    for name, stage in dag.data.items():
        stage.finish()
        assert contents(stage.folder) == contents(run / "data" / stage.folder.name), name
    scored = next(run.glob("rounds/1/scores-*"))
    again = run_again(run, f"rounds.1.{scored.name}.json", folder / "scores", ranks=1)
    assert again == {k: v for k, v in contents(scored).items() if k != "manifest.json"}


def run_again(run: Path, job: str, work: Path, *, ranks: int) -> dict[str, str]:
    """The same job on this machine, undisturbed."""
    path = work.with_suffix(".json")
    elsewhere = {"work": str(work), "heartbeat": None} | ({"tensorboard": None} if job.startswith("components") else {})
    path.write_text(json.dumps(json.loads((run / "logs" / job).read_text()) | elsewhere))
    work.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "megatron_demix.launch.ranks", "--standalone", f"--nproc-per-node={ranks}"]
    subprocess.run([*command, "-m", "megatron_demix.pipeline.worker", path], check=True, timeout=200, capture_output=True)
    return contents(work)


def test_cancel_saves_and_resume_goes_on(cluster, study, tmp_path):
    run = tmp_path / "two-nodes"
    more = ["--set", "component.tokens=2M", "--set", "base.tokens=256", "--runs", str(tmp_path)]
    _, errors = demix(cluster, "submit", study, *more).communicate(timeout=120)
    wait_for("a component", lambda: iterations(run, "components.code") > 20)
    out, errors = demix(cluster, "cancel", study, *more).communicate(timeout=200)
    assert "have saved and stopped; `demix resume` goes on" in out, errors
    assert cluster.jobs() == []
    assert list(run.glob("components/.code-*.work/iter_*"))
    assert not list(run.glob("components/*/manifest.json"))
    out, errors = demix(cluster, "cancel", study, *more).communicate(timeout=200)
    assert out == "nothing is running\n", errors


def test_text_is_cleaned_by_arrays(cluster, tmp_path):
    """By tools/clean_data.py --slurm: the bytes of a cleaning on this machine; a pass that fails takes those after it along."""
    pytest.importorskip("datatrove")
    texts = {"a": ["one text", "another", "one text"], "b": ["another", "a third"]}
    for name, own in texts.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in own))
    tool = Path(__file__).parents[2] / "tools" / "clean_data.py"

    def clean(output: str, *more: str, b: str = "b.jsonl") -> subprocess.CompletedProcess:
        command = [sys.executable, tool, "--input", "a=a.jsonl", f"b={b}", "--output", output, "--ngram", "0", *more]
        return subprocess.run(command, cwd=tmp_path, env=cluster.environment, capture_output=True, text=True, timeout=120)

    slurm = ("--slurm", "partition=debug", "time=0:10:00", "mem_per_cpu_gb=1", "tasks_per_job=8")
    submitted = clean("out", *slurm)
    assert (submitted.returncode, submitted.stdout[:10]) == (0, "submitted;"), submitted.stderr
    (tmp_path / "bad.jsonl").write_text("no JSON\n")
    assert clean("bad", *slurm, b="bad.jsonl").returncode == 0
    wait_for("both cleanings", lambda: not cluster.jobs())
    assert clean("here").returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "here")
    again = clean("out", *slurm)
    assert (again.returncode, json.loads(again.stdout)["domains"]["b"]["documents"]) == (0, 2), again.stderr
    assert not (tmp_path / ".out.work").exists()
    assert not (tmp_path / "bad").exists()
    assert "bad.jsonl:1: not JSON" in "".join(p.read_text() for p in (tmp_path / ".bad.work").rglob("*.out"))


def test_stock_megatron_lm_across_two_nodes(cluster, study):
    """Its job ends without an error half way, and goes back into the queue until the tracker names the last iteration. The
    last rank, which is heard, is on the other node than the one that publishes."""
    settings = given_base(study)
    submitted = demix(cluster, "submit", study, *settings)
    _, errors = submitted.communicate(timeout=60)
    assert submitted.returncode == 0, errors
    run = study.parent / "stock"
    try:
        wait_for("the components", lambda: len(list(run.glob("components/*/manifest.json"))) == 2)
    finally:
        demix(cluster, "cancel", study, *settings).communicate(timeout=150)
    for name in ("code", "english"):
        (other,) = run.glob(f"logs/components.{name}-*.node1.log")
        assert other.with_suffix("").with_suffix(".log").read_text().count("rank 0 starting after iteration") >= 2
        assert "rank 1 starting after iteration 150" in other.read_text()
        (losses,) = run.glob(f"components/{name}-*/losses.jsonl")
        assert [json.loads(line)["iteration"] for line in losses.read_text().splitlines()] == list(range(1, 301))
