"""Process groups, the GPT model of a study, and its parameters under their checkpoint names.

Shared with evaluation. Call everything here inside compat.cpu_compat().
"""

from __future__ import annotations

import itertools
import math
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from megatron_demix.checkpoint.live import LiveTensor
from megatron_demix.errors import ConfigError
from megatron_demix.study.training import ModelSpec, ParallelSpec, TrainSpec
from megatron_demix.train.attention import CausalAttention
from megatron_demix.train.compat import on_cpu
from megatron_demix.train.derived import ffn_hidden_size, padded_vocab_size


def initialize_parallel(parallel: ParallelSpec, *, seed: int, timeout_s: int) -> None:
    """Join this process to its group (RANK, WORLD_SIZE, ... as torchrun sets them; one process needs none), then build
    megatron.core's groups and seed every generator. Raises ConfigError if the number of ranks is not the layout's, or if there
    are more of them on this machine than GPUs."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size != parallel.world_size:
        raise ConfigError(
            f"{world_size} ranks were started, but tensor {parallel.tensor} x pipeline {parallel.pipeline} x data "
            f"{parallel.data} x context {parallel.context} needs {parallel.world_size}: "
            f"torchrun --nproc-per-node {parallel.world_size} ..."
        )
    if not on_cpu():
        local_rank, num_gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local_rank >= num_gpus:
            raise ConfigError(
                f"rank {local_rank} of this machine has no GPU of its own: {num_gpus} are visible. Start fewer ranks (the "
                "sizes under parallel), or let the process see more GPUs (CUDA_VISIBLE_DEVICES; launch.slurm.gpus_per_node)."
            )
        torch.cuda.set_device(local_rank)
    torch.distributed.init_process_group(
        "gloo" if on_cpu() else "nccl",
        store=_store(world_size),
        rank=int(os.environ.get("RANK", 0)),
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    parallel_state.initialize_model_parallel(
        parallel.tensor,
        parallel.pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        distributed_timeout_minutes=math.ceil(timeout_s / 60),
    )
    _seed_everything(seed + 100 * parallel_state.get_pipeline_model_parallel_rank())


_times_initialized = itertools.count()


def _store(world_size: int) -> torch.distributed.Store:
    """Where ranks find one another. Every initialization has its own keys: torchrun's store still holds the addresses of the
    group before."""
    if world_size == 1:
        return torch.distributed.HashStore()
    store, _, _ = next(torch.distributed.rendezvous("env://"))
    return torch.distributed.PrefixStore(f"megatron_demix/{next(_times_initialized)}", store)


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def destroy_parallel() -> None:
    """Leave all groups; a process may initialize again afterwards."""
    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def parallel_groups(parallel: ParallelSpec, *, seed: int, timeout_s: int) -> Iterator[None]:
    """initialize_parallel, for as long as a block of code. After an error NCCL's groups are left to the end of the process:
    taking them down would wait for the other ranks, one of which may be gone, before anyone has said why."""
    try:
        initialize_parallel(parallel, seed=seed, timeout_s=timeout_s)
        yield
    except BaseException:
        if on_cpu():
            destroy_parallel()
        raise
    destroy_parallel()


def transformer_engine_works() -> bool:
    """True where megatron.core found Transformer Engine and there is a device for it."""
    from megatron.core.extensions import transformer_engine

    return not on_cpu() and getattr(transformer_engine, "HAVE_TE", False)


def use_transformer_engine(model: ModelSpec) -> bool:
    """Which layer spec `transformer_impl` means on this machine. Raises ConfigError if it is forced and cannot run."""
    if model.transformer_impl == "auto":
        return transformer_engine_works()
    if model.transformer_impl == "transformer_engine" and not transformer_engine_works():
        reason = "there is no CUDA device" if on_cpu() else "megatron.core cannot import it: pip install megatron-demix[te]"
        raise ConfigError(f"model.transformer_impl is transformer_engine, but {reason}. Set it to auto or local.")
    return model.transformer_impl == "transformer_engine"


def transformer_config(model: ModelSpec, train: TrainSpec, parallel: ParallelSpec) -> TransformerConfig:
    """megatron.core's configuration of this model on this machine. Fused kernels are asked for only where they exist. Raises
    ConfigError for a layout that the local layers cannot have."""
    te, gpu = use_transformer_engine(model), not on_cpu()
    if not te and (parallel.context > 1 or parallel.sequence_parallel):
        raise ConfigError(
            "parallel.context > 1 and parallel.sequence_parallel need Transformer Engine's attention and norms, and this model "
            "has the local ones: install it (pip install megatron-demix[te]) and leave model.transformer_impl at auto."
        )
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    moe = {}
    if model.num_experts is not None:
        moe = {
            "num_moe_experts": model.num_experts,
            "moe_router_topk": model.moe_router_topk,
            "moe_router_pre_softmax": model.moe_router_pre_softmax,
            "moe_ffn_hidden_size": model.moe_ffn_hidden_size or ffn_hidden_size(model),
            "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
            "moe_grouped_gemm": te,
            "moe_token_dispatcher_type": "alltoall" if gpu else "allgather",
        }
    recompute = {}
    if train.recompute_granularity is not None:
        recompute = {
            "recompute_granularity": train.recompute_granularity,
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    return _quiet_config(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        ffn_hidden_size=ffn_hidden_size(model),
        normalization=model.normalization,
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=model.swiglu,
        activation_func=torch.nn.functional.silu if model.swiglu else torch.nn.functional.gelu,
        qk_layernorm=model.qk_layernorm,
        add_bias_linear=model.add_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        init_method_std=model.init_method_std,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=not gpu,
        attention_softmax_in_fp32=True,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=gpu and (model.swiglu or model.add_bias_linear),  # the core has no plain GELU without a bias
        bias_dropout_fusion=gpu,
        apply_rope_fusion=te,
        batch_p2p_comm=True,
        **moe,
        **recompute,
    )


def _layer_spec(model: ModelSpec, config: TransformerConfig, *, cached: bool) -> ModuleSpec | TransformerBlockSubmodules:
    """A layer with Transformer Engine, or this pipeline stage's layers without it, and the norm after the last one.

    Without it all norms are torch's. Left to choose, megatron.core takes what can be imported: apex's, which have no RMSNorm,
    need a GPU and may be missing in a package of that name, or Transformer Engine's, which need a GPU, too. And attention is
    train.attention's: megatron.core's own keeps every layer's scores, which grow with the square of the sequence.
    """
    te = use_transformer_engine(model)
    if te:
        layer = get_gpt_layer_with_transformer_engine_spec(
            num_experts=model.num_experts, moe_grouped_gemm=model.num_experts is not None, qk_layernorm=model.qk_layernorm
        )
    else:
        layer = get_gpt_layer_local_spec(
            num_experts=model.num_experts,
            moe_grouped_gemm=False,
            qk_layernorm=model.qk_layernorm,
            normalization="RMSNorm",  # asks for torch's norms; which one is made follows the configuration
        )
    if cached or not te:
        layer.submodules.self_attention.submodules.core_attention = CausalAttention
    return layer if te else TransformerBlockSubmodules([layer] * get_num_layers_to_build(config), WrappedTorchNorm)


def _quiet_config(**settings: Any) -> TransformerConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of its own default for cuda_graph_scope
        return TransformerConfig(**settings)


def build_model(
    model: ModelSpec, train: TrainSpec, parallel: ParallelSpec, vocab_size: int, *, cached: bool = False
) -> GPTModel:
    """This rank's pipeline stage, freshly initialised, in train.precision, on this rank's device.

    cached: for answering with a key-value cache (evaluate.live), on every machine with the attention of train.attention.
    """
    config = transformer_config(model, train, parallel)
    stage = GPTModel(
        config=config,
        transformer_layer_spec=_layer_spec(model, config, cached=cached),
        vocab_size=padded_vocab_size(model, parallel, vocab_size),
        max_sequence_length=model.max_position_embeddings or train.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        position_embedding_type=model.position_embedding_type,
        rotary_base=model.rotary_base,
        rope_scaling=model.use_rope_scaling,
        rope_scaling_factor=model.rope_scaling_factor,
    )
    for parameter in stage.parameters():
        tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    if train.precision == "bf16":
        stage.bfloat16()  # the torch norms of the local spec start in float32
    return stage.to(torch.cuda.current_device())


def live_tensors(model: GPTModel) -> list[LiveTensor]:
    """Every local parameter of `model` under its checkpoint key, as views.

    Parameters that the checkpoint holds as several tensors (SwiGLU's fc1: gate and up) come as that many views. A tied
    embedding's copy on the last pipeline stage comes under the embedding's key, so that writing all views keeps it equal.
    """
    sharded = model.sharded_state_dict()
    apply_factories(sharded)
    return [
        LiveTensor(t.key, tuple(t.global_shape), tuple(t.global_offset), t.data)
        for t in nested_values(sharded)
        if isinstance(t, ShardedTensor)
    ]
