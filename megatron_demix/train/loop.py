"""The training loop: step, guard, save, evaluate, log; between two batches it can stop, and later go on as if it had not."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass

import torch

from megatron_demix.errors import ConfigError, Incomplete, storage_errors
from megatron_demix.train import load_balancing
from megatron_demix.train.checkpointing import Checkpoints
from megatron_demix.train.data import training_data, validation_data
from megatron_demix.train.derived import model_arguments
from megatron_demix.train.job import TrainJob
from megatron_demix.train.journal import Journal
from megatron_demix.train.losses import FILE, DivergenceGuard, read_losses
from megatron_demix.train.model import build_model
from megatron_demix.train.optimizer import build_optimizer, build_schedule
from megatron_demix.train.step import Stepper, data_parallel
from megatron_demix.train.stragglers import StepClock, compare_ranks
from megatron_demix.train.watch import StopRequest, Watchdog, stop_request
from megatron_demix.train.weights import load_weights


def run(job: TrainJob) -> None:
    """All of trainer.train() that happens inside initialized process groups."""
    rank = torch.distributed.get_rank()
    with storage_errors(f"making {job.work}"):
        job.work.mkdir(parents=True, exist_ok=True)
    with stop_request() as stop, Watchdog(job.name, rank, job.train.timeout) as watchdog:
        data, valid = training_data(job), validation_data(job)
        model = build_model(job.model, job.train, job.parallel, job.vocab_size)
        clock = StepClock()
        wrapped = data_parallel(job, model, clock)
        optimizer = build_optimizer(job, wrapped)
        schedule = build_schedule(job, optimizer)
        checkpoints = Checkpoints(job, model, optimizer, schedule)
        iteration = checkpoints.resume()
        if iteration > job.train_iters:
            raise ConfigError(
                f"run {job.name}: {job.work} holds a checkpoint of iteration {iteration}, beyond train_iters "
                f"{job.train_iters}. Choose another folder, or more iterations."
            )
        if iteration == 0 and job.init_checkpoint is not None:
            arguments = model_arguments(job.model, job.train)
            load_weights(model, job.init_checkpoint, vocab_size=job.vocab_size, arguments=arguments)
            optimizer.reload_model_params()
        stepper = Stepper(job, wrapped, optimizer, schedule, clock)
        with closing(Journal(job, iteration=iteration)) if rank == 0 else nullcontext() as journal:
            torch.distributed.barrier()  # rank 0 has cut losses.jsonl back to this iteration
            guard = DivergenceGuard(job.train, job.name, [row["lm loss"] for row in read_losses(job.work / FILE)])
            evaluated = [journal.evaluated if journal else 0]
            torch.distributed.broadcast_object_list(evaluated)
            steps = _Run(job, stepper, clock, checkpoints, guard, journal, watchdog, stop, data, valid, iteration)
            # The last iteration may have been saved, but not evaluated.
            steps.unevaluated = iteration > evaluated[0] and steps.evaluation_is_due()
            steps.to_the_end()
        checkpoints.finish()


@dataclass
class _Run:
    """A run between two of its steps. Every rank has one, and takes the same steps; the first one has the journal."""

    job: TrainJob
    stepper: Stepper
    clock: StepClock
    checkpoints: Checkpoints
    guard: DivergenceGuard
    journal: Journal | None
    watchdog: Watchdog
    stop: StopRequest
    data: torch.utils.data.Dataset
    valid: Mapping[str, torch.utils.data.Dataset]
    iteration: int
    unevaluated: bool = False
    """Whether the validation losses of this iteration are due, and not there."""
    stopped: bool = False
    """Whether a rank was asked to stop, as all of them know."""

    @property
    def is_complete(self) -> bool:
        return self.iteration == self.job.train_iters and not self.unevaluated

    def is_due(self, interval: int | None) -> bool:
        return self.iteration == self.job.train_iters or (interval is not None and self.iteration % interval == 0)

    def evaluation_is_due(self) -> bool:
        return bool(self.valid) and self.is_due(self.job.eval_interval)

    def to_the_end(self) -> None:
        """Raises Incomplete, with everything saved, where a rank is asked to stop before that."""
        if self.journal and self.is_complete:
            print(f"run {self.job.name}: all {self.iteration} iterations are done and saved in {self.job.work}.", flush=True)
        if self.unevaluated:
            self.evaluate()
            self.end_if_stopped()
        while self.iteration < self.job.train_iters:
            row = self.train_one()
            saved = self.stopped or self.iteration in self.job.keep or self.is_due(self.job.train.save_interval)
            if saved:
                self.save()
            if self.unevaluated and not self.stopped:
                row |= self.evaluate()
                if self.stopped and not saved:
                    self.save()
            if self.is_due(self.job.train.log_interval):
                straggler = compare_ranks(self.clock)
                if self.journal:
                    self.journal.speak(row, straggler)
            self.end_if_stopped()

    def train_one(self) -> dict[str, float]:
        """The iteration's row of losses.jsonl, and what is only shown beside it."""
        self.watchdog.progress(f"iteration {self.iteration + 1}")
        result = self.stepper.train(self.data, self.iteration, stop=self.stop)
        self.iteration += 1
        self.guard.check(self.iteration, result.loss, result.grad_norm)
        row: dict[str, float] = {
            "iteration": self.iteration,
            "lm loss": result.loss,
            "learning-rate": result.learning_rate,
            "grad-norm": result.grad_norm,
        }
        beside = {} if result.load_balancing is None else {load_balancing.NAME: result.load_balancing}
        if self.journal:
            self.journal.step(row, beside)
        self.stopped, self.unevaluated = result.stop, self.evaluation_is_due()
        return row | beside

    def save(self) -> None:
        self.watchdog.progress(f"saving iteration {self.iteration}")
        if self.journal:
            self.journal.sync()
        self.checkpoints.save(self.iteration)

    def evaluate(self) -> dict[str, float]:
        """Losses of all validation sets, as validation.jsonl names them; none where a rank was asked to stop."""
        losses = {}
        for name, samples in self.valid.items():
            loss = self.stepper.evaluate(samples, stop=self.stop, progress=self._begin_evaluating)
            if loss is None:
                self.stopped = True
                return {}
            losses[f"lm loss validation-{name}"] = loss
        self.unevaluated = False
        if self.journal:
            self.journal.evaluation({"iteration": self.iteration, **losses})
        return losses

    def _begin_evaluating(self) -> None:
        self.watchdog.progress(f"evaluating iteration {self.iteration}")

    def end_if_stopped(self) -> None:
        if self.stopped and not self.is_complete:
            by = self.stop.signal.name if self.stop.signal else "another rank"
            raise Incomplete(
                f"run {self.job.name}: stopped by {by} after iteration {self.iteration} of {self.job.train_iters}, saved in "
                f"{self.job.work}. Run the same command again to go on."
            )
