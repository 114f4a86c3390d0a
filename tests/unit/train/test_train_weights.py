"""Weights of a checkpoint into a model, on one rank."""

from __future__ import annotations

from unittest import mock

import torch
from train_runs import FAMILIES

from megatron_demix.train.compat import cpu_compat
from megatron_demix.train.trainer import train


def test_experts_load_without_the_extra_states_that_transformer_engine_asks_for(tmp_path, make_train_job):
    """Its grouped experts have one each, numbered from the second one on; a checkpoint of the local layers has none."""
    job = make_train_job(tmp_path, model=FAMILIES["moe"], train_iters=1)
    train(job)
    with cpu_compat():
        from megatron.core.dist_checkpointing.mapping import ShardedObject

        from megatron_demix.train.model import build_model, live_tensors, parallel_groups
        from megatron_demix.train.weights import load_weights

        with parallel_groups(job.parallel, seed=0, timeout_s=60):
            model = build_model(job.model, job.train, job.parallel, job.vocab_size)
            before = [t.tensor.clone() for t in live_tensors(model)]
            sharded = model.sharded_state_dict
            extra = {
                f"decoder.layers.0.mlp.experts.linear_fc1._extra_state{expert or ''}": ShardedObject(
                    "decoder.layers.mlp.experts.experts.linear_fc1._extra_state", torch.empty(0), (2, 4), (0, expert)
                )
                for expert in range(4)
            }
            with mock.patch.object(model, "sharded_state_dict", lambda **given: sharded(**given) | extra):
                load_weights(model, job.work)
            assert not all(torch.equal(t.tensor, old) for t, old in zip(live_tensors(model), before, strict=True))
