"""How evenly a model's tokens are spread over its experts, as its routers note it for their loss: 1 if evenly."""

from __future__ import annotations

import torch

NAME = "load_balancing_loss"
"""Megatron's, in TensorBoard and in its log."""


def take_load_balancing(device: torch.device | int) -> torch.Tensor:
    """float64 [1]: this rank's part of the loss, without its coefficient, summed over its layers and the forward passes since
    the last call. The parts of all ranks add up to the sum of what each data parallel rank's micro-batches have."""
    by_layer = _take(NAME)
    if by_layer is None:  # no layer here has experts, or none has been trained
        return torch.zeros(1, dtype=torch.float64, device=device)
    return by_layer.sum(0, keepdim=True, dtype=torch.float64)


def _take(name: str) -> torch.Tensor | None:
    """[L] what is noted under this name, which is forgotten."""
    try:
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    except ImportError:  # before 0.18
        from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

        noted = get_moe_layer_wise_logging_tracker().pop(name, None)
        return None if noted is None else noted["values"]
    metric = get_moe_metrics_tracker().metrics.pop(name, None)
    return None if metric is None else metric.values
