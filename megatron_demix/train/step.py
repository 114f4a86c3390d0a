"""One optimiser step and one evaluation, over megatron.core's pipeline schedules, on any layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from megatron_demix.train.compat import on_cpu
from megatron_demix.train.data import Batch, micro_batches, part_of_sequences
from megatron_demix.train.job import TrainJob
from megatron_demix.train.load_balancing import take_load_balancing
from megatron_demix.train.stragglers import StepClock
from megatron_demix.train.watch import StopRequest


def data_parallel(job: TrainJob, model: GPTModel, clock: StepClock) -> DistributedDataParallel:
    """`model` with gradient buffers in float32 that are averaged over the data parallel ranks. clock: stops before that."""
    config = model.config
    wrapped = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=not on_cpu() and job.parallel.data > 1,
            use_distributed_optimizer=job.train.use_distributed_optimizer,
        ),
        Float16Module(config, model) if config.bf16 else model,
    )
    config.finalize_model_grads_func = partial(_finalize, clock)
    if wrapped.ddp_config.overlap_grad_reduce:
        config.no_sync_func = wrapped.no_sync
    if job.parallel.data * job.parallel.context > 1:
        wrapped.broadcast_params()
    return wrapped


def _finalize(clock: StepClock, *arguments: Any, **options: Any) -> None:
    clock.stop()
    finalize_model_grads(*arguments, **options)


@dataclass(frozen=True)
class StepResult:
    loss: float
    """Mean over the global batch's tokens, before the step."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    """Of this step."""
    stop: bool
    """Some rank was asked to stop."""
    load_balancing: float | None
    """Mean over the layers and the global batch, without its coefficient; None where the model has no such loss."""


class Stepper:
    """Runs steps of one job. Every rank calls every method at the same time and gets the same result."""

    def __init__(
        self,
        job: TrainJob,
        model: DistributedDataParallel,
        optimizer: MegatronOptimizer,
        schedule: OptimizerParamScheduler,
        clock: StepClock,
    ) -> None:
        self._job, self._model, self._optimizer, self._schedule, self._clock = job, model, optimizer, schedule, clock
        self._forward_backward = get_forward_backward_func()
        self._device = torch.cuda.current_device()
        # Embedding and loss are on the outer stages; the others are fed by their neighbours.
        self._reads_data = parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage()
        balances = job.model.num_experts is not None and job.model.moe_aux_loss_coeff > 0
        self._num_balances = balances * job.model.num_layers * job.num_micro_batches * job.parallel.data

    def train(self, dataset: torch.utils.data.Dataset, iteration: int, *, stop: StopRequest | bool) -> StepResult:
        """Iteration number `iteration` (from 0). The weights are left alone if the loss is not finite.

        stop: a request is looked at when the passes are done, so that one that comes during them costs no further step.
        """
        self._clock.start()
        self._model.zero_grad_buffer()
        self._optimizer.zero_grad()
        first_sample = iteration * self._job.train.global_batch_size
        sums = self._run(dataset, first_sample, forward_only=False)
        if self._num_balances:
            sums = torch.cat([sums, take_load_balancing(self._device)])
        (total, num_tokens, *balances), stopped = self._agree(sums, stop)
        loss, balance = total / num_tokens, balances[0] / self._num_balances if balances else None
        learning_rate = self._schedule.get_lr({})
        if not math.isfinite(loss):
            return StepResult(loss, math.nan, learning_rate, stopped, balance)
        _, grad_norm, _ = self._optimizer.step()
        self._schedule.step(increment=self._job.train.global_batch_size)
        return StepResult(loss, float(grad_norm), learning_rate, stopped, balance)

    def evaluate(
        self, dataset: torch.utils.data.Dataset, *, stop: StopRequest | bool, progress: Callable[[], None]
    ) -> float | None:
        """Mean loss over the first eval_iters global batches; None as soon as some rank is asked to stop.

        progress: called before each batch.
        """
        batch = self._job.train.global_batch_size
        total = num_tokens = 0.0
        self._model.eval()
        try:
            for i in range(self._job.eval_iters):
                progress()
                with torch.no_grad():
                    sums = self._run(dataset, i * batch, forward_only=True)
                (part, num), stopped = self._agree(sums, stop)
                if stopped:
                    return None
                total, num_tokens = total + part, num_tokens + num
        finally:
            self._model.train()
        return total / num_tokens

    def _run(self, dataset: torch.utils.data.Dataset, first_sample: int, *, forward_only: bool) -> torch.Tensor:
        """float64 [2]: this rank's sum of token losses and its number of tokens (zeros off the last stage)."""
        batches = micro_batches(dataset, first_sample, self._job, self._device) if self._reads_data else _endless()
        sums = self._forward_backward(
            forward_step_func=_forward_step,
            data_iterator=batches,
            model=[self._model],
            num_microbatches=self._job.num_micro_batches,
            seq_length=self._job.train.seq_length,
            micro_batch_size=self._job.train.micro_batch_size,
            forward_only=forward_only,
        )
        if not parallel_state.is_pipeline_last_stage():
            return torch.zeros(2, dtype=torch.float64, device=self._device)
        return torch.stack(sums).sum(0)

    def _agree(self, sums: torch.Tensor, stop: StopRequest | bool) -> tuple[list[float], bool]:
        """The sums over all ranks, and whether any rank asks to stop, in one collective."""
        stopped = bool(stop)  # read once: a signal may come at any time
        if self._job.parallel.world_size > 1:
            # Tensor parallel ranks hold the same sums: each is added that many times to both, and the mean is the same.
            message = torch.cat([sums, sums.new_tensor([float(stopped)])])
            torch.distributed.all_reduce(message)
            sums, stopped = message[:-1], bool(message[-1] > 0)
        return sums.tolist(), stopped


def _endless() -> Iterator[None]:
    while True:
        yield None


def _forward_step(batches: Iterator[Batch | None], model: torch.nn.Module):
    batch = next(batches)
    if batch is None:
        return model(None, None, None), _no_loss
    context = parallel_state.get_context_parallel_world_size()
    if context > 1:
        batch = part_of_sequences(batch, parallel_state.get_context_parallel_rank(), context)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

    def loss(token_losses: torch.Tensor):
        mask = batch["loss_mask"]
        total, num_tokens = (token_losses.float() * mask).sum(), mask.sum()
        sums = torch.stack([total.detach(), num_tokens]).double()
        if context > 1:  # each rank's share of the mean over the whole sequence
            torch.distributed.all_reduce(num_tokens, group=parallel_state.get_context_parallel_group())
        return total / num_tokens, sums

    return output, loss


def _no_loss(output: torch.Tensor):
    raise AssertionError("only the last pipeline stage computes a loss, and it reads data")
