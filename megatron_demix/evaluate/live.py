"""A live Megatron model that answers: token probabilities and greedy choices behind a key-value cache, on any TP x PP x EP.

Every rank that has a part of the model makes the same calls with the same tokens and its own pipeline stage.
"""

from __future__ import annotations

import functools
from unittest import mock

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel


class Cache(StaticInferenceContext):
    """Keys and values of the tokens that a batch of rows has seen; all rows have seen equally many.

    megatron.core's own context, in which it also finds the positions of new tokens. Keys lie there before rotation, so rows can
    be copied to any other cache.
    """

    def __init__(self, num_rows: int, max_tokens: int) -> None:
        super().__init__(max_batch_size=num_rows, max_sequence_length=max_tokens)
        self.materialize_only_last_token_logits = False

    @property
    def num_tokens(self) -> int:
        return self.sequence_len_offset

    def repeated(self, rows: torch.Tensor, max_tokens: int) -> Cache:
        """A cache with room for max_tokens whose row i has seen what this one's row rows[i] has. rows: int64 [R]."""
        cache = Cache(len(rows), max_tokens)
        cache.sequence_len_offset = seen = self.num_tokens
        for layer, memories in self.key_value_memory_dict.items():
            copies = []
            for memory in memories:
                copy = memory.new_empty(max_tokens, len(rows), *memory.shape[2:])
                torch.index_select(memory[:seen], 1, rows.to(memory.device), out=copy[:seen])
                copies.append(copy)
            cache.key_value_memory_dict[layer] = tuple(copies)
        return cache


class LiveModel:
    """A pipeline stage (train.model.build_model with cached=True), whose parameters may change from call to call.

    max_tokens: longest text it takes, in tokens.
    """

    def __init__(self, stage: GPTModel, *, vocab_size: int, max_tokens: int) -> None:
        self.stage, self.vocab_size, self.max_tokens = stage, vocab_size, max_tokens
        self.device = next(stage.parameters()).device
        self._pipeline = parallel_state.get_pipeline_model_parallel_group()
        self._experts = parallel_state.get_expert_model_parallel_group()
        self._rank, self._last = self._pipeline.rank(), self._pipeline.size() - 1

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has hidden states to judge; the others get none."""
        return self._rank == self._last

    def new_cache(self, num_rows: int, max_tokens: int) -> Cache:
        return Cache(num_rows, max_tokens)

    @torch.inference_mode()
    def extend(self, cache: Cache, tokens: np.ndarray | torch.Tensor) -> torch.Tensor | None:
        """Run tokens [R, n] behind what the cache's rows have seen, and keep them there. Returns the last layer's normalised
        output, [n, R, hidden], on the last pipeline stage; None on the others."""
        tokens = torch.as_tensor(tokens, dtype=torch.int64).to(self.device)
        num_rows, num_new = tokens.shape
        positions = torch.arange(cache.num_tokens, cache.num_tokens + num_new, device=self.device).expand(num_rows, -1)
        config = self.stage.config
        if self._rank > 0:
            arriving = torch.empty(num_new, num_rows, config.hidden_size, dtype=config.pipeline_dtype, device=self.device)
            torch.distributed.recv(arriving, group=self._pipeline, group_src=self._rank - 1)
            self.stage.set_input_tensor(arriving)
        was_training = self.stage.training
        self.stage.eval()
        # The output layer is applied below, and only where a score or a choice depends on it.
        with mock.patch.object(self.stage, "post_process", False):
            hidden = self.stage(tokens, positions, None, inference_context=cache, runtime_gather_output=True)
        self.stage.train(was_training)
        cache.increment_sequence_len_offset(num_new)
        if self.is_last_stage:
            return hidden
        torch.distributed.send(hidden.contiguous(), group=self._pipeline, group_dst=self._rank + 1)
        return None

    @torch.inference_mode()
    def judge(self, hidden_NH: torch.Tensor, targets_N: np.ndarray | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """-log p of each target in nats (float32 [N]), and whether it is the most probable token (bool [N]). Last stage only.

        Ids that only fill the vocabulary up to a round number have no part in the softmax.
        """
        logits = self._logits(hidden_NH)
        targets = torch.as_tensor(targets_N, dtype=torch.int64).to(self.device)
        greedy = self._greedy(logits) == targets
        nats = tensor_parallel.vocab_parallel_cross_entropy(logits[:, None], targets[:, None])[:, 0]
        return nats, greedy

    @torch.inference_mode()
    def choose(self, hidden_NH: torch.Tensor | None, num_rows: int) -> torch.Tensor:
        """The most probable next tokens, int64 [num_rows], the same on every rank; of equal ones the least id."""
        chosen = torch.empty(num_rows, dtype=torch.int64, device=self.device)
        if hidden_NH is not None:
            chosen = self._greedy(self._logits(hidden_NH))
        # Ranks that share experts out have to go on alike, whatever their last digits.
        if self._experts.size() > 1:
            torch.distributed.broadcast(chosen, group=self._experts, group_src=0)
        return self.shared(chosen)

    def shared(self, values: torch.Tensor) -> torch.Tensor:
        """The last stage's values, on all stages."""
        if self._last > 0:
            torch.distributed.broadcast(values, group=self._pipeline, group_src=self._last)
        return values

    def _logits(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """float32 [N, this rank's part of the vocabulary]."""
        stage = self.stage
        weight = stage.shared_embedding_or_output_weight() if stage.share_embeddings_and_output_weights else None
        logits = stage.output_layer(hidden_NH[:, None], weight=weight, runtime_gather_output=False)[0][:, 0].float()
        logits[:, self._num_real_ids :] = -torch.inf
        return logits

    @functools.cached_property
    def _num_real_ids(self) -> int:
        """Of this rank's part of the vocabulary."""
        size = self.stage.output_layer.output_size_per_partition
        return min(max(self.vocab_size - size * parallel_state.get_tensor_model_parallel_rank(), 0), size)

    def _greedy(self, logits: torch.Tensor) -> torch.Tensor:
        best, ids = logits.max(dim=-1)
        group = parallel_state.get_tensor_model_parallel_group()
        if group.size() == 1:
            return ids
        ids = ids + group.rank() * logits.shape[-1]
        gathered = [torch.empty_like(best) for _ in range(group.size())], [torch.empty_like(ids) for _ in range(group.size())]
        torch.distributed.all_gather(gathered[0], best, group=group)
        torch.distributed.all_gather(gathered[1], ids, group=group)
        winner = torch.stack(gathered[0]).argmax(dim=0, keepdim=True)
        return torch.stack(gathered[1]).gather(0, winner)[0]
