"""A study on a real SLURM of two nodes: sbatch, srun, torchrun and gloo across them, and faults while it runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dist_checkpoints import small_model, write_checkpoint
from folders import contents
from processes import held, processes
from slurm_cluster import Cluster, private_cluster
from slurm_study import (
    LIMIT_S,
    demix,
    is_asked_to_stop,
    iterations,
    job_of,
    make_again,
    needs_slurm,
    states,
    stop_components,
    wait_for,
    write_study,
)

from megatron_demix.pipeline.dag import build_dag
from megatron_demix.study.load import load_study

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.timeout(1800), needs_slurm]


@pytest.fixture(scope="module")
def study(study_folder, tmp_path_factory) -> Path:
    return write_study(tmp_path_factory.mktemp("two-nodes"), study_folder / "corpus")


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
    settings = [
        "name=stock",
        "base={checkpoint: base}",
        "model.padded_vocab_size=384",
        *(f"trainer.{k}={v}" for k, v in trainer.items()),
    ]
    return [word for setting in [*settings, "trainer.args=--stand-in early"] for word in ("--set", setting)]


def test_a_disturbed_study_is_finished_and_the_same(cluster, study, tmp_path):
    run = study.parent / "two-nodes"
    both = [demix(cluster, "submit", study) for _ in range(2)]
    said = [process.communicate(timeout=LIMIT_S) for process in both]
    assert sorted(process.returncode for process in both) == [0, 75], said
    loser = said[0 if both[0].returncode else 1][1]
    assert "another demix process that works on" in loser or "already being worked on by the SLURM jobs" in loser

    # The time limit nears for one component; the other loses a rank of the second node.
    ranks = stop_components(run, 2)
    with held(ranks["code"] + ranks["english"]):
        found = states(cluster, study)
        assert found["components/code"]["state"] == "running"
        assert found["final/scores"]["state"] == "queued"
        cluster.wait_until_saved()
        cluster.run("scancel", "--signal=USR1", "--batch", job_of(cluster, "two-nodes", "components", 0))
        # scancel ends before the controller, which is about to be killed, has passed the signal on.
        wait_for("the signal", lambda: all(map(is_asked_to_stop, ranks["code"])))
        os.kill(ranks["english"][1], signal.SIGKILL)
        # The controller is not there for a while; the jobs go on.
        cluster.kill_daemon("slurmctld")
    time.sleep(1)
    cluster.start_daemon("slurmctld")
    cluster.wait_until_answering()

    # The batch script of the final run is killed: nothing puts it back into the queue, and what needs it is dropped.
    wait_for("the final run", lambda: bool(processes("megatron_demix.launch.stage", f"{run}/slurm", "final/found-seed0")))
    job = int(job_of(cluster, "two-nodes", "final.found-seed0"))
    (script,) = processes(f"{cluster.folder}/", f"/job{job:05d}/slurm_script")
    os.kill(script, signal.SIGKILL)

    wait_for("the report", lambda: (run / "report" / "index.html").exists())
    found = states(cluster, study)
    log = logs(run)
    assert {row["state"] for row in found.values()} == {"done"}, log
    assert "components/code is not finished (code 75): back into the queue" in log, log
    assert "components/english is not finished (code 75): back into the queue" in log, log
    assert "submitted again as" in log, log

    for name in ("code", "english"):
        published = next(run.glob(f"components/{name}-*"))
        undisturbed = make_again(run, f"components.{published.name}.json", tmp_path / name, ranks=2)
        assert {k: v for k, v in contents(published).items() if k != "manifest.json"} == undisturbed
    check_what_was_made_in_parts(study, run, tmp_path)

    again, errors = demix(cluster, "submit", study, "--json").communicate(timeout=LIMIT_S)
    assert list(json.loads(again)["jobs"]) == ["conclude"], errors


def test_the_time_limit_of_slurm_itself(cluster, study, tmp_path):
    """With the data of the test above. SLURM tells one component to save; the other hears nothing of it, is killed at its
    limit, and submitted again. Until then both are held, so that they last a minute or two and cost nothing."""
    run = study.parent / "limited"
    for name in ("tokenizer", "data"):
        shutil.copytree(study.parent / "two-nodes" / name, run / name)
    more = [w for s in ("name=limited", "parallel.data=1", "launch.slurm.grace=45") for w in ("--set", s)]
    _, errors = demix(cluster, "submit", study, *more).communicate(timeout=LIMIT_S)
    try:
        ranks = stop_components(run, 1)
        with held(ranks["code"]):
            shorten(cluster, "limited", "components")
            wait_for("SLURM's signal before the limit", lambda: is_asked_to_stop(ranks["code"][0]))
        wait_for("the components", lambda: len(list(run.glob("components/*/manifest.json"))) == 2)
    finally:
        demix(cluster, "cancel", study, *more).communicate(timeout=LIMIT_S)
    for name in ("code", "english"):
        published = next(run.glob(f"components/{name}-*"))
        undisturbed = make_again(run, f"components.{published.name}.json", tmp_path / name, ranks=1)
        assert {k: v for k, v in contents(published).items() if k != "manifest.json"} == undisturbed, errors
    code, english, last = (logs(run, pattern) for pattern in ("components-*_0.log", "components-*_1.log", "conclude-*.log"))
    # The task passes TERM on; SLURM may have told the ranks USR1 before that.
    assert re.search(r"run components/code: stopped by SIG(TERM|USR1) after iteration", code), code
    assert "components/code is not finished (code 75): back into the queue" in code, code
    assert "DUE TO TIME LIMIT" in english, english
    assert "submitted again as" in last, last


def logs(run: Path, pattern: str = "*.log") -> str:
    return "".join(f"---- {p.name}\n{p.read_text()}" for p in sorted((run / "logs" / "slurm").glob(pattern)))


def shorten(cluster: Cluster, study_name: str, group: str) -> None:
    """Let a group's jobs reach their time limit, which is in whole minutes, within the next two of them."""
    for index in (0, 1):
        job = job_of(cluster, study_name, group, index)
        ran = re.search(r"RunTime=(\d+):(\d+):", cluster.run("scontrol", "show", "job", job))
        assert ran
        cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * int(ran[1]) + int(ran[2]) + 1}")


