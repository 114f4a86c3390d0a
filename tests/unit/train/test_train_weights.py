"""Weights of a checkpoint into a model, on one rank."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from train_runs import FAMILIES

from megatron_demix.checkpoint.reader import Checkpoint
from megatron_demix.errors import CorruptInput
from megatron_demix.merge.proxies import ProxyMerger
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


def test_the_norm_before_experts_may_have_the_name_it_has_with_transformer_engine(tmp_path, make_train_job):
    """In checkpoints that weights are loaded from, and in components that are merged into a model."""
    job = make_train_job(tmp_path, model=FAMILIES["moe"], train_iters=1)
    train(job)
    local, te = "decoder.layers.mlp.linear_fc1.layer_norm_weight", "decoder.layers.pre_mlp_layernorm.weight"
    with cpu_compat():
        from megatron_demix.train.model import build_model, live_tensors, parallel_groups
        from megatron_demix.train.weights import load_weights

        with parallel_groups(job.parallel, seed=0, timeout_s=60):
            model = build_model(job.model, job.train, job.parallel, job.vocab_size)
            assert te not in {tensor.key for tensor in live_tensors(model)}
            sharded = model.sharded_state_dict

            def as_with_transformer_engine(**given):
                state = sharded(**given)
                for tensor in state.values():
                    if getattr(tensor, "key", None) == local:
                        tensor.key = te
                return state

            def values():
                return [tensor.tensor.clone() for tensor in live_tensors(model)]

            def zero():
                for parameter in model.parameters():
                    parameter.data.zero_()

            load_weights(model, job.work)
            expected = values()
            with mock.patch.object(model, "sharded_state_dict", as_with_transformer_engine):
                live = live_tensors(model)
                assert te in {tensor.key for tensor in live}
                zero()
                load_weights(model, job.work)
                assert all(map(torch.equal, values(), expected))
                zero()
                ProxyMerger({"a": job.work}, live).merge({"a": 1.0})
                assert all(map(torch.equal, values(), expected))


def test_a_flipped_bit_is_not_trained_from(tmp_path, make_train_job):
    job = make_train_job(tmp_path, train_iters=1)
    train(job)
    stored = Checkpoint(job.work)
    (chunk,) = stored.model_tensors["embedding.word_embeddings.weight"].chunks
    shard = stored.location.path / chunk.location.file
    data = bytearray(shard.read_bytes())
    data[chunk.location.position + chunk.location.length // 2] ^= 1
    shard.write_bytes(data)
    said = r"__0_0\.distcp \('embedding\.word_embeddings\.weight'\): the bytes of .* differ from their checksum"
    with pytest.raises(CorruptInput, match=said):
        train(job.model_copy(update={"work": tmp_path / "next", "init_checkpoint": job.work}))
