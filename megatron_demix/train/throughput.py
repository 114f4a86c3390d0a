"""How well a GPU is used: arithmetic a model needs for a token, over what the device could do in the time."""

from __future__ import annotations

import torch

from megatron_demix.study.training import ModelSpec
from megatron_demix.train.compat import on_cpu
from megatron_demix.train.derived import ffn_hidden_size

# Dense bfloat16 FLOP/s without sparsity, from NVIDIA's data sheets, by a part of the device's name; the first that fits counts.
_PEAK_FLOPS = {
    "B200": 2.25e15,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
}


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


def device_peak_flops() -> float | None:
    """bfloat16 FLOP/s of this rank's device, None for a CPU or a device that is not in the table."""
    if on_cpu():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in _PEAK_FLOPS.items() if part in name), None)


def device_memory_bytes() -> int | None:
    """Most memory this rank's tensors have taken on its device so far; None for a CPU."""
    return None if on_cpu() else torch.cuda.max_memory_allocated()
