"""What a checkpoint holds beside model and optimizer: the settings Megatron-LM looks up, and the generators' states."""

from __future__ import annotations

import random
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_demix.checkpoint.digest import weights_digest
from megatron_demix.checkpoint.reader import Checkpoint
from megatron_demix.errors import ConfigError, CorruptInput
from megatron_demix.train.derived import model_arguments, padded_vocab_size
from megatron_demix.train.job import TrainJob

_COUNTERS = {"iteration", "consumed_train_samples", "train_iters"}
_LAYOUT = {
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "data_parallel_size",
    "world_size",
    "micro_batch_size",
    "padded_vocab_size",  # its rows beyond the vocabulary follow the layout
}
SCRATCH = "scratch"
_RNG_LAYOUT = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")


def blend_without_paths(job: TrainJob) -> list[tuple[float, int]]:
    """(share, bytes of the .bin) of each source that is drawn from: the same wherever the data lies."""
    return [(weight, Path(f"{prefix}.bin").stat().st_size) for prefix, weight in job.blend if weight > 0]


def start_without_path(job: TrainJob) -> str | None:
    """Names what a run starts from: the same wherever it lies. None where that is the run itself, and where it cannot be read,
    as load_weights will say if it is needed."""
    if job.init_checkpoint is None:
        return SCRATCH
    if Path(job.init_checkpoint).resolve().is_relative_to(job.work.resolve()):
        return None
    try:
        return weights_digest(Checkpoint(job.init_checkpoint, read_ahead=False))
    except (ConfigError, CorruptInput):
        return None


def megatron_args(job: TrainJob, iteration: int, blend: list[tuple[float, int]], start: str | None) -> Namespace:
    """What Megatron-LM looks up in a checkpoint's saved arguments: it checks the shapes and takes the counters from here.

    blend, start: as of blend_without_paths and start_without_path. Megatron-LM does not know them, and passes them over.
    """
    model, parallel, train = job.model, job.parallel, job.train
    return Namespace(
        **model_arguments(model, train),
        padded_vocab_size=padded_vocab_size(model, parallel, job.vocab_size),
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        data_parallel_size=parallel.data,
        world_size=parallel.world_size,
        data_parallel_random_init=False,
        micro_batch_size=train.micro_batch_size,
        global_batch_size=train.global_batch_size,
        train_iters=job.train_iters,
        bf16=train.precision == "bf16",
        fp16=False,
        use_distributed_optimizer=train.use_distributed_optimizer,
        ckpt_format="torch_dist",
        seed=job.seed,
        lr=train.lr,
        min_lr=train.min_lr,
        lr_decay_style=train.lr_decay_style,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_eps=train.adam_eps,
        clip_grad=train.clip_grad,
        lr_warmup_fraction=train.lr_warmup_fraction,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        moe_aux_loss_coeff=model.moe_aux_loss_coeff,
        demix_blend=blend,
        demix_start=start,
        iteration=iteration,
        consumed_train_samples=iteration * train.global_batch_size,
        skipped_train_samples=0,
        consumed_valid_samples=0,
    )


def changed_settings(saved: Namespace, now: Namespace) -> str:
    """In which settings two megatron_args differ, in words; empty if one run can go on as the other. Layout may differ."""
    changed = {
        name: (getattr(saved, name, None), value)
        for name, value in vars(now).items()
        if name not in _COUNTERS | _LAYOUT and getattr(saved, name, None) != value
    }
    said = {name: f"{name} {before} (now {after})" for name, (before, after) in changed.items()}
    if "demix_blend" in changed:
        before, after = map(_in_words, changed["demix_blend"])
        said["demix_blend"] = f"a blend of {before} (now {after})"
    if "demix_start" in changed:
        before, after = (start if start == SCRATCH else f"the weights {start}" for start in changed["demix_start"])
        said["demix_start"] = f"a start from {before} (now {after}; without --load it goes on)"
    return ", ".join(said.values())


def _in_words(blend: list[tuple[float, int]]) -> str:
    return " + ".join(f"{weight:g} x {num_bytes} bytes" for weight, num_bytes in blend)


def same_rng_layout(saved: Namespace, now: Namespace) -> bool:
    """Generator states belong to a (pipeline, tensor, expert) rank: another layout starts from fresh ones."""
    return all(getattr(saved, name) == getattr(now, name) for name in _RNG_LAYOUT)


def rng_state() -> ShardedObject:
    """Every generator's state, keyed by pipeline and tensor rank as Megatron-LM does; data parallel ranks share theirs."""
    state = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    shape = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    place = (parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank())
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return ShardedObject("rng_state", [without_identity(state)], shape, place, replica_id=replica)


def set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])
    torch.cuda.set_rng_state(state["cuda_rng_state"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["rng_tracker_states"])


def without_identity(value: Any) -> Any:
    """Equal containers and strings whatever they share: pickle writes an object met twice as a reference, and what is one
    object in a fresh run may be two in a resumed one."""
    if isinstance(value, str):
        return sys.intern(value)
    if type(value) is dict:
        return {without_identity(k): without_identity(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(without_identity(v) for v in value)
    return value
