"""A run killed without warning, then asked to stop, then left alone ends with the bytes of an undisturbed one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from folders import contents
from processes import held, kill, processes

from megatron_demix.errors import Incomplete
from megatron_demix.launch.stage import is_being_made, stage_lock, start_ranks
from megatron_demix.pipeline.stage import Stage
from megatron_demix.study.training import ParallelSpec
from megatron_demix.train.trainer import train

TOOL = Path(__file__).parents[2] / "tools" / "train_component.py"
TIME_LIMIT_S = 200


def start(path: Path, **variables: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | variables
    return subprocess.Popen([sys.executable, TOOL, "--job", path], env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_iteration(heartbeat: Path, iteration: int) -> None:
    deadline = time.monotonic() + TIME_LIMIT_S
    while time.monotonic() < deadline:
        if heartbeat.exists() and json.loads(heartbeat.read_text())["done"] >= iteration:
            return
        time.sleep(0.02)
    pytest.fail(f"{heartbeat} did not reach iteration {iteration} within {TIME_LIMIT_S} s")


def test_killed_stopped_and_undisturbed_runs_are_equal(tmp_path, make_train_job):
    settings = {"train_iters": 400, "train": {"micro_batch_size": 8, "save_interval": 20, "log_interval": 100}}
    whole = make_train_job(tmp_path / "whole", **settings)
    train(whole)

    heartbeat = tmp_path / "heartbeat.json"
    job = make_train_job(tmp_path / "parts", heartbeat=heartbeat, tensorboard=tmp_path / "tensorboard", **settings)
    path = tmp_path / "job.json"
    path.write_text(job.model_dump_json())
    process = start(path)
    try:
        wait_for_iteration(heartbeat, 30)
        process.kill()
        assert process.wait(TIME_LIMIT_S) == -signal.SIGKILL
        saved = [int(p.name.removeprefix("iter_")) for p in job.work.glob("iter_*")]
        assert saved
        assert max(saved) < 300, "the run was too fast for this test"
        heartbeat.unlink()

        process = start(path)
        wait_for_iteration(heartbeat, max(saved) + 10)
        process.terminate()
        _, errors = process.communicate(timeout=TIME_LIMIT_S)
        assert process.returncode == 75
        assert "error (rank 0): run tiny: stopped by SIGTERM after iteration" in errors
    finally:
        process.kill()
    train(job)
    assert contents(job.work) == contents(whole.work)
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize(
    ("signum", "said"),
    [
        (signal.SIGKILL, ["this rank lost the others (", "Run again to go on from the last checkpoint."]),
        (signal.SIGSTOP, ["has not ended within", "Stacks of this rank's threads:", "megatron_demix/train/loop.py"]),
    ],
)
def test_a_rank_that_loses_or_waits_for_the_other_says_so(tmp_path, make_train_job, signum, said):
    """Two ranks without torchrun, which would end the second one itself."""
    heartbeat = tmp_path / "heartbeat.json"
    job = make_train_job(
        tmp_path, parallel={"data": 2}, train_iters=100_000, heartbeat=heartbeat, train={"timeout": 15, "save_interval": 1000}
    )
    path = tmp_path / "job.json"
    path.write_text(job.model_dump_json())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [start(path, RANK=str(rank), LOCAL_RANK=str(rank), **group) for rank in range(2)]
    try:
        wait_for_iteration(heartbeat, 2)
        ranks[1].send_signal(signum)
        _, errors = ranks[0].communicate(timeout=TIME_LIMIT_S)
        assert ranks[0].returncode == 8, errors
        assert "error (rank 0): run tiny: " in errors
        for part in said:
            assert part in errors
    finally:
        for process in ranks:
            process.kill()
            process.communicate(timeout=TIME_LIMIT_S)


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_run_what_is_installed(tmp_path, make_train_job, monkeypatch, ranks):
    """And not what lies in the current folder: a checkout that is not built, or Megatron-LM's, which has a megatron.core."""
    for package in ("megatron_demix", "megatron/core"):
        (tmp_path / "here" / package).mkdir(parents=True)
        (tmp_path / "here" / package / "__init__.py").write_text("raise SystemExit('not this one')\n")
    monkeypatch.chdir(tmp_path / "here")
    stage = Stage("components/tiny", tmp_path, {}, (), lambda folder: None, ranks=ranks)
    job = make_train_job(tmp_path, parallel={"data": ranks}, train_iters=2, train={"global_batch_size": 8})
    with stage_lock(stage) as lock:
        stage.job.write_text(job.model_dump_json())
        process = start_ranks(stage, threads_per_rank=1, lock=lock)
    assert process.wait(TIME_LIMIT_S) == 0, stage.log.read_text()


