"""What follows from a run's settings, and what every trainer of it, ours or Megatron-LM's own, has to agree on."""

from __future__ import annotations

import math
import os
from typing import Any

from megatron_demix.errors import ConfigError
from megatron_demix.study.training import ModelSpec, ParallelSpec, TrainSpec

WSD_DECAY_SHARE = 0.2
"""Part of a WSD schedule that decays, linearly, to min_lr."""


def padded_vocab_size(model: ModelSpec, parallel: ParallelSpec, vocab_size: int) -> int:
    """Rows of the embedding: what the model says, or a multiple of make_vocab_size_divisible_by that tensor parallelism
    divides. Raises ConfigError where the model says too few, or what does not divide.

    Megatron-LM pads to the product of the two, which changes the softmax with the layout; here layouts agree as long as
    tensor parallelism divides make_vocab_size_divisible_by.
    """
    if (rows := model.padded_vocab_size) is not None:
        if rows < vocab_size or rows % parallel.tensor:
            fits = math.ceil(max(rows, vocab_size) / parallel.tensor) * parallel.tensor
            raise ConfigError(
                f"model.padded_vocab_size is {rows}, expected at least {vocab_size}, the ids of the tokenizer, and a multiple "
                f"of parallel.tensor {parallel.tensor}, such as {fits}."
            )
        return rows
    multiple = math.lcm(model.make_vocab_size_divisible_by, parallel.tensor)
    return math.ceil(vocab_size / multiple) * multiple


def order_kernels(parallel: ParallelSpec) -> None:
    """To be called before torch is imported: where tensor or context parallel ranks talk beside their matrix products, a GPU is
    to begin kernels in the order they were given to it, on devices before Blackwell. Otherwise a product that was to hide the
    talk may begin first and take the whole device. The user's own choice stays."""
    if parallel.tensor > 1 or parallel.context > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def ffn_hidden_size(model: ModelSpec) -> int:
    if model.ffn_hidden_size is not None:
        return model.ffn_hidden_size
    return math.ceil(model.hidden_size * 8 / 3 / 64) * 64 if model.swiglu else 4 * model.hidden_size


def num_parameters(model: ModelSpec, seq_length: int, padded_vocab_size: int) -> int:
    """Of the whole model, whatever its parallelism."""
    hidden, heads, bias = model.hidden_size, model.num_attention_heads, model.add_bias_linear
    head_dim = model.kv_channels or hidden // heads
    query, key_value = heads * head_dim, 2 * (model.num_query_groups or heads) * head_dim
    norm = (2 if model.normalization == "LayerNorm" else 1) * hidden
    attention = hidden * (query + key_value) + query * hidden
    attention += (query + key_value) * (bias or model.add_qkv_bias) + hidden * bias
    if model.qk_layernorm:
        attention += 2 * norm * head_dim // hidden

    def mlp(width: int) -> int:
        columns = 2 * width if model.swiglu else width
        return hidden * (columns + width) + (columns + hidden) * bias

    feed_forward = mlp(ffn_hidden_size(model))
    if model.num_experts is not None:
        feed_forward = model.num_experts * (mlp(model.moe_ffn_hidden_size or ffn_hidden_size(model)) + hidden)
    positions = hidden * (model.max_position_embeddings or seq_length) * (model.position_embedding_type == "learned_absolute")
    embeddings = hidden * padded_vocab_size * (2 if model.untie_embeddings_and_output_weights else 1)
    return model.num_layers * (attention + feed_forward + 2 * norm) + norm + positions + embeddings


def checkpoint_bytes(model: ModelSpec, train: TrainSpec, padded_vocab_size: int) -> int:
    """Of the tensors in a training run's checkpoint. For each parameter Adam has a float32 value and two float32 moments; a
    bfloat16 model's own value is saved besides."""
    of_each = 12 + (2 if train.precision == "bf16" else 0)
    return of_each * num_parameters(model, train.seq_length, padded_vocab_size)


def flops_per_token(model: ModelSpec, seq_length: int, padded_vocab_size: int) -> float:
    """Multiplications and additions of one trained token, matrix products only: forward once, backward twice.

    Causal attention looks at half of the sequence on average; of a mixture of experts, the routed ones count.
    """
    hidden, heads = model.hidden_size, model.num_attention_heads
    head_dim = model.kv_channels or hidden // heads
    query, key_value = heads * head_dim, 2 * (model.num_query_groups or heads) * head_dim
    attention = hidden * (query + key_value) + query * hidden + 2 * query * seq_length / 2
    mlp = hidden * ffn_hidden_size(model) * (3 if model.swiglu else 2)
    if model.num_experts is not None:
        expert = hidden * (model.moe_ffn_hidden_size or ffn_hidden_size(model)) * (3 if model.swiglu else 2)
        mlp = model.moe_router_topk * expert + hidden * model.num_experts
    return 3 * 2 * (model.num_layers * (attention + mlp) + hidden * padded_vocab_size)


def model_arguments(model: ModelSpec, train: TrainSpec) -> dict[str, Any]:
    """The model as Megatron-LM's arguments say it, defaults spelled out; without the rows of the embedding."""
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": ffn_hidden_size(model),
        "num_attention_heads": model.num_attention_heads,
        "group_query_attention": model.num_query_groups is not None,
        "num_query_groups": model.num_query_groups or model.num_attention_heads,
        "kv_channels": model.kv_channels or model.hidden_size // model.num_attention_heads,
        "seq_length": train.seq_length,
        "max_position_embeddings": model.max_position_embeddings or train.seq_length,
        "add_position_embedding": True,
        "position_embedding_type": model.position_embedding_type,
        "rotary_base": model.rotary_base,
        "rotary_percent": 1.0,
        "use_rope_scaling": model.use_rope_scaling,
        "rope_scaling_factor": model.rope_scaling_factor,
        "normalization": model.normalization,
        "norm_epsilon": model.norm_epsilon,
        "swiglu": model.swiglu,
        "qk_layernorm": model.qk_layernorm,
        "add_bias_linear": model.add_bias_linear,
        "add_qkv_bias": model.add_qkv_bias,
        "untie_embeddings_and_output_weights": model.untie_embeddings_and_output_weights,
        "make_vocab_size_divisible_by": model.make_vocab_size_divisible_by,
        "num_experts": model.num_experts,
        "moe_router_topk": model.moe_router_topk,
        "moe_router_pre_softmax": model.moe_router_pre_softmax,
        "moe_ffn_hidden_size": model.moe_ffn_hidden_size,
    }


def warmup_iters(train: TrainSpec, train_iters: int) -> int:
    """Iterations of warm-up; Megatron asserts that there are fewer than iterations of decay, which are all of the run's."""
    return min(round(train.lr_warmup_fraction * train_iters), train_iters - 1)


def wsd_decay_iters(train_iters: int) -> int:
    return round(WSD_DECAY_SHARE * train_iters)


def blend_surplus(num_sources: int, num_samples: int) -> float:
    """Spare samples that sources are built with, as a share: as few as suffice, since megatron.core shuffles all epochs that a
    source is built for as one, and a run that needs one of three would see some documents twice and others never.

    megatron.core blends the sum of all sources' samples, each rounded up: up to num_sources more than were asked for. A source
    gets less than one more than its share of those, which rounding up covers; its share of the rest is this, or Megatron-LM's
    default.
    """
    return max(0.005, num_sources / num_samples)
