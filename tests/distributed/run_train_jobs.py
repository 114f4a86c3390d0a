"""What each rank of test_train_layouts runs: every job in the list, one after the other, in the same processes.

torchrun run_train_jobs.py PLAN.json:
{"jobs": [job, ...], "stop": {job name: iteration}, "live": {job name: folder}, "slow": job name}
stop: the job is stopped by a signal in that iteration, then resumed. live: afterwards, each rank loads the weights and writes
its live tensors there, and how many numbers it has read for them.
slow: in this job rank 3 sleeps in each step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_demix.errors import Incomplete
from megatron_demix.process import die_with_parent
from megatron_demix.train.compat import cpu_compat
from megatron_demix.train.job import TrainJob
from megatron_demix.train.trainer import train


def main() -> None:
    die_with_parent()
    warnings.simplefilter("ignore")
    plan = json.loads(Path(sys.argv[1]).read_text())
    for data in plan["jobs"]:
        job = TrainJob.model_validate(data)
        if job.name in plan["stop"]:
            _train_and_stop(job, plan["stop"][job.name])
        with _slow() if job.name == plan["slow"] and os.environ["RANK"] == "3" else nullcontext():
            train(job)
        if job.name in plan["live"]:
            _write_live_tensors(job, Path(plan["live"][job.name]))


def _train_and_stop(job: TrainJob, iteration: int) -> None:
    """Only rank 1 is signalled: the others must hear of it."""
    with cpu_compat():
        from megatron_demix.train.step import Stepper
    step = Stepper.train

    def train_and_signal(self, dataset, number, *, stop):
        if number == iteration - 1 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, dataset, number, stop=stop)

    with mock.patch.object(Stepper, "train", train_and_signal):
        try:
            train(job)
        except Incomplete:
            return
    raise AssertionError(f"{job.name} ran to its end")


@contextmanager
def _slow() -> Iterator[None]:
    with cpu_compat():
        from megatron_demix.train import step
    forward = step._forward_step

    def slow(*arguments):
        time.sleep(0.4)
        return forward(*arguments)

    with mock.patch.object(step, "_forward_step", slow):
        yield


def _write_live_tensors(job: TrainJob, folder: Path) -> None:
    import torch

    with cpu_compat():
        from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy

        from megatron_demix.train.model import build_model, destroy_parallel, initialize_parallel, live_tensors
        from megatron_demix.train.weights import load_weights

        rank, read = os.environ["RANK"], 0
        load_part = TorchDistLoadShardedStrategy.load

        def counted(strategy, part, *arguments, **named):
            nonlocal read
            loaded = load_part(strategy, part, *arguments, **named)
            read += sum(value.numel() for value in _values(loaded) if isinstance(value, torch.Tensor))
            return loaded

        initialize_parallel(job.parallel, seed=99, timeout_s=60)
        model = build_model(job.model, job.train, job.parallel, job.vocab_size)
        with mock.patch.object(TorchDistLoadShardedStrategy, "load", counted):
            load_weights(model, job.work)
        live = [(t.key, t.global_shape, t.global_offset, t.box_shape, t.tensor.clone()) for t in live_tensors(model)]
        torch.save(live, folder / f"live_{rank}.pt")
        (folder / f"read_{rank}.json").write_text(json.dumps(read))
        destroy_parallel()


def _values(nested: Any) -> Iterator[Any]:
    if isinstance(nested, dict | list):
        for value in nested.values() if isinstance(nested, dict) else nested:
            yield from _values(value)
    else:
        yield nested


if __name__ == "__main__":
    main()
