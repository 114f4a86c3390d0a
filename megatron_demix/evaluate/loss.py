"""Validation loss of a live Megatron model, on any tensor and pipeline parallel layout."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from megatron_demix.evaluate.windows import Windows


def bits_per_byte(model: torch.nn.Module, windows: Windows, *, micro_batch_size: int) -> float:
    """Sum of -log2 p(target) over all targets, divided by the bytes they stand for.

    Called by every rank of one model-parallel group with its own pipeline stage; every rank returns the same number. Per-token
    losses are float32 as the model computes them and are added in float64, in window order.
    """
    from megatron.core import parallel_state

    total_nats = _sum_of_losses(model, windows, micro_batch_size)
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        torch.distributed.broadcast(
            total_nats,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return total_nats.item() / math.log(2) / windows.target_bytes


def _sum_of_losses(model: torch.nn.Module, windows: Windows, micro_batch_size: int) -> torch.Tensor:
    """float64 scalar; only meaningful on the last pipeline stage."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    device = next(model.parameters()).device
    tokens = torch.from_numpy(windows.tokens)
    num_windows, seq_length = tokens.shape[0], tokens.shape[1] - 1
    micro_batch_size = min(micro_batch_size, num_windows)
    # The schedules want equal micro-batches: the last one is filled up with repeats, whose losses are masked out.
    num_micro_batches = -(-num_windows // micro_batch_size)
    rows = torch.arange(num_micro_batches * micro_batch_size).clamp(max=num_windows - 1).view(num_micro_batches, -1)
    counted = (torch.arange(rows.numel()) < num_windows).view(num_micro_batches, -1, 1).to(device)
    positions = torch.arange(seq_length, device=device).expand(micro_batch_size, -1)
    sums: list[torch.Tensor] = []

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for i in range(num_micro_batches):
            yield tokens[rows[i]].to(device), counted[i]

    def forward_step(iterator: Iterator[Any], stage: torch.nn.Module):
        batch, mask = next(iterator)
        # No attention mask: causal masking is part of the layer spec (AttnMaskType.causal).
        output = stage(batch[:, :-1].contiguous(), positions, None, labels=batch[:, 1:].contiguous())

        def collect(losses: torch.Tensor):
            sums.append((losses.double() * mask).sum())
            return losses.new_zeros(()), {}

        return output, collect

    was_training = model.training
    model.eval()
    with torch.inference_mode():
        if parallel_state.get_pipeline_model_parallel_world_size() == 1:
            for batch, mask in batches():
                losses = model(batch[:, :-1].contiguous(), positions, None, labels=batch[:, 1:].contiguous())
                sums.append((losses.double() * mask).sum())
        else:
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=batches(),
                model=[model],
                num_microbatches=num_micro_batches,
                seq_length=seq_length,
                micro_batch_size=micro_batch_size,
                forward_only=True,
            )
    model.train(was_training)
    return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.float64, device=device)
