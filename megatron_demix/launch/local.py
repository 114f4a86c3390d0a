"""Run stages on this machine: cheap ones in this process, the others as torchrun children, several side by side."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from megatron_demix.artifact import remove_leftovers
from megatron_demix.errors import Incomplete
from megatron_demix.launch.attempts import failed, forget
from megatron_demix.launch.display import Display
from megatron_demix.launch.run_lock import only_one
from megatron_demix.launch.stage import failure, log_time, stage_lock, start_ranks
from megatron_demix.pipeline import preflight
from megatron_demix.pipeline.stage import Stage

SAVE_LIMIT_S = 600


@dataclass
class _Child:
    stage: Stage
    process: subprocess.Popen
    started: float
    devices: Sequence[str] = ()


def run_stages(
    stages: Sequence[Stage],
    run: Path,
    *,
    jobs: int,
    threads_per_rank: int,
    display: Display,
    foreseen: Sequence[Stage] = (),
    locked: Callable[[], None] = lambda: None,
) -> None:
    """Make every stage that is not done, needs first, at most `jobs` at a time, each with GPUs of its own where there are any.

    foreseen: stages that are to be made later, and have to be possible, too. locked: called first, when the run's lock is held;
    what it raises ends this.

    Raises the error of the first stage that fails, after the children still running have saved and stopped. Raises Incomplete
    on SIGTERM or Ctrl-C, and where another process already works on this run.
    """
    run.mkdir(parents=True, exist_ok=True)
    with only_one(run), _interruptible():
        locked()
        pending = [s for s in stages if not s.done()]
        for folder in {s.folder.parent for s in pending}:
            if folder.is_dir():
                remove_leftovers(folder)
        for stage in pending:
            forget(stage)
        preflight.check([*stages, *foreseen], _remembered)
        display.begin(stages, already_done=[s for s in stages if s not in pending])
        children: list[_Child] = []
        devices = _devices() if jobs > 1 else []
        try:
            while pending or children:
                for child in [c for c in children if c.process.poll() is not None]:
                    children.remove(child)
                    _finish(child.stage, child.started, display, code=child.process.returncode)
                waiting = {s.name for s in pending} | {c.stage.name for c in children}
                ready = [s for s in pending if not any(n.name in waiting for n in s.needs)]
                here = [s for s in ready if not s.ranks]
                for stage in [s for s in ready if s.ranks][: max(0, jobs - len(children))]:
                    free = [d for d in devices if not any(d in child.devices for child in children)]
                    if children and len(free) < min(stage.ranks, len(devices)):
                        break
                    pending.remove(stage)
                    display.started(stage)
                    started = time.monotonic()
                    if ranks := _spawn(stage, threads_per_rank, free[: stage.ranks]):
                        children.append(_Child(stage, ranks, started, free[: stage.ranks]))
                    else:
                        _finish(stage, started, display)
                if here:
                    stage = here[0]
                    pending.remove(stage)
                    display.started(stage)
                    with stage_lock(stage):  # by which `demix status` knows of it
                        _finish(stage, time.monotonic(), display)
                    if stage.kind in ("data", "rounds"):
                        preflight.check([*stages, *foreseen], _remembered)
                else:
                    display.refresh([c.stage for c in children])
                    time.sleep(0.1)
        finally:
            _stop(children)
            display.end()


def _finish(stage: Stage, started: float, display: Display, *, code: int = 0) -> None:
    """Publish a stage, and say so. code: of its ranks, which have ended."""
    with _remembered(stage):
        if code != 0:
            raise failure(stage, code)
        stage.finish()
    display.finished(stage, log_time(stage, started))


@contextmanager
def _remembered(stage: Stage) -> Iterator[None]:
    """A failure is kept for `demix status`."""
    try:
        yield
    except Exception as e:
        if not isinstance(e, Incomplete):
            failed(stage, str(e))
        raise


def _devices() -> list[str]:
    """What CUDA_VISIBLE_DEVICES says, as CUDA reads it (up to the first that is none: -1, say), else the numbers of all NVIDIA
    GPUs."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return list(takewhile(lambda device: re.match(r"\d|GPU-|MIG-", device), map(str.strip, named.split(","))))
    return [str(number) for number, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]


def _spawn(stage: Stage, threads_per_rank: int, devices: Sequence[str]) -> subprocess.Popen | None:
    """The stage's ranks, None if it needs none. Its lock is free only when all of them have ended."""
    with _remembered(stage), stage_lock(stage) as held:
        if not stage.begin():
            return None
        return start_ranks(stage, threads_per_rank=threads_per_rank, lock=held, devices=devices)


def _stop(children: list[_Child]) -> None:
    """SIGTERM lets trainers save, which may take them a while."""
    for child in children:
        child.process.terminate()
    for child in children:
        try:
            child.process.wait(timeout=SAVE_LIMIT_S)
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