def test_the_tool_s_ranks_end_with_torchrun_and_keep_their_folder_until_then(tmp_path, make_train_job):
    heartbeat, path = tmp_path / "heartbeat.json", tmp_path / "job.json"
    job = make_train_job(tmp_path, parallel={"data": 2}, train_iters=100_000, heartbeat=heartbeat)
    path.write_text(job.model_dump_json())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", TOOL, "--job", path]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    torchrun = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    ranks: list[int] = []
    try:
        wait_for_iteration(heartbeat, 2)
        ranks = [pid for pid in processes(str(TOOL), str(path)) if pid != torchrun.pid]
        assert len(ranks) == 2
        with held(ranks):  # as if they saved
            torchrun.kill()
            torchrun.wait()
            # The same command, with less patience.
            impatient = (
                f"import sys; sys.path.insert(0, {str(TOOL.parent)!r}); import train_component as tool; "
                f"tool._LOCK_WAIT_S = 1; sys.argv = ['tool', '--job', {str(path)!r}]; sys.exit(tool.main())"
            )
            path.write_text(job.model_copy(update={"parallel": ParallelSpec()}).model_dump_json())
            second = subprocess.run(
                [sys.executable, "-c", impatient], env=environment, capture_output=True, text=True, timeout=60, check=False
            )
            assert second.returncode == Incomplete.exit_code, second.stderr
            assert f"another run that writes into {job.work}: still running after 1 s" in second.stderr
        deadline = time.monotonic() + TIME_LIMIT_S
        while (left := processes(str(TOOL), str(path))) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert left == []
    finally:
        for pid in (torchrun.pid, *ranks):
            kill(pid)
        torchrun.wait()


def test_ranks_that_outlive_torchrun_keep_their_stage(tmp_path, make_train_job, monkeypatch):
    """A large save takes minutes, in which another run must not begin the same stage."""
    stage = Stage("components/tiny", tmp_path, {}, (), lambda folder: None, ranks=2)
    job = make_train_job(tmp_path, parallel={"data": 2}, train_iters=100_000, heartbeat=stage.heartbeat)
    with stage_lock(stage) as lock:
        stage.job.write_text(job.model_dump_json())
        torchrun = start_ranks(stage, threads_per_rank=1, lock=lock)
    ranks = []
    try:
        wait_for_iteration(stage.heartbeat, 2)
        ranks = processes("pipeline.worker", str(stage.job))
        assert len(ranks) == 2
        with held(ranks):  # as if they saved
            torchrun.kill()
            torchrun.wait()
            assert is_being_made(stage)
            monkeypatch.setattr("megatron_demix.launch.stage._RANKS_SAVE_S", 1)
            with (
                pytest.raises(Incomplete, match=r"processes of stage components/tiny .*: still running after 1 s"),
                stage_lock(stage),
            ):
                pass
        monkeypatch.undo()
        with stage_lock(stage):
            assert "stopped by SIGTERM after iteration" in stage.log.read_text()
    finally:
        for pid in (torchrun.pid, *ranks):
            kill(pid)
        torchrun.wait()
