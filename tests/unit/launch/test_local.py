"""The local backend: order, skipping, interruption, one process per run."""

import errno
import fcntl
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from megatron_demix.errors import Diverged, Incomplete
from megatron_demix.launch import attempts, local
from megatron_demix.launch.backend import Activity
from megatron_demix.launch.background import Background
from megatron_demix.launch.display import Display
from megatron_demix.launch.local import run_stages
from megatron_demix.pipeline.stage import Stage


def chain(run, made):
    """Three stages, c needs b needs a; each records that it ran."""

    def make(name):
        def fill(folder):
            made.append(name)
            (folder / "out").write_text(name)

        return fill

    a = Stage("one/a", run, {}, (), make("a"))
    b = Stage("two/b", run, {}, (a,), make("b"))
    return [Stage("three/c", run, {}, (b,), make("c")), b, a]


def run_all(stages, run):
    run_stages(stages, run, jobs=1, threads_per_rank=1, display=Display(quiet=True))


def test_needs_run_first_and_nothing_runs_twice(tmp_path):
    made: list[str] = []
    run_all(chain(tmp_path, made), tmp_path)
    assert made == ["a", "b", "c"]
    run_all(chain(tmp_path, made), tmp_path)
    assert made == ["a", "b", "c"]
    assert (tmp_path / "metrics.jsonl").read_text().count('"event": "stage"') == 3


def test_a_stage_without_ranks_is_seen_while_it_is_made(tmp_path):
    """Tokenizing may take hours."""
    seen = []

    def fill(folder):
        seen.append(backend.activity())
        (folder / "out").touch()

    stage = Stage("data/a", tmp_path, {}, (), fill)
    backend = Background(SimpleNamespace(all=[stage]), [])
    run_all([stage], tmp_path)
    assert [*seen, backend.activity()] == [{"data/a": Activity("running")}, {}]


def test_a_failure_keeps_what_is_done(tmp_path):
    made: list[str] = []
    stages = chain(tmp_path, made)

    def fail(folder):
        raise ValueError("no")

    broken = Stage("two/b", tmp_path, {}, (stages[2],), fail)
    with pytest.raises(ValueError, match="no"):
        run_all([stages[2], broken], tmp_path)
    assert stages[2].done()
    run_all(stages, tmp_path)
    assert made == ["a", "b", "c"]


def test_a_failure_that_cannot_be_noted_is_still_the_failure(tmp_path, monkeypatch):
    def diverge(folder):
        def refused(*_):
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr(attempts, "write_json", refused)
        raise Diverged("the loss is nan")

    with pytest.raises(Diverged, match="the loss is nan"):
        run_all([Stage("one/a", tmp_path, {}, (), diverge)], tmp_path)


def test_a_second_process_is_told_of_the_first(tmp_path):
    with open(tmp_path / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(Incomplete, match="another demix process that works on"):
            run_all(chain(tmp_path, []), tmp_path)


def test_stages_side_by_side_have_gpus_of_their_own(tmp_path, monkeypatch):
    given: list[tuple[str, list[str]]] = []

    def start(stage, *, devices, **_):
        given.append((stage.name, list(devices)))
        return subprocess.Popen(["sleep", "0.3"])

    def write_job(stage):
        return lambda folder: stage().job.write_text("{}")

    stages: dict[str, Stage] = {}
    for name, ranks in (("a", 2), ("b", 1), ("c", 2), ("d", 8)):
        make = write_job(lambda name=name: stages[name])
        stages[name] = Stage(f"components/{name}", tmp_path, {}, (), make, ranks=ranks)
    monkeypatch.setattr(local, "start_ranks", start)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    run_stages([*stages.values()], tmp_path, jobs=4, threads_per_rank=1, display=Display(quiet=True))
    assert given == [
        ("components/a", ["4", "5"]),
        ("components/b", ["7"]),
        ("components/c", ["4", "5"]),
        ("components/d", ["4", "5", "7"]),
    ]
    assert all(stage.done() for stage in stages.values())


@pytest.mark.parametrize(
    ("visible", "devices"),
    [
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("0, 1", ["0", "1"]),
        ("2,-1,3", ["2"]),
        ("GPU-8932f937,MIG-41b9", ["GPU-8932f937", "MIG-41b9"]),
    ],
)
def test_gpus_that_cuda_sees(monkeypatch, visible, devices):
    """Where there are none, stages that would wait for one go on side by side."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert local._devices() == devices


def test_sigterm_ends_as_incomplete(tmp_path):
    script = f"""
import sys, time
from pathlib import Path
from megatron_demix.errors import DemixError
from megatron_demix.launch import attempts, local
from megatron_demix.launch.display import Display
from megatron_demix.launch.local import run_stages
from megatron_demix.pipeline.stage import Stage
run = Path({str(tmp_path)!r})
def slow(folder):
    print("started", flush=True)
    time.sleep(300)
try:
    run_stages([Stage("one/a", run, {{}}, (), slow)], run, jobs=1, threads_per_rank=1, display=Display(quiet=True))
except DemixError as e:
    print(e)
    sys.exit(e.exit_code)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 75
    assert "stopped by SIGTERM; run the same command again" in rest
    assert not list(tmp_path.rglob("*tmp-*"))