def test_the_example_runs_once_it_is_edited(cluster, study, tmp_path):
    """After the first test, whose base it starts from. Two nodes, one (invented) GPU each."""
    example = (ROOT / "examples" / "slurm" / "megatron_lm.sbatch").read_text()
    # What a user would change, for a model as small as this.
    edits = {
        r"megatron=\$HOME/Megatron-LM": "megatron=Megatron-LM",
        r"--save-interval 500": "--save-interval 20 --stand-in early",
        r"--gpus-per-node=8": "--gpus-per-node=1",
        r"steps=2000": "steps=200",
        r"# module load [^\n]*": f"PATH={tmp_path}:$PATH; export GLOO_SOCKET_IFNAME=lo",
    }
    for pattern, text in edits.items():
        example, number = re.subn(pattern, text, example)
        assert number == 1, pattern
    run = study.parent / "two-nodes"
    for folder in ("logs", "ckpt", "Megatron-LM"):
        (tmp_path / folder).mkdir()
    (tmp_path / "ckpt" / "base").symlink_to(next(run.glob("base/base-*")))
    (tmp_path / "Megatron-LM" / "pretrain_gpt.py").symlink_to(ROOT / "tests" / "stand_in_pretrain.py")
    (tmp_path / "torchrun").write_text(f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    (tmp_path / "job.sbatch").write_text(example)
    submitted = ["sbatch", "--parsable", f"--chdir={tmp_path}", str(tmp_path / "job.sbatch")]
    job = cluster.run(*submitted).strip()
    tracker = tmp_path / "ckpt" / "code" / "latest_checkpointed_iteration.txt"
    wait_for("a checkpoint", tracker.exists)
    # The stand-in for Megatron-LM also ends by itself, half way and without an error.
    cluster.run("scancel", "--signal=USR1", "--batch", job, check=False)
    wait_for("the last checkpoint", lambda: tracker.read_text() == "200")
    wait_for("the job's end", lambda: not cluster.jobs())
    ended = cluster.run("scontrol", "show", "job", job)
    assert "JobState=COMPLETED" in ended, ended
    assert re.search(r"Restarts=[1-9]", ended), ended


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
    again = make_again(run, f"rounds.1.{scored.name}.json", folder / "scores", ranks=1)
    assert again == {k: v for k, v in contents(scored).items() if k != "manifest.json"}


def test_cancel_saves_and_resume_goes_on(cluster, study, tmp_path):
    run = tmp_path / "two-nodes"
    more = ["--set", "component.tokens=2M", "--set", "base.tokens=256", "--runs", str(tmp_path)]
    _, errors = demix(cluster, "submit", study, *more).communicate(timeout=LIMIT_S)
    wait_for("a component", lambda: iterations(run, "components.code") > 20)
    beside = demix(cluster, "run", study, *more, "--set", "launch.backend=local")
    _, errors = beside.communicate(timeout=LIMIT_S)
    assert beside.returncode == 75, errors
    assert "already being worked on by the SLURM jobs" in errors
    out, errors = demix(cluster, "cancel", study, *more).communicate(timeout=LIMIT_S)
    assert "have saved and stopped; `demix resume` goes on" in out, errors
    assert cluster.jobs() == []
    assert list(run.glob("components/.code-*.work/iter_*"))
    assert not list(run.glob("components/*/manifest.json"))
    out, errors = demix(cluster, "cancel", study, *more).communicate(timeout=LIMIT_S)
    assert out == "nothing is running\n", errors


def test_a_part_of_a_study_is_submitted_and_found_without_its_settings(cluster, study, tmp_path):
    """In a folder whose name has what is a pattern of SLURM's in the names of logs."""
    runs = tmp_path / "50%jobs"
    more = ["--runs", str(runs)]
    submitted = demix(cluster, "submit", study, *more, "--set", "seed=9", "--until", "prepare")
    _, errors = submitted.communicate(timeout=LIMIT_S)
    assert submitted.returncode == 0, errors
    run = runs / "two-nodes"
    wait_for("the report", lambda: (run / "report" / "index.html").exists())
    wait_for("the last job's end", lambda: not cluster.jobs())
    assert "report: " in logs(run, "conclude-*.log")
    out, errors = demix(cluster, "status", study, *more, "--json").communicate(timeout=LIMIT_S)
    assert {row["state"] for row in json.loads(out) if row["stage"].startswith("data/")} == {"to do"}
    assert "--set seed=9" in errors
    found = states(cluster, study, *more, "--set", "seed=9")
    assert {name for name, row in found.items() if row["state"] == "done"} == {"tokenizer/byte", "data/code", "data/english"}


def test_an_array_that_this_slurm_does_not_take_is_refused(cluster, study, tmp_path):
    """1001 is SLURM's own default."""
    submitted = demix(cluster, "submit", study, "--runs", str(tmp_path), "--set", "launch.slurm.parts.data=600")
    _, errors = submitted.communicate(timeout=LIMIT_S)
    assert submitted.returncode == 2, errors
    assert "MaxArraySize of this cluster is 1001. Set launch.slurm.parts.data to at most 500." in errors
    assert cluster.jobs() == []


def test_text_is_cleaned_by_arrays(cluster, tmp_path):
    """By tools/clean_data.py --slurm: the bytes of a cleaning on this machine; a pass that fails takes those after it along."""
    pytest.importorskip("datatrove")
    texts = {"a": ["one text", "another", "one text"], "b": ["another", "a third"]}
    for name, own in texts.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in own))
    tool = Path(__file__).parents[2] / "tools" / "clean_data.py"

    def clean(output: str, *more: str, b: str = "b.jsonl") -> subprocess.CompletedProcess:
        command = [sys.executable, tool, "--input", "a=a.jsonl", f"b={b}", "--output", output, "--ngram", "0", *more]
        return subprocess.run(command, cwd=tmp_path, env=cluster.environment, capture_output=True, text=True, timeout=LIMIT_S)

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
    _, errors = submitted.communicate(timeout=LIMIT_S)
    assert submitted.returncode == 0, errors
    run = study.parent / "stock"
    try:
        wait_for("the components", lambda: len(list(run.glob("components/*/manifest.json"))) == 2)
    finally:
        demix(cluster, "cancel", study, *settings).communicate(timeout=LIMIT_S)
    for name in ("code", "english"):
        (other,) = run.glob(f"logs/components.{name}-*.node1.log")
        assert other.with_suffix("").with_suffix(".log").read_text().count("rank 0 starting after iteration") >= 2
        assert "rank 1 starting after iteration 150" in other.read_text()
        (losses,) = run.glob(f"components/{name}-*/losses.jsonl")
        assert [json.loads(line)["iteration"] for line in losses.read_text().splitlines()] == list(range(1, 301))


