"""megatron.core's optimizer and learning-rate schedule for a job."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_demix.errors import ConfigError
from megatron_demix.train.compat import on_cpu
from megatron_demix.train.job import TrainJob

WSD_DECAY_SHARE = 0.2
"""Part of a WSD schedule that decays, linearly, to min_lr."""


def build_optimizer(job: TrainJob, model: DistributedDataParallel) -> MegatronOptimizer:
    """AdamW with float32 master weights; biases and one-dimensional parameters are not decayed, as in Megatron-LM."""
    train = job.train
    if train.min_lr > train.lr:
        raise ConfigError(f"run {job.name}: min_lr {train.min_lr} is above lr {train.lr}.")
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=train.lr,
            min_lr=train.min_lr,
            weight_decay=train.weight_decay,
            adam_beta1=train.adam_beta1,
            adam_beta2=train.adam_beta2,
            adam_eps=train.adam_eps,
            clip_grad=train.clip_grad,
            bf16=train.precision == "bf16",
            params_dtype=torch.bfloat16 if train.precision == "bf16" else torch.float32,
            use_distributed_optimizer=train.use_distributed_optimizer,
        ),
        [model],
    )
    use_fused_kernel(optimizer)
    return optimizer


def use_fused_kernel(optimizer: MegatronOptimizer) -> None:
    """On a CPU, where torch's AdamW stands in for the fused ones: one kernel for each parameter instead of a dozen.

    Called again after a checkpoint's parameter groups have been loaded.
    """
    if on_cpu():
        for group in optimizer.param_groups:
            group["fused"] = True


def build_schedule(job: TrainJob, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Warm-up, then decay over the whole run. Counted in samples, as Megatron-LM counts."""
    train, batch = job.train, job.train.global_batch_size
    warmup_iters = min(round(train.lr_warmup_fraction * job.train_iters), job.train_iters - 1)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=train.lr,
        min_lr=train.min_lr,
        lr_warmup_steps=warmup_iters * batch,
        lr_decay_steps=job.train_iters * batch,
        lr_decay_style=train.lr_decay_style,
        start_wd=train.weight_decay,
        end_wd=train.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        wsd_decay_steps=round(WSD_DECAY_SHARE * job.train_iters) * batch,
        lr_wsd_decay_style="linear",
    )
