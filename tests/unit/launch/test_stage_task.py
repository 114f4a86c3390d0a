"""What a scheduler's job does with one stage, and what its exit code says: here without ranks; with them in end_to_end/."""

import ast
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_demix.errors import Incomplete, MixtureError, StageFailed, StorageError
from megatron_demix.exits import exit_code
from megatron_demix.launch import stage as task
from megatron_demix.launch.attempts import Attempts
from megatron_demix.pipeline import worker
from megatron_demix.pipeline.stage import Stage


@pytest.fixture
def stop():
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield task._Stop()
    for signum, handler in before.items():
        signal.signal(signum, handler)


def run(stage, stop, node=0):
    """As the process that makes this stage and no other would."""
    stop.settled = stop.is_out_of_time = False
    return task._make_and_judge(stage, 1, task.Nodes(rank=node), stop)


def failing(tmp_path, error):
    def make(folder):
        raise error

    return Stage("blend/found", tmp_path, {}, (), make)


def test_a_stage_is_made_once(tmp_path, stop):
    made = []
    stage = Stage("data/a", tmp_path, {}, (), lambda folder: made.append((folder / "out").write_text("x")))
    assert run(stage, stop) == 0
    assert run(stage, stop) == 0
    assert len(made) == 1
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["name"] == "data/a"


@pytest.mark.parametrize(("error", "code"), [(MixtureError("sums to 0.9"), 4), (StorageError("no space"), 74)])
def test_what_would_come_again_ends_it(tmp_path, stop, capsys, error, code):
    stage = failing(tmp_path, error)
    assert run(stage, stop) == code
    said = f"stage blend/found: {error}"
    assert Attempts.read(stage).failed == said
    assert f"demix: {said}\n" == capsys.readouterr().err
    assert stage.log.read_text() == f"demix: {said}\n"


def test_a_system_that_starts_no_more_threads_is_no_traceback(tmp_path, stop, capsys):
    def make(folder):
        size = threading.stack_size(1 << 47)  # more than there are addresses, so that the system refuses the thread
        try:
            threading.Thread(target=print).start()
        finally:
            threading.stack_size(size)

    assert run(Stage("blend/found", tmp_path, {}, (), make), stop) == 2
    said = capsys.readouterr().err
    assert said.startswith("demix: stage blend/found: the system starts no more threads or processes here (can't start new")
    assert said.count("\n") == 1
    assert exit_code(lambda: make(tmp_path)) == 2
    assert capsys.readouterr().err.startswith("error: the system starts no more threads")


@pytest.mark.parametrize("error", [StageFailed("stage blend/found: a rank is gone"), RuntimeError("NCCL")])
def test_what_may_not_come_again_is_started_again_three_times(tmp_path, stop, error):
    stage = failing(tmp_path, error)
    assert [run(stage, stop) for _ in range(4)] == [75, 75, 75, 8]
    assert "ended 3 times without saving anything new" in Attempts.read(stage).failed
    if isinstance(error, RuntimeError):
        assert "RuntimeError: NCCL" in stage.log.read_text()


def test_being_asked_to_stop_does_not_count(tmp_path, stop):
    stage = Stage("blend/found", tmp_path, {}, (), lambda folder: os.kill(os.getpid(), signal.SIGUSR1))
    assert {run(stage, stop) for _ in range(5)} == {75}
    assert (Attempts.read(stage).number, Attempts.read(stage).starts) == (1, 5)
    assert not list(tmp_path.glob("blend/*"))
    assert not list(tmp_path.glob("blend/.*"))


def test_a_stage_that_never_gets_further_within_its_time_is_given_up(tmp_path, stop):
    """USR1 comes at the time limit. What is saved starts the count again, and TERM says nothing of the time."""
    signals = [signal.SIGUSR1] * 2 + [signal.SIGTERM] * 6 + [signal.SIGUSR1] * 6
    stage = Stage("base/base", tmp_path, {}, (), lambda folder: os.kill(os.getpid(), signals.pop(0)))
    assert {run(stage, stop) for _ in range(8)} == {75}
    (stage.work / "iter_0000001").mkdir(parents=True)
    assert [run(stage, stop) for _ in range(6)] == [75] * 5 + [8]
    said = "stage base/base: did not get further in 5 starts of launch.slurm.time; raise it, then `demix resume` goes on."
    assert said in Attempts.read(stage).failed


def test_a_start_that_was_pre_empted_does_not_count(tmp_path, stop):
    """Its ranks may have been killed while they saved; the batch script leaves a note."""
    outcome = tmp_path / "7_1.outcome"
    stage = failing(tmp_path, StageFailed("stage blend/found: a rank is gone"))
    for _ in range(5):
        stop.settled = False
        assert task._make_and_judge(stage, 1, task.Nodes(), stop, outcome) == 75
        (tmp_path / "7_1.preempted").touch()
    assert [run(stage, stop) for _ in range(3)] == [75, 75, 8]
    assert not stage.done()


