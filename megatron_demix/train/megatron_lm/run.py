"""One rank of stock Megatron-LM, as torchrun starts it: it becomes the script. The last rank, which prints the losses, stays
beside its script to listen."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import BaseModel, ConfigDict

from megatron_demix.process import die_with_parent
from megatron_demix.progress import Heartbeat, MetricsLog
from megatron_demix.study.training import TrainSpec
from megatron_demix.train.losses import FILE, DivergenceGuard, LossLog, read_losses
from megatron_demix.train.megatron_lm.log import Iteration, parse_iteration
from megatron_demix.train.megatron_lm.work import prune, reached
from megatron_demix.train.watch import STOP_SIGNALS


class StockJob(BaseModel):
    """A run of stock Megatron-LM as plain data."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    kind: Literal["megatron_lm"] = "megatron_lm"
    name: str
    command: list[str]
    """Of every rank: the interpreter, the script, its arguments."""
    environment: dict[str, str]
    """Beside what torchrun sets."""
    train: TrainSpec
    train_iters: int
    keep: list[int] = []
    """Iterations whose checkpoints stay."""
    work: Path
    metrics: Path
    """metrics.jsonl of the study's run."""
    heartbeat: Path

    @property
    def tokens_per_iteration(self) -> int:
        return self.train.global_batch_size * self.train.seq_length


def run_rank(job: StockJob, lock: IO) -> int:
    """The exit code of this rank's script, which inherits `lock`. Raises Diverged, after the script has been killed."""
    environment = os.environ | job.environment | alone()
    if int(environment["RANK"]) < int(environment["WORLD_SIZE"]) - 1:
        os.set_inheritable(lock.fileno(), True)
        os.execvpe(job.command[0], job.command, environment)
    with closing(_Listener(job)) as listener:  # before anything is started that it could not listen to
        script = _started(job, environment, lock)
        assert script.stdout is not None
        with script:
            try:
                for line in script.stdout:
                    sys.stdout.write(line)
                    sys.stdout.flush()
                    if iteration := parse_iteration(line):
                        listener.heard(iteration)
            except BaseException:
                script.kill()
                raise
    if script.returncode < 0:  # torchrun has to see it die of the same signal
        for signum in STOP_SIGNALS:
            signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), -script.returncode)
    return script.returncode


def _started(job: StockJob, environment: dict[str, str], lock: IO) -> subprocess.Popen[str]:
    """The script, to which signals to stop are passed on."""
    told: list[int] = []
    for signum in STOP_SIGNALS:
        signal.signal(signum, lambda number, _: told.append(number))
    script = subprocess.Popen(
        job.command,
        stdout=subprocess.PIPE,
        env=environment | {"PYTHONUNBUFFERED": "1"},  # buffered, a line would come long after its iteration
        text=True,
        errors="replace",
        preexec_fn=die_with_parent,
        pass_fds=[lock.fileno()],
    )
    for signum in STOP_SIGNALS:
        signal.signal(signum, lambda *_: script.send_signal(signal.SIGTERM))
    if told:
        script.send_signal(signal.SIGTERM)
    return script


def alone() -> dict[str, str]:
    """What torchrun would have set, for the one rank that was started without it."""
    if "RANK" in os.environ:
        return {}
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}


class _Listener:
    """Turns what the script prints into losses.jsonl, the heartbeat and events; drops checkpoints that are no longer needed."""

    def __init__(self, job: StockJob) -> None:
        self._job = job
        start = reached(job.work)
        self._losses = LossLog(job.work / FILE, iteration=start, gaps=True)
        self._heartbeat, self._metrics = Heartbeat(job.heartbeat), MetricsLog(job.metrics)
        past = [row["lm loss"] for row in read_losses(job.work / FILE)]
        self._guard = DivergenceGuard(job.train, job.name, past)
        self._heartbeat.beat(start, job.train_iters, "iterations")

    def heard(self, iteration: Iteration) -> None:
        """Raises Diverged, as the trainer of this project does."""
        row, number = iteration.row, int(iteration.row["iteration"])
        self._guard.check(number, row["lm loss"], row["grad-norm"])
        self._losses.append(row)
        tokens_per_s = self._job.tokens_per_iteration / iteration.seconds if iteration.seconds else None
        facts = {"loss": row["lm loss"], "tokens/s": tokens_per_s}
        self._heartbeat.beat(number, self._job.train_iters, "iterations", **facts)
        if number % self._job.train.log_interval == 0 or number == self._job.train_iters:
            events: dict[str, Any] = row | {"tokens_per_s": tokens_per_s}
            self._metrics.write("iteration", name=self._job.name, **events)
            prune(self._job.work, self._job.train.keep_checkpoints, self._job.keep)

    def close(self) -> None:
        self._losses.close()
