"""Causal attention by torch's fused kernel: for every model without Transformer Engine, and for all that answer with a cache.

megatron.core's own local attention builds the scores, the mask and the probabilities of every head as tensors, and saves and
restores a generator's state around dropout. Neither it nor Transformer Engine's masks several new tokens behind cached ones.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule

from megatron_demix.train.compat import on_cpu


class CausalAttention(MegatronModule):
    """Stands where a layer spec asks for `core_attention`; has no parameters, so checkpoints are the same with and without."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        """The arguments are those megatron.core passes to every core attention; only causal self-attention is built here."""
        super().__init__(config=config)
        self._dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self._scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: object | None = None,
    ) -> torch.Tensor:
        """query [seq, batch, heads, dim]; key and value [keys, batch, groups, dim]. Returns [seq, batch, heads x dim].

        keys > seq: the first keys - seq are earlier tokens, kept in a cache, which every query sees.
        On a CPU in float32: without bfloat16 instructions the kernel is slower in bfloat16 than with the casts.
        """
        unknown = {"attention_mask": attention_mask, "attention_bias": attention_bias, "packed_seq_params": packed_seq_params}
        assert not (given := [name for name, value in unknown.items() if value is not None]), f"{given}: attention is causal"
        dropout = self._dropout if self.training else 0.0
        computed = torch.float32 if on_cpu() else query.dtype
        num_new, num_cached = query.size(0), key.size(0) - query.size(0)
        seen = None
        if num_cached and num_new > 1:
            seen = torch.ones(num_new, key.size(0), dtype=torch.bool, device=query.device).tril(num_cached)
        # Tensor parallel ranks hold different heads, so each draws from its own generator.
        with get_cuda_rng_tracker().fork() if dropout else nullcontext():
            context = torch.nn.functional.scaled_dot_product_attention(
                query.to(computed).permute(1, 2, 0, 3),
                key.to(computed).permute(1, 2, 0, 3),
                value.to(computed).permute(1, 2, 0, 3),
                attn_mask=seen,
                dropout_p=dropout,
                is_causal=not num_cached,
                scale=self._scale,
                enable_gqa=key.size(2) != query.size(2),
            )
        return context.permute(2, 0, 1, 3).flatten(2).to(query.dtype)