def test_ranks_hear_nothing_of_another_launcher(tmp_path, monkeypatch):
    """Which may have started the shell that someone types `demix train` in."""
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "0"), ("LOCAL_RANK", "0"), ("NODE_RANK", "0")):
        monkeypatch.setenv(name, value)
    stage = Stage("base/base", tmp_path, {}, (), lambda folder: None, ranks=1)
    stage.log.parent.mkdir()
    monkeypatch.setattr(task, "PYTHON_M", ["env", sys.executable, "-c", "import os; print(sorted(os.environ))"])
    assert task.start_ranks(stage, threads_per_rank=1, lock=None).wait() == 0
    heard = set(ast.literal_eval(stage.log.read_text()))
    assert "OMP_NUM_THREADS" in heard
    assert not {"WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK"} & heard


@pytest.mark.parametrize("asked", [True, False])
def test_what_stops_node_0_counts_unless_somebody_asked(tmp_path, stop, asked):
    """Of several nodes srun stops the others when one has ended, also where that fails at every start."""
    outcome = tmp_path / "7.outcome"
    if asked:
        Path(f"{outcome}.asked").touch()
    stage = Stage("blend/found", tmp_path, {}, (), lambda folder: os.kill(os.getpid(), signal.SIGTERM))
    codes = []
    for _ in range(4):
        stop.settled = False
        codes.append(task._make_and_judge(stage, 1, task.Nodes(number=2), stop, outcome))
    assert codes == ([75] * 4 if asked else [75, 75, 75, 8])
    assert ("another node ended first" in stage.log.read_text()) is not asked
    assert Attempts.read(stage).failed == "" if asked else "ended 3 times" in Attempts.read(stage).failed


def test_what_would_come_again_on_another_node_ends_it(tmp_path, stop, monkeypatch):
    """And the message is of that node's log."""
    monkeypatch.setattr(task, "_LINGER_S", 0)
    said = "error (rank 1): the disk is full"
    monkeypatch.setattr(task, "start_ranks", lambda *_, **__: subprocess.Popen(["sh", "-c", "exit 74"]))
    stage = Stage("base/base", tmp_path, {}, (), lambda folder: None, ranks=2)
    other = task.Nodes(rank=1, number=2).log(stage)
    other.parent.mkdir()
    other.write_text(f"{said}\n")
    assert run(stage, stop, node=1) == 74
    assert Attempts.read(stage).failed == f"stage base/base: the disk is full (log: {other})"
    assert other.read_text() == f"{said}\ndemix: stage base/base: the disk is full (log: {other})\n"
    assert not stage.log.exists()


@pytest.mark.parametrize("code", [0, 75])
def test_a_signal_after_the_outcome_does_not_replace_it(tmp_path, stop, code):
    """Whichever thread hears it."""
    done = Stage("blend/found", tmp_path, {}, (), lambda folder: None)
    stage = failing(tmp_path, StageFailed("stage blend/found: a rank is gone")) if code else done
    assert run(stage, stop) == code
    signal.raise_signal(signal.SIGTERM)
    other = threading.Thread(target=signal.pthread_kill, args=(threading.get_ident(), signal.SIGUSR1))
    other.start()
    other.join()
    stop.ignore()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


def test_other_nodes_leave_node_0_the_time_to_say_why(tmp_path, stop, monkeypatch):
    monkeypatch.setattr(task, "start_ranks", lambda *_, **__: subprocess.Popen(["false"]))
    stage = Stage("base/base", tmp_path, {}, (), lambda folder: None, ranks=2)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    began = time.monotonic()
    assert run(stage, stop, node=1) == 75
    assert 0.3 <= time.monotonic() - began < task._LINGER_S
    timer.join()
    assert not stage.log.exists()


def test_only_the_task_itself_hears_usr1(tmp_path):
    """Which SLURM sends to all of its processes: from the task the ranks get SIGTERM, and the time to save."""
    stage = Stage("base/base", tmp_path, {}, (), lambda folder: None, ranks=2)
    stage.log.parent.mkdir()
    ranks = task.start_ranks(stage, threads_per_rank=1, lock=None)
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{ranks.pid}/status").read_text().splitlines())
        assert int(status["SigIgn"], 16) >> (signal.SIGUSR1 - 1) & 1
    finally:
        ranks.kill()
        ranks.wait()


def test_a_need_that_is_not_done_is_named(tmp_path, stop, monkeypatch, capsys):
    """It is no failure of this stage, nor would it help to start it again at once."""
    monkeypatch.setattr(task, "_NEEDS_WAIT_S", 0)
    need = Stage("data/a", tmp_path, {}, (), lambda folder: None)
    stage = Stage("blend/found", tmp_path, {}, (need,), lambda folder: None)
    assert run(stage, stop) == 8
    assert capsys.readouterr().err == "demix: stage blend/found: needs data/a, which is not done.\n"
    assert Attempts.read(stage) == Attempts()


def test_a_stage_that_others_make_is_waited_for_and_named(tmp_path):
    stage = Stage("base/base", tmp_path, {}, (), lambda folder: None, ranks=1)
    assert not task.is_being_made(stage)
    with task.stage_lock(stage):
        assert task.is_being_made(stage)
        with open(stage.lock) as file, pytest.raises(Incomplete, match=r"the others: still running.*\. Let it finish"):
            task.take_lock(file, "the others", wait_s=0)
    assert not task.is_being_made(stage)