def test_a_node_that_fails_at_every_start_ends_the_job(study, tmp_path):
    """srun then stops node 0's part, whose ranks wait for the others. Nobody asked for that: three times are enough. KillWait
    is SLURM's default: node 0 has the time to say that it was stopped."""
    second_fails = 'os._exit(1) if os.environ["SLURM_NODEID"] == "1" else signal.pause()'
    start = f'import os, signal, sys\nif "megatron_demix.launch.ranks" in sys.orig_argv:\n    {second_fails}\n'
    (tmp_path / "sitecustomize.py").write_text(start)
    settings = ("name=broken", f"launch.slurm.setup=export PYTHONPATH={tmp_path}")
    dag = build_dag(load_study(study, settings), study, tmp_path / "broken")
    for stage in (dag.tokenizer, *dag.data.values()):
        stage.finish()
    more = [*(word for setting in settings for word in ("--set", setting)), "--runs", str(tmp_path)]
    with private_cluster(tmp_path / "cluster", more="KillWait=30\n") as cluster:
        _, errors = demix(cluster, "submit", study, *more, "--until", "train").communicate(timeout=LIMIT_S)
        wait_for("the jobs' end", lambda: not cluster.jobs())
        found = states(cluster, study, *more)["base/base"]
    log = logs(tmp_path / "broken")
    assert log.count("base/base is not finished (code 75): back into the queue") == 3, errors + log
    # And perhaps once more, by the other node, when node 0 gives up.
    assert log.count("another node ended first, and this one was stopped with it") in (3, 4), log
    assert found["state"] == "failed", found
    assert "ended 3 times without saving anything new" in found["note"], found
