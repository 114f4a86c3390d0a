"""megatron.core's optimizer and learning-rate schedule for a job."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_demix.errors import ConfigError
from megatron_demix.train.compat import on_cpu
from megatron_demix.train.derived import warmup_iters, wsd_decay_iters
from megatron_demix.train.job import TrainJob


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


@contextmanager
def loading(optimizer: MegatronOptimizer) -> Iterator[None]:
    """A checkpoint's optimizer state is loaded inside this context, from making the state dict to load it into, to its end.

    For most optimizers it does nothing. With torch's AdamW as its inner optimizer, megatron.core's distributed optimizer (0.16)
    cannot make that state dict before the first step, looks for each parameter's `step` among the sharded tensors, and leaves
    all parameters with one `step` tensor, which every one of them then advances.
    """
    parts = [
        part
        for part in getattr(optimizer, "chained_optimizers", [optimizer])
        if isinstance(part, DistributedOptimizer) and isinstance(part.optimizer, torch.optim.AdamW)
    ]
    if not parts:
        yield
        return
    for part in parts:
        part.init_state_fn(part.optimizer, part.config)
        for state in part.optimizer.state.values():
            state.setdefault("step", torch.tensor(0.0))
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    def set_states_but_step(
        part: DistributedOptimizer, parameter: torch.nn.Parameter, tensors: dict[str, torch.Tensor]
    ) -> None:
        group, place = part.model_param_group_index_map[parameter]
        own = part.optimizer.state[part.optimizer.param_groups[group]["params"][place]]
        set_states(part, parameter, {"step": own["step"], **tensors})

    with mock.patch.object(DistributedOptimizer, "_set_main_param_and_optimizer_states", set_states_but_step):
        yield
    for part in parts:
        for state in part.optimizer.state.values():
            state["step"] = state["step"].clone()


def build_schedule(job: TrainJob, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Warm-up, then decay over the whole schedule. Counted in samples, as Megatron-LM counts."""
    train, batch = job.train, job.train.global_batch_size
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=train.lr,
        min_lr=train.min_lr,
        lr_warmup_steps=warmup_iters(train, job.decay_iters) * batch,
        lr_decay_steps=job.decay_iters * batch,
        lr_decay_style=train.lr_decay_style,
        start_wd=train.weight_decay,
        end_wd=train.weight_decay,
        wd_incr_steps=job.train_iters * batch,  # weight decay stays as it is; Megatron-LM compares this when it resumes
        wd_incr_style="constant",
        wsd_decay_steps=wsd_decay_iters(job.decay_iters) * batch,
        lr_wsd_decay_style="linear",
        # A checkpoint says how far the schedule is, and the run how long: a run may be resumed to more iterations.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
