"""Validation loss of a live Megatron model, on any tensor and pipeline parallel layout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from megatron_demix.evaluate.windows import Windows


def token_nats(model: torch.nn.Module, windows: Windows, *, micro_batch_size: int) -> np.ndarray:
    """-log p of every target, float32 [num_targets], window by window.

    Called by every rank of one model-parallel group with its own pipeline stage; every rank returns the same numbers.
    """
    from megatron.core import parallel_state

    losses = _losses(model, windows, micro_batch_size)
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        torch.distributed.broadcast(
            losses,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return losses.cpu().numpy()


def _losses(model: torch.nn.Module, windows: Windows, micro_batch_size: int) -> torch.Tensor:
    """float32 [num_targets]; only meaningful on the last pipeline stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    device = next(model.parameters()).device
    tokens = torch.from_numpy(windows.tokens)
    num_windows, seq_length = tokens.shape[0], tokens.shape[1] - 1
    micro_batch_size = min(micro_batch_size, num_windows)
    # The schedules want equal micro-batches: the last one is filled up with repeats, whose losses are left out.
    num_micro_batches = -(-num_windows // micro_batch_size)
    rows = torch.arange(num_micro_batches * micro_batch_size).clamp(max=num_windows - 1).view(num_micro_batches, -1)
    positions = torch.arange(seq_length, device=device).expand(micro_batch_size, -1)
    losses_of: list[torch.Tensor] = []

    def batches() -> Iterator[torch.Tensor]:
        for i in range(num_micro_batches):
            yield tokens[rows[i]].to(device)

    def forward_step(iterator: Iterator[Any], stage: torch.nn.Module):
        batch = next(iterator)
        # No attention mask: causal masking is part of the layer spec (AttnMaskType.causal).
        output = stage(batch[:, :-1].contiguous(), positions, None, labels=batch[:, 1:].contiguous())

        def collect(losses: torch.Tensor):
            losses_of.append(losses.float())
            return losses.new_zeros(()), {}

        return output, collect

    was_training = model.training
    model.eval()
    # Not inference mode: megatron.core keeps a scale for experts' losses in a class, which a later training would write to.
    with torch.no_grad():
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
    if not losses_of:
        return torch.empty(windows.num_targets, dtype=torch.float32, device=device)
    return torch.cat(losses_of)[:num_windows].flatten()
