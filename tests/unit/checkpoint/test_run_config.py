"""What Megatron-Bridge says of its models, in the words of Megatron-LM's arguments."""

import pytest
import yaml
from dist_checkpoints import small_model, write_checkpoint
from refused_merges import refuse

from megatron_demix.checkpoint.model_function import model_function, model_sizes
from megatron_demix.checkpoint.reader import Checkpoint
from megatron_demix.checkpoint.run_config import RUN_CONFIG, saved_arguments
from megatron_demix.errors import CorruptInput, IncompatibleInputs
from megatron_demix.merge.engine import merge_checkpoints
from megatron_demix.merge.logical_tensors import FusedLayout

TRANSFORMER = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 24,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-6,
    "layernorm_zero_centered_gamma": False,
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "num_moe_experts": 8,
    "moe_ffn_hidden_size": 32,
    "moe_router_topk": 2,
    "window_size": None,
    "params_dtype": {"_target_": "torch.bfloat16", "_call_": False},
}
MODEL = {
    "seq_length": 128,
    "vocab_size": 150,
    "share_embeddings_and_output_weights": False,
    "position_embedding_type": "rope",
    "rotary_base": 1000000,
    "rotary_percent": 1.0,
    "rope_scaling": True,
    "rope_scaling_factor": 32.0,
    "seq_len_interpolation_factor": None,
}
SILU = {"_target_": "torch.nn.functional.silu", "_call_": False}
PROVIDER = {"_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider", **TRANSFORMER, **MODEL, "activation_func": SILU}
BUILDER = {
    "_target_": "megatron.bridge.models.gpt.model_config.GPTModelConfig",
    "_builder_": "megatron.bridge.models.gpt.gpt_builder.GPTModelBuilder",
    "transformer": {"_target_": "some.TransformerConfig", **TRANSFORMER, "activation_func": "silu"},
    **MODEL,
}
# The same model as Megatron-LM saves it.
ARGUMENTS = {
    **{k: TRANSFORMER[k] for k in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")},
    **{k: TRANSFORMER[k] for k in ("kv_channels", "normalization", "moe_ffn_hidden_size", "moe_router_topk")},
    **{k: MODEL[k] for k in ("seq_length", "position_embedding_type", "rotary_base", "rotary_percent", "rope_scaling_factor")},
    "group_query_attention": True,
    "norm_epsilon": 1e-6,
    "swiglu": True,
    "num_experts": 8,
    "untie_embeddings_and_output_weights": True,
    "use_rope_scaling": True,
}


def bridge_checkpoint(folder, model, seed=0):
    write_checkpoint(folder, small_model(seed), common={"checkpoint_version": 3.0, "iteration": 100})
    (folder / RUN_CONFIG).write_text(yaml.safe_dump({"model": model, "checkpoint": {"save_optim": True}}))
    return folder


@pytest.mark.parametrize("model", [PROVIDER, BUILDER])
def test_both_shapes_say_what_megatron_lm_says(tmp_path, model):
    said = saved_arguments(Checkpoint(bridge_checkpoint(tmp_path, model)))
    assert model_function(said) == model_function(ARGUMENTS)
    assert model_sizes(said) == model_sizes(ARGUMENTS)
    assert FusedLayout.of_arguments(said) == FusedLayout(num_query_groups=2, kv_channels=24, swiglu=True)


@pytest.mark.parametrize(
    ("gated", "activation", "expected"),
    [
        (True, "gelu", {}),
        (True, {"_target_": "megatron.core.activations.quick_gelu"}, {"quick_geglu": True}),
        (False, "squared_relu", {"squared_relu": True}),
        (False, "silu", {}),
    ],
)
def test_other_activations(tmp_path, gated, activation, expected):
    model = PROVIDER | {"gated_linear_unit": gated, "activation_func": activation}
    said = model_function(saved_arguments(Checkpoint(bridge_checkpoint(tmp_path, model))))
    names = ("swiglu", "quick_geglu", "squared_relu")
    assert {k: said[k] for k in names} == dict.fromkeys(names, False) | expected


def test_arguments_of_megatron_lm_count_first(tmp_path):
    write_checkpoint(tmp_path, small_model(0))
    (tmp_path / RUN_CONFIG).write_text(yaml.safe_dump({"model": PROVIDER}))
    assert saved_arguments(Checkpoint(tmp_path))["hidden_size"] == 8


def test_components_of_bridge_that_are_other_functions(tmp_path):
    a = bridge_checkpoint(tmp_path / "a", PROVIDER)
    b = bridge_checkpoint(tmp_path / "b", BUILDER | {"rotary_base": 10000}, seed=1)
    refuse(IncompatibleInputs, "rotary_base is 1000000 in the one and 10000 in the other", {"a": a, "b": b}, tmp_path)
    (b / RUN_CONFIG).write_text("model: [1]")
    refuse(CorruptInput, r"run_config.yaml: not a run's configuration. Correct it, or take it away", {"a": a, "b": b}, tmp_path)
    (b / RUN_CONFIG).write_text("model: 2024-13-01")
    refuse(CorruptInput, r"run_config.yaml: cannot be read \(month must be in 1..12\)", {"a": a, "b": b}, tmp_path)


@pytest.mark.parametrize("model", [PROVIDER | {"bf16": True, "fp16": False}, BUILDER])
def test_a_merge_in_another_precision_says_so_to_bridge(tmp_path, model):
    parts = {"a": bridge_checkpoint(tmp_path / "a", model)}
    (path,) = merge_checkpoints(parts, {"m": {"a": 1.0}}, tmp_path / "out", progress=False, dtype="fp16")
    carried = yaml.safe_load((path / "release" / RUN_CONFIG).read_text())["model"]
    changed = {"params_dtype": {"_target_": "torch.float16", "_call_": False}}
    expected = yaml.safe_load(yaml.safe_dump(model))
    expected.get("transformer", expected).update(changed)
    if "bf16" in expected:
        expected |= {"bf16": False, "fp16": True}
    assert carried == expected
