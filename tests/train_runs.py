"""Kinds of models that are trained in tests, runs that are stopped, and what they have left."""

import os
from unittest import mock

from megatron_demix.train.compat import cpu_compat

FAMILIES = {
    "qwen3": {"qk_layernorm": True, "untie_embeddings_and_output_weights": True, "add_qkv_bias": True},
    "gpt2": {
        "normalization": "LayerNorm",
        "swiglu": False,
        "position_embedding_type": "learned_absolute",
        "add_bias_linear": True,
        "num_query_groups": None,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
    },
    "moe": {"num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 32},
}


def stop_in_iteration(number: int):
    """Send this process SIGUSR1 when step `number` (from 1) begins."""
    import signal

    with cpu_compat():
        from megatron_demix.train.step import Stepper
    step = Stepper.train

    def train_and_signal(self, dataset, iteration, *, stop):
        if iteration == number - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(self, dataset, iteration, stop=stop or iteration == number - 1)

    return mock.patch.object(Stepper, "train", train_and_signal)