def test_locks_are_shared_where_files_have_to_be_open_for_that(tmp_path, monkeypatch, caplog):
    """NFSv4 looks at how a file was opened, and so does this other kind of lock."""
    monkeypatch.setattr(fcntl, "flock", fcntl.lockf)
    monkeypatch.setattr(worker, "die_with_parent", lambda: None)
    stage = Stage("base/base", tmp_path, {}, (), lambda folder: None, ranks=1)
    with task.stage_lock(stage) as file:
        task.take_lock(file, "the others", shared=True)
    monkeypatch.setattr(sys, "argv", ["worker", str(stage.job)])
    assert worker.main() == 7  # there is no such job
    assert caplog.text == ""


def test_a_stage_that_others_made_meanwhile_is_done(tmp_path, stop, monkeypatch):
    made = []
    stage = Stage("data/a", tmp_path, {}, (), lambda folder: made.append((folder / "out").write_text("x")))
    held = task.stage_lock

    @contextmanager
    def waited_for(stage):
        with held(stage) as file:
            stage.finish()
            yield file

    monkeypatch.setattr(task, "stage_lock", waited_for)
    assert run(stage, stop) == 0
    assert len(made) == 1


def test_exit_codes_of_ranks_become_errors(tmp_path):
    stage = Stage("base/base", tmp_path, {}, (), lambda folder: None, ranks=1)
    assert str(task.failure(stage, 137)).startswith("stage base/base: a rank was killed by signal 9.")
    assert str(task.failure(stage, -9)).startswith("stage base/base: a rank was killed by signal 9.")
    stage.log.parent.mkdir()
    stage.log.write_text("noise\nerror (rank 1): run base: the loss is nan\n")
    diverged = task.failure(stage, 9)
    assert (diverged.exit_code, str(diverged)) == (9, f"stage base/base: run base: the loss is nan (log: {stage.log})")
    assert task.failure(stage, 8).exit_code == 8


def test_the_log_of_the_node_that_failed_is_named(tmp_path):
    stage = Stage("base/base", tmp_path, {}, (), lambda folder: None, ranks=4)
    stage.log.parent.mkdir()
    stage.log.write_text("error (rank 0): a connection was lost\n")
    second = task.Nodes(rank=1, number=2)
    second.log(stage).write_text("error (rank 2): the GPU is broken\n")
    assert str(task.failure(stage, 8, second)) == f"stage base/base: the GPU is broken (log: {second.log(stage)})"


@pytest.fixture
def command(tmp_path):
    """command(node, what runs at its start, study) -> exit code, what it said, and the files of its outcome."""

    def run(node, text, study="{}"):
        (tmp_path / "study.yaml").write_text(study)
        (tmp_path / "sitecustomize.py").write_text(text)
        words = [
            sys.executable,
            "-m",
            "megatron_demix.launch.stage",
            tmp_path / "study.yaml",
            "base/base",
            "--run",
            tmp_path / "run",
        ]
        environment = os.environ | {"NODE_RANK": str(node), "PYTHONPATH": str(tmp_path)}
        more = ["--nodes", "2", "--outcome", tmp_path / "7.outcome"]
        ended = subprocess.run([*words, *more], env=environment, capture_output=True, text=True, timeout=120)
        outcomes = {path.name: path.read_text() for path in tmp_path.glob("7.outcome*")}
        return ended.returncode, ended.stderr, outcomes

    return run


DURING_IMPORTS = """import os, signal, sys, warnings
class Finder:
    def find_spec(self, name, *_):
        if name == "megatron_demix.pipeline.dag":
            %s
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_during_the_imports_is_no_traceback(command, name):
    """No attempt was counted, so that no outcome is written: the batch script counts."""
    assert command(0, DURING_IMPORTS % f"os.kill(os.getpid(), signal.{name})") == (75, f"demix: stopped by {name}.\n", {})


@pytest.mark.parametrize(("node", "file"), [(0, "7.outcome"), (1, "7.outcome.1")])
def test_what_is_final_before_the_stage_is_known_is_an_outcome(command, node, file):
    """srun would hide it behind the 75 of those that it stops."""
    code, said, outcomes = command(node, "", study="nonsense: 1")
    assert (code, outcomes) == (2, {file: "2"}), said
    code, said, outcomes = command(node, "import sys; sys.modules['megatron_demix.pipeline.dag'] = None")
    assert (code, outcomes) == (1, {file: "1"}), said
    assert "ModuleNotFoundError" in said


def test_warnings_in_a_jobs_log_are_lines(command):
    warn = "warnings.warn_explicit('it has no effect', UserWarning, sys.modules['megatron_demix'].__file__, 1)"
    _, said, _ = command(0, DURING_IMPORTS % warn)
    assert "warning: it has no effect" in said.splitlines()[0], said
    assert "UserWarning" not in said
