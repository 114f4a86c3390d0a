"""Run stages on this machine: cheap ones in this process, the others as torchrun children, several side by side."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron_demix.artifact import remove_leftovers
from megatron_demix.errors import (
    ConfigError,
    CorruptInput,
    DemixError,
    IncompatibleInputs,
    Incomplete,
    MixtureError,
    OutputExists,
    StageFailed,
    StorageError,
    VerificationFailed,
)
from megatron_demix.launch.display import Display
from megatron_demix.pipeline.stage import Stage
from megatron_demix.progress import MetricsLog

_BY_EXIT_CODE: dict[int, type[DemixError]] = {
    c.exit_code: c
    for c in (
        ConfigError,
        IncompatibleInputs,
        MixtureError,
        VerificationFailed,
        OutputExists,
        CorruptInput,
        StorageError,
        Incomplete,
    )
}


@dataclass
class _Child:
    stage: Stage
    process: subprocess.Popen
    started: float


def run_stages(stages: Sequence[Stage], run: Path, *, jobs: int, threads_per_rank: int, display: Display) -> None:
    """Make every stage that is not done, needs first, at most `jobs` at a time.

    Raises the error of the first stage that fails, after the children still running have saved and stopped. Raises Incomplete
    on SIGTERM or Ctrl-C, and where another process already works on this run.
    """
    run.mkdir(parents=True, exist_ok=True)
    with _only_one(run), _interruptible():
        metrics = MetricsLog(run / "metrics.jsonl")
        pending = [s for s in stages if not s.done()]
        for folder in {s.folder.parent for s in pending}:
            if folder.is_dir():
                remove_leftovers(folder)
        display.begin(stages, already_done=[s for s in stages if s not in pending])
        children: list[_Child] = []
        try:
            while pending or children:
                for child in [c for c in children if c.process.poll() is not None]:
                    children.remove(child)
                    _finish(child, metrics, display)
                waiting = {s.name for s in pending} | {c.stage.name for c in children}
                ready = [s for s in pending if not any(n.name in waiting for n in s.needs)]
                here = [s for s in ready if not s.ranks]
                for stage in [s for s in ready if s.ranks][: max(0, jobs - len(children))]:
                    pending.remove(stage)
                    display.started(stage)
                    started = time.monotonic()
                    if stage.begin():
                        children.append(_Child(stage, _spawn(stage, run, threads_per_rank), started))
                    else:
                        stage.finish()
                        _record(stage, started, metrics, display)
                if here:
                    pending.remove(here[0])
                    _make_here(here[0], metrics, display)
                else:
                    display.refresh([c.stage for c in children])
                    time.sleep(0.1)
        finally:
            _stop(children)
            display.end()


def _make_here(stage: Stage, metrics: MetricsLog, display: Display) -> None:
    started = time.monotonic()
    display.started(stage)
    stage.finish()
    _record(stage, started, metrics, display)


def _finish(child: _Child, metrics: MetricsLog, display: Display) -> None:
    code = child.process.returncode
    if code != 0:
        raise _failure(child.stage, code)
    child.stage.finish()
    _record(child.stage, child.started, metrics, display)


def _record(stage: Stage, started: float, metrics: MetricsLog, display: Display) -> None:
    wall_s = time.monotonic() - started
    metrics.write("stage", name=stage.name, key=stage.key, wall_s=round(wall_s, 3))
    display.finished(stage, wall_s)


def _spawn(stage: Stage, run: Path, threads_per_rank: int) -> subprocess.Popen:
    """torchrun over the stage's ranks. The stage's lock is inherited, so that it is free only when all of them have ended."""
    command = [sys.executable, "-m", "megatron_demix.launch.ranks", "--standalone", f"--nproc-per-node={stage.ranks}"]
    command += ["-m", "megatron_demix.pipeline.worker", str(stage.job)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads_per_rank), "PYTHONUNBUFFERED": "1"}
    lock = open(run / "logs" / f"{stage.log.stem}.lock", "w")  # noqa: SIM115 (closed below, in this process)
    with lock, open(stage.log, "ab") as log:
        _lock(lock, f"ranks of stage {stage.name} that an earlier run started", wait_s=60)
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=[lock.fileno()],
            start_new_session=True,  # Ctrl-C reaches us alone; we pass it on as SIGTERM
        )


def _failure(stage: Stage, code: int) -> DemixError:
    tail = stage.log.read_text(errors="replace").splitlines()[-12:] if stage.log.exists() else []
    said = [line.split(": ", 1)[1] for line in tail if line.startswith("error (rank")]
    if code in _BY_EXIT_CODE:
        return _BY_EXIT_CODE[code](f"stage {stage.name}: {said[0] if said else 'stopped'} (log: {stage.log})")
    if said:
        return StageFailed(f"stage {stage.name}: {said[0]} (log: {stage.log})")
    reason = f"was killed by signal {code - 128}" if code > 128 else f"ended with exit code {code}"
    excerpt = "".join(f"\n    {line}" for line in tail)
    return StageFailed(
        f"stage {stage.name}: a rank {reason}. Finished artifacts are intact; run the same command again to "
        f"go on from its last checkpoint. Log: {stage.log}, which ends{excerpt or ' empty'}"
    )


def _stop(children: list[_Child]) -> None:
    """SIGTERM lets trainers save; torchrun kills ranks that take longer than its own grace period."""
    for child in children:
        child.process.terminate()
    for child in children:
        try:
            child.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()


@contextmanager
def _interruptible() -> Iterator[None]:
    def stop(signum: int, frame: object) -> None:
        raise Incomplete(f"stopped by {signal.Signals(signum).name}; run the same command again to go on.")

    previous = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


@contextmanager
def _only_one(run: Path) -> Iterator[None]:
    with open(run / ".lock", "a+") as file:
        _lock(file, f"another demix process that works on {run}", wait_s=0.5)  # holder() may have it for a moment
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def holder(run: Path) -> int | None:
    """The id of the process that works on a run now, on this machine; None if there is none."""
    try:
        with open(run / ".lock", "r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                text = file.read()
                return int(text) if text.isdigit() else None
    except FileNotFoundError:
        pass
    return None


def _lock(file: IO, holder: str, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise Incomplete(
                    f"waiting for {holder}: it is still running. Let it finish or stop it, then run again."
                ) from None
            time.sleep(0.2)
