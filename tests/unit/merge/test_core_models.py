"""Checkpoints that the installed megatron.core saves of its own models: merged, and loaded again by it.

One rank, in this process. benchmarks/core_versions.py runs this file with every version of megatron.core.
"""

from __future__ import annotations

import argparse
import queue
import zlib
from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch
from dist_checkpoints import bits
from merge_reference import linear_merge

from megatron_demix.checkpoint.reader import Checkpoint
from megatron_demix.errors import IncompatibleInputs
from megatron_demix.merge.engine import merge_checkpoints
from megatron_demix.merge.proxies import ProxyMerger
from megatron_demix.study.training import ModelSpec, ParallelSpec, TrainSpec
from megatron_demix.train.compat import cpu_compat

SIZES = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
QWEN3 = {"num_query_groups": 2, "qk_layernorm": True}
# By name: the model, and the type its parameters are saved in.
MODELS = {
    "grouped queries, tied, fp32": (SIZES | {"num_query_groups": 2}, torch.float32),
    "query and key norms, untied, bf16": (SIZES | QWEN3 | {"untie_embeddings_and_output_weights": True}, torch.bfloat16),
    "gpt2, fp16": (
        SIZES
        | {
            "normalization": "LayerNorm",
            "swiglu": False,
            "position_embedding_type": "learned_absolute",
            "add_bias_linear": True,
            "add_qkv_bias": True,
        },
        torch.float16,
    ),
    "experts, bf16": (SIZES | QWEN3 | {"num_experts": 4, "moe_ffn_hidden_size": 32}, torch.bfloat16),
    "dense and expert layers, fp32": (SIZES | {"num_experts": 2, "moe_ffn_hidden_size": 32}, torch.float32),
}
WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}


@pytest.fixture(scope="module")
def core():
    """megatron.core on one rank."""
    with cpu_compat():
        from megatron_demix.train.model import destroy_parallel, initialize_parallel

        initialize_parallel(ParallelSpec(), seed=1, timeout_s=60)
        yield
        destroy_parallel()


def build(name):
    from megatron_demix.train import model as models

    settings, dtype = MODELS[name]
    spec, train, parallel = (
        ModelSpec(**settings),
        TrainSpec(seq_length=16, global_batch_size=2, precision="fp32"),
        ParallelSpec(),
    )
    with mixed_layers() if name.startswith("dense and expert") else nullcontext():
        return models.build_model(spec, train, parallel, 250).to(dtype)


