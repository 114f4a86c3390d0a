"""The training loop: step, guard, save, evaluate, log; between two batches it can stop, and later go on as if it had not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from functools import partial

import torch

from megatron_demix.errors import ConfigError, Incomplete, storage_errors
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

            def save() -> None:
                watchdog.progress(f"saving iteration {iteration}")
                if journal:
                    journal.sync()
                checkpoints.save(iteration)

            def is_due(interval: int | None) -> bool:
                return iteration == job.train_iters or (interval is not None and iteration % interval == 0)

            # The last iteration may have been saved, but not evaluated.
            unevaluated = bool(valid) and iteration > evaluated[0] and is_due(job.eval_interval)
            if journal and iteration == job.train_iters and not unevaluated:
                print(f"run {job.name}: all {iteration} iterations are done and saved in {job.work}.", flush=True)
            while unevaluated or iteration < job.train_iters:
                row: dict[str, float] = {}
                stopped, saved = False, True
                if not unevaluated:
                    watchdog.progress(f"iteration {iteration + 1}")
                    result = stepper.train(data, iteration, stop=stop)
                    iteration += 1
                    guard.check(iteration, result.loss, result.grad_norm)
                    row = {
                        "iteration": iteration,
                        "lm loss": result.loss,
                        "learning-rate": result.learning_rate,
                        "grad-norm": result.grad_norm,
                    }
                    if journal:
                        journal.step(row)
                    stopped = result.stop
                    if saved := stopped or iteration in job.keep or is_due(job.train.save_interval):
                        save()
                    unevaluated = bool(valid) and is_due(job.eval_interval)
                if unevaluated and not stopped:
                    losses = _evaluate(stepper, valid, stop, partial(watchdog.progress, f"evaluating iteration {iteration}"))
                    unevaluated = stopped = losses is None
                    if losses is None and not saved:
                        save()
                    elif losses is not None and journal:
                        row |= losses
                        journal.evaluation({"iteration": iteration, **losses})
                if "lm loss" in row and is_due(job.train.log_interval):
                    straggler = compare_ranks(clock)
                    if journal:
                        journal.speak(row, straggler)
                if stopped and (unevaluated or iteration < job.train_iters):
                    raise Incomplete(
                        f"run {job.name}: stopped by {stop.signal.name if stop.signal else 'another rank'} after iteration "
                        f"{iteration} of {job.train_iters}, saved in {job.work}. Run the same command again to go on."
                    )
        checkpoints.finish()


def _evaluate(
    stepper: Stepper, valid: Mapping[str, torch.utils.data.Dataset], stop: StopRequest, progress: Callable[[], None]
) -> dict[str, float] | None:
    """Losses of all validation sets, as validation.jsonl names them; None where a rank was asked to stop."""
    losses = {}
    for name, samples in valid.items():
        loss = stepper.evaluate(samples, stop=stop, progress=progress)
        if loss is None:
            return None
        losses[f"lm loss validation-{name}"] = loss
    return losses
