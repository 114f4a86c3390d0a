"""Submit, status and cancel, with a real detached process in the place of the study's."""

import subprocess
import sys
import time

import pytest

from megatron_demix.errors import Incomplete, StageFailed
from megatron_demix.launch import background
from megatron_demix.launch.run_lock import holder

# What `demix run` does as far as these tests can see: it holds the run's lock until it is told to stop.
WORKS = """
import sys, time
from pathlib import Path
from megatron_demix.errors import DemixError
from megatron_demix.launch.local import _interruptible
from megatron_demix.launch.run_lock import only_one
try:
    with only_one(Path(sys.argv[1])), _interruptible():
        time.sleep(120)
except DemixError as e:
    sys.exit(e.exit_code)
"""


@pytest.fixture
def working(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", WORKS, str(tmp_path)])
    deadline = time.monotonic() + 60
    while holder(tmp_path) != process.pid:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    yield process
    process.kill()
    process.wait()


def test_cancel_lets_it_save_and_waits(working, tmp_path):
    # Reaped here, as init would a detached one; until then the lock alone says that it has ended.
    assert background.cancel(tmp_path) == working.pid
    assert working.wait(timeout=60) == 75
    assert holder(tmp_path) is None
    assert background.cancel(tmp_path) is None


def test_submit_refuses_a_second(working, tmp_path):
    with pytest.raises(Incomplete, match=f"already being worked on by process {working.pid}"):
        background.submit(tmp_path, ["study.yaml"])


def test_a_process_of_another_machine_is_left_alone(working, tmp_path):
    """Its number may be any process's here: the lock is seen across machines that share the disk."""
    assert working.poll() is None
    (tmp_path / ".lock").write_text(f"elsewhere-12-abcdef {working.pid}")
    said = f"process {working.pid} on elsewhere-12 works on {tmp_path}: cancel it there"
    for command in (lambda: background.cancel(tmp_path), lambda: background.submit(tmp_path, [])):
        with pytest.raises(Incomplete, match=said):
            command()
    assert working.poll() is None


def test_another_users_process_is_theirs_to_cancel(working, tmp_path, monkeypatch):
    def refuse(pid, signum):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(background.os, "kill", refuse)
    with pytest.raises(Incomplete, match=f"process {working.pid} that works on .* belongs to another user, who can cancel it"):
        background.cancel(tmp_path)
    monkeypatch.undo()


def test_submit_says_when_the_run_ends_at_once(tmp_path):
    with pytest.raises(StageFailed, match=r"ended at once with exit code 2; its log is .*run\.log"):
        background.submit(tmp_path, [str(tmp_path / "missing.yaml")])
    assert "missing.yaml" in background.log_of(tmp_path).read_text()


def test_no_run_at_all(tmp_path):
    assert holder(tmp_path / "nothing") is None
    assert background.cancel(tmp_path / "nothing") is None
