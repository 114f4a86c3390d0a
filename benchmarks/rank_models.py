"""Many small models in one process, for rank_consistency.py: the project's GPTModel trained, merged by the native core, scored.

A model's weights are one flat float32 vector, so that a checkpoint is a file of numbers and a merge is one call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from rank_data import EvalSet, Suite

from megatron_demix.mixture import Mixture, apportion
from megatron_demix.native import MergePlan
from megatron_demix.study.training import ModelSpec, ParallelSpec, TrainSpec
from megatron_demix.train.compat import cpu_compat, on_cpu

VOCABULARY = 256
"""Bytes."""
_DECAY_SHARE = 0.25
_WARMUP_SHARE = 0.05
_EVAL_BATCH = 64


@dataclass(frozen=True)
class Size:
    """Of the models of a suite."""

    num_layers: int
    hidden_size: int
    num_heads: int
    seq_length: int
    batch: int
    """Sequences in one step."""


class Lab:
    """One live model that stands for every model of a suite in turn."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self._spec = ModelSpec(
            num_layers=size.num_layers,
            hidden_size=size.hidden_size,
            num_attention_heads=size.num_heads,
            make_vocab_size_divisible_by=1,
        )
        self._train = TrainSpec(
            seq_length=size.seq_length, global_batch_size=size.batch, precision="fp32" if on_cpu() else "bf16"
        )
        self._device = torch.device("cpu" if on_cpu() else "cuda")
        self._model = self._built(0)
        self._positions = torch.arange(size.seq_length, device=self._device)

    def _built(self, seed: int) -> torch.nn.Module:
        with cpu_compat():
            from megatron_demix.train.model import build_model, destroy_parallel, initialize_parallel

            destroy_parallel()
            initialize_parallel(ParallelSpec(), seed=seed, timeout_s=600)
            model = build_model(self._spec, self._train, ParallelSpec(), VOCABULARY)
            # megatron.core keeps the rotary embedding of a length once it has been asked for: later steps can do without
            # cpu_compat's look at every torch call (a tenth of a step at this size).
            tokens = torch.zeros(1, self.size.seq_length, dtype=torch.int64, device=self._device)
            model(tokens, torch.zeros_like(tokens), None)
            return model

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self._model.parameters())

    def initial(self, seed: int) -> np.ndarray:
        self._model = self._built(seed)
        return self._weights()

    def _weights(self) -> np.ndarray:
        return torch.nn.utils.parameters_to_vector(self._model.parameters()).detach().float().cpu().numpy().copy()

    def _load(self, weights_N: np.ndarray) -> None:
        # A copy: the parameters become views of it.
        vector_N = torch.from_numpy(weights_N.copy()).to(self._device)
        torch.nn.utils.vector_to_parameters(vector_N, self._model.parameters())

    def train(
        self,
        start_N: np.ndarray,
        suite: Suite,
        shares: Mapping[str, float],
        steps: int,
        seed: int,
        lr: float,
        *,
        save_at: Sequence[int] = (),
        decay: bool = True,
    ) -> dict[int, np.ndarray]:
        """`steps` optimiser steps on actual data shares. Returns the weights after the last step and after each of save_at.

        The learning rate warms up, stays, and (decay) falls to 0 over the last quarter. The optimiser starts afresh.
        """
        self._load(start_N)
        model = self._model.train()
        parameters = list(model.parameters())
        optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        saved = {}
        for step, tokens in enumerate(self._batches(suite, shares, steps, seed)):
            for group in optimizer.param_groups:
                group["lr"] = lr * _schedule(step, steps, decay)
            optimizer.zero_grad()
            losses = model(tokens[:, :-1].contiguous(), self._rows(tokens), None, labels=tokens[:, 1:].contiguous())
            losses.float().mean().backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if step + 1 in save_at or step + 1 == steps:
                saved[step + 1] = self._weights()
        return saved

    def _batches(self, suite: Suite, shares: Mapping[str, float], steps: int, seed: int):
        rng = np.random.default_rng(seed)
        mixture = Mixture(shares)
        counts = apportion(steps * self.size.batch, list(mixture.values()))
        order = rng.permutation(np.repeat(np.arange(len(counts)), counts)).reshape(steps, self.size.batch)
        texts = [suite.train[name] for name in mixture]
        length = self.size.seq_length + 1
        for row in order:
            starts = [rng.integers(len(texts[d]) - length) for d in row]
            batch = np.stack([texts[d][s : s + length] for d, s in zip(row, starts, strict=True)])
            yield torch.from_numpy(batch.astype(np.int64)).to(self._device)

    def _rows(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._positions.expand(tokens.shape[0], -1)

    def log_probabilities(self, weights_N: np.ndarray, sets: Sequence[EvalSet]) -> list[np.ndarray]:
        """For each set, float32 [targets, vocabulary]: natural logarithms, at the targets that the set counts."""
        self._load(weights_N)
        model = self._model.eval()
        result = []
        with torch.inference_mode():
            for part in sets:
                rows = []
                for at in range(0, len(part.tokens), _EVAL_BATCH):
                    tokens = torch.from_numpy(part.tokens[at : at + _EVAL_BATCH].astype(np.int64)).to(self._device)
                    logits = model(tokens[:, :-1].contiguous(), self._rows(tokens), None)
                    kept = torch.from_numpy(part.counted[at : at + _EVAL_BATCH]).to(self._device)
                    rows.append(torch.log_softmax(logits[kept].float(), dim=-1).cpu().numpy())
                result.append(np.concatenate(rows))
        return result

    def scores(self, weights_N: np.ndarray, suite: Suite) -> dict[str, float]:
        logs = self.log_probabilities(weights_N, suite.sets)
        return {
            name: value for part, log_TV in zip(suite.sets, logs, strict=True) for name, value in part.scores(log_TV).items()
        }


def _schedule(step: int, steps: int, decay: bool) -> float:
    warming = (step + 1) / max(1, round(_WARMUP_SHARE * steps))
    return min(1.0, warming, (steps - step) / max(1, round(_DECAY_SHARE * steps)) if decay else 1.0)


def merged(sources_KN: Sequence[np.ndarray], coefficients_MK: np.ndarray) -> np.ndarray:
    """float32 [M, N]: sum_k coefficients[m, k] * sources[k], by the kernels behind every merge of the package."""
    plan = MergePlan(len(sources_KN))
    num = len(sources_KN[0])
    records = [plan.add_record(np.ascontiguousarray(s, np.float32).view(np.uint8), 0) for s in sources_KN]
    target = plan.add_target((num,), "float32", "float32")
    plan.add_region(target, (0,), (num,), records, [0] * len(records), [(1,)] * len(records))
    result_MN = np.empty((len(coefficients_MK), num), np.float32)
    addresses_TM = np.array([[row.ctypes.data for row in result_MN]], np.int64)
    plan.run(np.asarray(coefficients_MK)[np.newaxis], addresses_TM=addresses_TM, threads=1)
    return result_MN
