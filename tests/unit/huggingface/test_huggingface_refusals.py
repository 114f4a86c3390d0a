"""What is no model that both sides have is refused by name, and nothing is written."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_models import LLAMA3, MOE, VOCAB, same_tensors, save_model, tensors_of

from megatron_demix.checkpoint.reader import Checkpoint
from megatron_demix.errors import ConfigError, CorruptInput, IncompatibleInputs
from megatron_demix.huggingface.config import from_huggingface, read_config
from megatron_demix.huggingface.exporting import export_checkpoint
from megatron_demix.huggingface.importing import Layout, import_folder
from megatron_demix.study.training import ModelSpec

pytestmark = pytest.mark.filterwarnings("ignore")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model_type": "mamba"}, IncompatibleInputs, "model_type is 'mamba'; supported are llama, qwen2"),
        ({"attention_bias": True}, IncompatibleInputs, "attention_bias True; only False"),
        ({"partial_rotary_factor": 0.5}, IncompatibleInputs, "partial_rotary_factor 0.5; only 1.0"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            IncompatibleInputs,
            "rotary_factor 0.5; only 1",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, IncompatibleInputs, "layers of 'sliding_attention'"),
        ({"auto_map": {"AutoModelForCausalLM": "x.Y"}}, IncompatibleInputs, "code of the folder's own .* never run"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, IncompatibleInputs, "scales RoPE as .*yarn"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_scaling": {"type": "yarn", "factor": 4.0}},
            ConfigError,
            "rope_parameters .*default.* and rope_scaling .*yarn.*, expected one of them",
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, IncompatibleInputs, "layers that differ in RoPE"),
        ({"rope_scaling": "linear"}, ConfigError, "rope_scaling 'linear', expected a JSON object"),
        ({"rope_parameters": LLAMA3 | {"rope_type": "llama3", "factor": "8"}}, ConfigError, "factor '8', expected a positive"),
        ({"rms_norm_eps": "x"}, ConfigError, "rms_norm_eps 'x', expected a positive number"),
        ({"num_key_value_heads": "2"}, ConfigError, "num_key_value_heads '2', expected a number of 1"),
        ({"head_dim": 2.5}, ConfigError, "head_dim 2.5, expected a number of 1"),
        ({"hidden_size": None}, ConfigError, "hidden_size None, expected a number"),
        ({"rope_parameters": {"rope_theta": 10000.5}}, IncompatibleInputs, "rope_theta 10000.5; .* whole numbers alone"),
        ({"num_hidden_layers": 3}, IncompatibleInputs, "no 'model.layers.2.input_layernorm.weight'"),
        ({"num_hidden_layers": 1}, IncompatibleInputs, "9 tensors that a llama model has not"),
        ({"num_key_value_heads": 4}, IncompatibleInputs, r"has shape \[48, 64\], but config.json makes it \[96, 64\]"),
    ],
)
def test_a_config_that_cannot_be_converted(copy, tmp_path, changes, error, message):
    edit_config(copy, **changes)
    with pytest.raises(error, match=message):
        import_folder(copy, tmp_path / "base", progress=False)
    assert not (tmp_path / "base").exists()


def test_weights_that_are_not_all_there(copy, tmp_path):
    shards = sorted(copy.glob("*.safetensors"))
    shards[1].write_bytes(shards[1].read_bytes()[:100])
    with pytest.raises(CorruptInput, match=f"{shards[1].name}: not a whole safetensors file"):
        import_folder(copy, tmp_path / "base", progress=False)
    shards[1].unlink()
    with pytest.raises(CorruptInput, match=f"are missing, the first is {shards[1].name}"):
        import_folder(copy, tmp_path / "base", progress=False)
    for file in copy.glob("*.safetensors*"):
        file.unlink()
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "../model.safetensors"}}))
    with pytest.raises(CorruptInput, match=r"names '../model.safetensors', expected names of files beside it"):
        import_folder(copy, tmp_path / "base", progress=False)
    index.unlink()
    (copy / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"Weights in pickle files .* are not read"):
        import_folder(copy, tmp_path / "base", progress=False)
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        import_folder(tmp_path, tmp_path / "base", progress=False)


def test_two_sets_of_weights(copy, tmp_path):
    shutil.copyfile(min(copy.glob("*.safetensors")), copy / "model.safetensors")
    message = r"two sets of weights, model.safetensors and the files that model.safetensors.index.json names"
    with pytest.raises(ConfigError, match=message):
        import_folder(copy, tmp_path / "base", progress=False)


def test_a_head_that_is_said_to_be_tied(copy, tmp_path):
    """Some files repeat the embedding; where the head is another tensor, transformers 5 takes it, whatever config.json says."""
    from safetensors.torch import load_file, save_file

    edit_config(copy, tie_word_embeddings=True)
    with pytest.raises(IncompatibleInputs, match=r"their weights differ.* Set tie_word_embeddings: false"):
        import_folder(copy, tmp_path / "base", progress=False)
    tensors = tensors_of(copy)
    (shard,) = (file for file in copy.glob("*.safetensors") if "lm_head.weight" in load_file(file))
    save_file(load_file(shard) | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, shard)
    import_folder(copy, tmp_path / "base", progress=False)
    export_checkpoint(tmp_path / "base", tmp_path / "back", progress=False)
    del tensors["lm_head.weight"]
    assert same_tensors(tensors_of(tmp_path / "back"), tensors)


def test_the_weight_of_the_auxiliary_loss(tmp_path):
    save_model(tmp_path / "hf", "Qwen3Moe", **MOE, router_aux_loss_coef=0.003)
    model = import_folder(tmp_path / "hf", tmp_path / "base", progress=False)
    assert ModelSpec(**model.study()).moe_aux_loss_coeff == 0.003
    shutil.rmtree(tmp_path / "base" / "huggingface")
    export_checkpoint(tmp_path / "base", tmp_path / "back", vocab_size=VOCAB, progress=False)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["router_aux_loss_coef"] == 0.003
    # It is a setting of training: whoever trained with another one still has the reference's model.
    other = with_arguments(tmp_path / "base", tmp_path / "other", moe_aux_loss_coeff=[0.02])
    export_checkpoint(other, tmp_path / "again", reference=tmp_path / "hf", progress=False)
    edit_config(tmp_path / "hf", router_aux_loss_coef=0)
    assert from_huggingface(read_config(tmp_path / "hf"), "hf").moe_aux_loss_coeff == 0.0


def test_layouts_that_do_not_divide(llama, tmp_path):
    with pytest.raises(ConfigError, match="--tensor 3 does not divide the model's 4 attention heads"):
        import_folder(llama, tmp_path / "base", layout=Layout(tensor=3), progress=False)
    with pytest.raises(ConfigError, match="--pipeline 3 does not divide the model's 2 layers"):
        import_folder(llama, tmp_path / "base", layout=Layout(pipeline=3), progress=False)


def test_exports_that_would_be_another_model(llama, copy, tmp_path):
    import_folder(llama, tmp_path / "base", progress=False)
    edit_config(copy, rms_norm_eps=1e-6)
    with pytest.raises(IncompatibleInputs, match=r"norm_epsilon 1e-05, but .*config.json means 1e-06"):
        export_checkpoint(tmp_path / "base", tmp_path / "out", reference=copy, progress=False)
    with pytest.raises(ConfigError, match="Give one of them"):
        export_checkpoint(tmp_path / "base", tmp_path / "out", reference=llama, vocab_size=3, progress=False)
    opened = Checkpoint(tmp_path / "base")
    location = opened.model_tensors["decoder.final_layernorm.weight"].chunks[0].location
    distcp = opened.location.path / location.file
    data = bytearray(distcp.read_bytes())
    middle = slice(location.position + location.length // 2 - 60, location.position + location.length // 2 + 60)
    data[middle] = bytes(b ^ 1 for b in data[middle])
    distcp.write_bytes(data)
    with pytest.raises(CorruptInput, match="differ from their checksum"):
        export_checkpoint(tmp_path / "base", tmp_path / "out", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "copy"]


def with_arguments(base: Path, target: Path, **changes: Any) -> Path:
    """A copy of a checkpoint, without its Hugging Face configuration, as if trained with other arguments."""
    shutil.copytree(base, target, ignore=shutil.ignore_patterns("huggingface"))
    common = torch.load(target / "release" / "common.pt", weights_only=False)
    for name, value in changes.items():
        setattr(common["args"], name, value)
    torch.save(common, target / "release" / "common.pt")
    return target


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rotary_percent", 0.5),
        ("rotary_interleaved", True),
        ("rotary_seq_len_interpolation_factor", 2),
        ("no_rope_freq", 4),
        ("apply_layernorm_1p", True),
        ("window_size", (128, 0)),
        ("softmax_type", "off-by-one"),
        ("qk_l2_norm", True),
        ("apply_residual_connection_post_layernorm", True),
        ("activation_func_clamp_value", 7.0),
        ("use_mup", True),
    ],
)
def test_arguments_that_no_family_can_express(llama, tmp_path, name, value):
    import_folder(llama, tmp_path / "base", progress=False)
    for reference in (None, llama):
        other = with_arguments(tmp_path / "base", tmp_path / f"other-{reference is None}", **{name: value})
        with pytest.raises(IncompatibleInputs, match=rf"was trained with {name} .*cannot express.*would be another model"):
            export_checkpoint(other, tmp_path / "out", reference=reference, progress=False)


def test_arguments_of_routers_that_no_family_can_express(tmp_path):
    save_model(tmp_path / "hf", "Qwen3Moe", **MOE)
    import_folder(tmp_path / "hf", tmp_path / "base", progress=False)
    unlike = {
        "moe_router_score_function": "sigmoid",
        "moe_router_topk_scaling_factor": 2.5,
        "moe_router_enable_expert_bias": True,
        "moe_router_group_topk": 2,
        "moe_mlp_glu_interleave_size": 32,
        "moe_router_load_balancing_type": "sinkhorn",
    }
    for name, value in unlike.items():
        other = with_arguments(tmp_path / "base", tmp_path / name, **{name: value})
        with pytest.raises(IncompatibleInputs, match="cannot express"):
            export_checkpoint(other, tmp_path / "out", vocab_size=VOCAB, progress=False)
    same = {"moe_router_topk_scaling_factor": 1.0, "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"]}
    other = with_arguments(tmp_path / "base", tmp_path / "same", **same)
    export_checkpoint(other, tmp_path / "out", vocab_size=VOCAB, progress=False)


def test_arguments_under_their_new_names(llama, tmp_path):
    """Megatron-LM that generates its arguments from configuration classes saves norm_epsilon as layernorm_epsilon."""
    import_folder(llama, tmp_path / "base", progress=False)
    other = with_arguments(tmp_path / "base", tmp_path / "new", layernorm_epsilon=3e-6)
    common = torch.load(other / "release" / "common.pt", weights_only=False)
    del common["args"].norm_epsilon
    torch.save(common, other / "release" / "common.pt")
    export_checkpoint(other, tmp_path / "out", vocab_size=VOCAB, progress=False)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rms_norm_eps"] == 3e-6


def test_both_ways_to_say_rope_may_mean_the_same(copy, tmp_path):
    scaling = {"factor": 32, "rope_type": "llama3"} | LLAMA3
    edit_config(copy, rope_theta=5e5, rope_scaling=scaling, rope_parameters=scaling | {"rope_theta": 5e5, "factor": 32.0})
    model = import_folder(copy, tmp_path / "base", progress=False)
    assert (model.rotary_base, model.use_rope_scaling, model.rope_scaling_factor) == (5e5, True, 32.0)


def test_neither_way_works_without_safetensors(llama, tmp_path, monkeypatch):
    import_folder(llama, tmp_path / "base", progress=False)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    said = r"safetensors is not installed: pip install 'megatron-demix\[hf\]'"
    with pytest.raises(ConfigError, match=said):
        import_folder(llama, tmp_path / "again", progress=False)
    with pytest.raises(ConfigError, match=said):
        export_checkpoint(tmp_path / "base", tmp_path / "back", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
