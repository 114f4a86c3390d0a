"""FLOPs of a token against a count of the weights by hand."""

import pytest

from megatron_demix.study.training import ModelSpec
from megatron_demix.train.compat import cpu_compat, on_cpu

with cpu_compat():
    from megatron_demix.train.throughput import device_memory_bytes, device_peak_flops, flops_per_token


def test_dense_and_expert_models():
    """6 FLOPs for each weight a token meets (2 forward, 4 backward), plus attention over half the sequence."""
    dense = ModelSpec(num_layers=2, hidden_size=8, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=16)
    weights = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16) + 8 * 128
    scores = 2 * 2 * 8 * (10 / 2)  # two products a layer, 8 channels, 5 of 10 positions
    assert flops_per_token(dense, 10, 128) == 6 * (weights + scores)
    experts = dense.model_copy(update={"num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 16})
    assert flops_per_token(experts, 10, 128) - flops_per_token(dense, 10, 128) == 6 * 2 * (3 * 8 * 16 + 8 * 4)
    gelu = dense.model_copy(update={"swiglu": False, "ffn_hidden_size": None})
    assert flops_per_token(gelu, 10, 128) - flops_per_token(dense, 10, 128) == 6 * 2 * 8 * (2 * 32 - 3 * 16)


@pytest.mark.skipif(not on_cpu(), reason="a device may be in the table")
def test_a_cpu_has_no_peak_here():
    assert device_peak_flops() is None
    assert device_memory_bytes() is None