@contextmanager
def mixed_layers():
    """Every other layer has experts: megatron.core then stores each layer by itself."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    from megatron_demix.train import model as models

    made = []

    def config(*arguments):
        made.append(configure(*arguments))
        made[-1].moe_layer_freq = [0, 1]
        return made[-1]

    def spec(*arguments, **named):
        return get_gpt_decoder_block_spec(made[-1], use_transformer_engine=False)

    configure = models.transformer_config
    with mock.patch.object(models, "transformer_config", config), mock.patch.object(models, "_layer_spec", spec):
        yield


def fill(model, name):
    """Values that depend on the names alone."""
    found = {}
    for key, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {key}".encode()))
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        found[key] = parameter.detach().clone()
    return found


def save(model, folder, singletons=False, **beside):
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    folder.mkdir(parents=True)
    if hasattr(filesystem_async, "_results_queue"):
        filesystem_async._results_queue = queue.Queue()
    saved = model.sharded_state_dict(metadata={"singleton_local_shards": True}) if singletons else model.sharded_state_dict()
    state = {"model": saved, "iteration": 10, "checkpoint_version": 3.0} | beside
    dist_checkpointing.save(state, str(folder))


def load(model, folder):
    from megatron.core import dist_checkpointing

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(folder))
    model.load_state_dict(loaded["model"], strict=True)
    return dict(model.named_parameters())


@pytest.mark.parametrize("name", MODELS)
def test_what_core_saves_merges_and_is_loaded_by_it(core, tmp_path, name):
    from megatron_demix.train.model import live_tensors

    model = build(name)
    parts, values = {part: tmp_path / part for part in WEIGHTS}, {}
    for part, folder in parts.items():
        values[part] = fill(model, part)
        save(model, folder)
    mixtures = {"mixed": WEIGHTS, "alone": {"b": 1.0}}
    mixed, alone = merge_checkpoints(parts, mixtures, tmp_path / "out", progress=False, verify="full")

    # Load what was merged with the stock loader, and make it in place: both have the bits of the sum by definition.
    for path, weights in ((mixed, WEIGHTS), (alone, {"b": 1.0})):
        expected = {
            key: linear_merge([values[p][key] for p in WEIGHTS], [weights.get(p, 0.0) for p in WEIGHTS]) for key in values["a"]
        }
        loaded = load(model, path / "release")
        assert {k: bits(p.detach()) for k, p in loaded.items()} == {k: bits(t) for k, t in expected.items()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        ProxyMerger(parts, live_tensors(model), threads=1).merge(weights)
        assert {k: bits(p.detach()) for k, p in model.named_parameters()} == {k: bits(t) for k, t in expected.items()}

    keys = set(Checkpoint(mixed).model_tensors)
    assert keys == set(Checkpoint(parts["a"]).model_tensors)
    assert any(".experts." in k for k in keys) is ("expert" in name)
    assert any(".layers.1." in k for k in keys) is name.startswith("dense and expert")
    assert ("output_layer.weight" in keys) is ("untied" in name)
    assert any("q_layernorm" in k for k in keys) is bool(MODELS[name][0].get("qk_layernorm"))
    # Extra states are the first component's; the loader asks for all of them.
    assert set(Checkpoint(mixed).model_objects) == set(Checkpoint(parts["a"]).model_objects) != set()


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_components_of_two_precisions_become_a_model_of_either(core, tmp_path, dtype, torch_dtype):
    """The base of Hugging Face folders in bf16, say, and components that were trained in fp32 on CPUs."""
    model = build("grouped queries, tied, fp32")
    parts, values = {"a": tmp_path / "a", "b": tmp_path / "b"}, {}
    for part, stored in (("a", torch.bfloat16), ("b", torch.float32)):
        model = model.to(stored)
        values[part] = fill(model, part)
        save(model, parts[part])
    (path,) = merge_checkpoints(
        parts, {"m": {"a": 0.5, "b": 0.5}}, tmp_path / "out", progress=False, verify="full", dtype=dtype
    )
    loaded = load(model.to(torch_dtype), path / "release")
    for key, parameter in loaded.items():
        wide = [values[part][key].float() for part in parts]
        assert bits(parameter.detach()) == bits(linear_merge(wide, [0.5, 0.5]).to(torch_dtype)), key


@pytest.mark.parametrize(
    "name", ["experts, bf16", "dense and expert layers, fp32", "grouped queries, tied, fp32", "gpt2, fp16"]
)
def test_experts_and_halves_that_are_saved_by_themselves(core, tmp_path, name):
    """With the flag singleton_local_shards, of some components and of all."""
    model = build(name)
    parts, values = {part: tmp_path / part for part in WEIGHTS}, {}
    for part, folder in parts.items():
        values[part] = fill(model, part)
        save(model, folder, singletons=part != "a")
    keys = {part: set(Checkpoint(folder).model_tensors) for part, folder in parts.items()}
    assert any(key.endswith("linear_fc1.weight_w") for key in keys["b"]) is ("gpt2" not in name)
    assert any(".experts.experts.1.linear_fc" in key for key in keys["b"]) is ("expert" in name)

    (mixed,) = merge_checkpoints(parts, {"mixed": WEIGHTS}, tmp_path / "out", progress=False, verify="full")
    expected = {key: linear_merge([values[p][key] for p in WEIGHTS], list(WEIGHTS.values())) for key in values["a"]}
    assert set(Checkpoint(mixed).model_tensors) == keys["a"]
    assert {k: bits(p.detach()) for k, p in load(model, mixed / "release").items()} == {k: bits(t) for k, t in expected.items()}

    both = {part: parts[part] for part in "bc"}
    (alike,) = merge_checkpoints(both, {"alike": {"b": 0.5, "c": 0.5}}, tmp_path / "out", progress=False, verify="full")
    assert set(Checkpoint(alike).model_tensors) == keys["b"]
    if "gpt2" not in name:  # whose layers alone are saved by themselves
        with pytest.raises(IncompatibleInputs, match=r"'b' was saved with singleton_local_shards .* give 'a' first"):
            merge_checkpoints(both | {"a": parts["a"]}, {"refused": WEIGHTS}, tmp_path / "out", progress=False)


def test_what_training_saves_beside_the_model_is_left_out(core, tmp_path):
    """The optimizer's, random, scheduler's and rerun state, at a run's root, its iter_* folder, and as release."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.rerun_state_machine import get_rerun_state_machine

    model = build(next(iter(MODELS)))
    optimizer = adam(model)
    parts, values = {}, {}
    for part in WEIGHTS:
        values[part] = fill(model, part)
        rerun = get_rerun_state_machine().state_dict(data_iterator=None, ckpt_format="torch_dist")
        save(
            model,
            tmp_path / part / "iter_0000010",
            args=argparse.Namespace(consumed_train_samples=640, consumed_valid_samples=64, hidden_size=32),
            optimizer=optimizer.sharded_state_dict({"model": model.sharded_state_dict()}),
            opt_param_scheduler={"num_steps": 640},
            rng_state=ShardedObject("rng_state", [{"random_rng_state": [1, 2]}], (1,), (0,)),
            rerun_state_machine=rerun,
        )
        (tmp_path / part / "latest_checkpointed_iteration.txt").write_text("10")
        parts[part] = tmp_path / part
    saved = Checkpoint(parts["a"])
    assert len(saved.metadata.tensors) > len(saved.model_tensors)
    assert any("rng_state" in key for key in saved.metadata.objects)

    parts["b"] = parts["b"] / "iter_0000010"
    (released,) = merge_checkpoints({"c": parts["c"]}, {"c": {"c": 1.0}}, tmp_path / "c_alone", progress=False)
    parts["c"] = released / "release"
    for layout, folder in (("release", "release"), ("iter", "iter_0000010")):
        (path,) = merge_checkpoints(parts, {layout: WEIGHTS}, tmp_path / "out", layout=layout, progress=False, verify="full")
        merged = Checkpoint(path)
        assert merged.location.path == path / folder
        assert set(merged.metadata.tensors) == set(saved.model_tensors)
        assert set(merged.metadata.objects) == set(saved.model_objects)
        expected = {key: linear_merge([values[p][key] for p in WEIGHTS], list(WEIGHTS.values())) for key in values["a"]}
        assert {k: bits(p.detach()) for k, p in load(model, path / folder).items()} == {k: bits(t) for k, t in expected.items()}
        common = dist_checkpointing.load_common_state_dict(str(path / folder))
        assert common["iteration"] == (10 if layout == "iter" else 0)
        assert vars(common["args"]) | {"iteration": 0} == {
            "consumed_train_samples": 0, "consumed_valid_samples": 0, "hidden_size": 32, "iteration": 0,
        }  # fmt: skip


def adam(model):
    """Its optimizer, after a step: only then has it a state to save."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(average_in_collective=False), model)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-3), [wrapped])
    optimizer.step()
    return optimizer
