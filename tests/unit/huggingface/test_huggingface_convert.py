"""Hugging Face in and out, judged by transformers: its logits from our import, its tensors back bit for bit from our export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_demix.checkpoint.reader import Checkpoint
from megatron_demix.errors import ConfigError, CorruptInput, IncompatibleInputs, OutputExists, StorageError
from megatron_demix.huggingface import exporting
from megatron_demix.huggingface.command import main
from megatron_demix.huggingface.config import from_huggingface, read_config
from megatron_demix.huggingface.exporting import export_checkpoint
from megatron_demix.huggingface.importing import Layout, import_folder
from megatron_demix.merge.engine import merge_checkpoints
from megatron_demix.study.training import ModelSpec, ParallelSpec, TrainSpec

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

VOCAB, SEQUENCE = 150, 24
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,  # not hidden_size / heads: a head size of its own
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama3": ("Llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0} | LLAMA3}),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {}),
    "qwen3_moe": ("Qwen3Moe", MOE | {"norm_topk_prob": True}),
    "qwen3_moe, shares not normalised": ("Qwen3Moe", MOE | {"norm_topk_prob": False}),
}


def save_model(folder: Path, kind: str, seed: int = 1, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A tiny model with random weights (biases and norms too), in several files, as transformers writes it."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**SHAPE | settings)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder, max_shard_size="60KB")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling_custom.py").write_text("raise SystemExit('never run')")
    return model


def logits_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


def megatron_logits(checkpoint: Path, spec: ModelSpec, tokens: torch.Tensor) -> torch.Tensor:
    """Of megatron.core's GPTModel with the checkpoint's weights, loaded by its own loader."""
    from megatron_demix.train.compat import cpu_compat

    train = TrainSpec(seq_length=SEQUENCE, global_batch_size=1, precision="fp32")
    with cpu_compat():
        from megatron_demix.train.model import build_model, destroy_parallel, initialize_parallel
        from megatron_demix.train.weights import load_weights

        initialize_parallel(ParallelSpec(), seed=1, timeout_s=60)
        try:
            model = build_model(spec, train, ParallelSpec(), VOCAB).eval()
            load_weights(model, checkpoint, vocab_size=VOCAB)
            positions = torch.arange(tokens.shape[1]).expand_as(tokens)
            with torch.no_grad():
                return model(tokens, positions, None)[..., :VOCAB]
        finally:
            destroy_parallel()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(left[n].dtype == right[n].dtype and torch.equal(left[n], right[n]) for n in left)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, SEQUENCE), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name, tokens, tmp_path):
    kind, settings = MODELS[name]
    original = save_model(tmp_path / "hf", kind, **settings)
    layout = Layout(tensor=2, pipeline=2, make_vocab_size_divisible_by=64)
    arguments = import_folder(tmp_path / "hf", tmp_path / "base", layout=layout, transformer_impl="local", progress=False)

    spec = ModelSpec(**arguments.study(), make_vocab_size_divisible_by=16)
    expected = logits_of(original, tokens)
    assert torch.allclose(megatron_logits(tmp_path / "base", spec, tokens), expected, atol=2e-5)

    export_checkpoint(tmp_path / "base", tmp_path / "back", shard_bytes=60_000, progress=False)
    assert same_tensors(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "hf"))
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    assert {p.name for p in (tmp_path / "back").iterdir()} >= {"tokenizer.json", "generation_config.json"}
    assert not list(tmp_path.rglob("base/**/*.py"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto").eval()
    assert torch.equal(logits_of(again, tokens), expected)


@pytest.mark.parametrize("name", ["llama3", "qwen2, tied", "qwen3_moe"])
def test_the_saved_arguments_make_the_same_config(name, tokens, tmp_path):
    """A checkpoint that knows no Hugging Face folder: components, and everything trained from scratch."""
    kind, settings = MODELS[name]
    original = save_model(tmp_path / "hf", kind, **settings)
    import_folder(tmp_path / "hf", tmp_path / "base", progress=False)
    shutil.rmtree(tmp_path / "base" / "huggingface")
    export_checkpoint(tmp_path / "base", tmp_path / "back", vocab_size=VOCAB, progress=False)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto").eval()
    assert torch.equal(logits_of(again, tokens), logits_of(original, tokens))
    # Not the family's defaults, which are ids of another tokenizer.
    assert (again.generation_config.bos_token_id, again.generation_config.eos_token_id) == (None, None)


def test_a_merged_checkpoint_is_the_mean_of_the_folders(tmp_path):
    """Two imports, cut differently."""
    for seed, name in enumerate("ab"):
        save_model(tmp_path / name, "Qwen3", seed, torch.bfloat16)
        import_folder(tmp_path / name, tmp_path / f"{name}-base", layout=Layout(tensor=seed + 1), progress=False)
    parts = {name: tmp_path / f"{name}-base" for name in "ab"}
    (merged,) = merge_checkpoints(parts, {"m": {"a": 0.5, "b": 0.5}}, tmp_path / "out", progress=False)
    export_checkpoint(merged, tmp_path / "hf", reference=tmp_path / "a", progress=False)
    a, b, found = (tensors_of(tmp_path / n) for n in ("a", "b", "hf"))
    mean = {n: (0.5 * a[n].float() + 0.5 * b[n].float()).to(torch.bfloat16) for n in a}
    assert same_tensors(found, mean)


def test_layers_with_names_of_their_own(tmp_path):
    """Megatron saves `layers.N.` where layers differ in kind; the tensors are the same."""
    from dist_checkpoints import read_checkpoint, write_checkpoint

    save_model(tmp_path / "hf", "Llama")
    import_folder(tmp_path / "hf", tmp_path / "base", progress=False)
    apart = {}
    for key, tensor in read_checkpoint(tmp_path / "base" / "release").items():
        if ".layers." in key:
            apart |= {key.replace("layers.", f"layers.{n}."): layer for n, layer in enumerate(tensor)}
        else:
            apart[key] = tensor
    write_checkpoint(tmp_path / "apart", apart, common={"iteration": 0})
    with pytest.raises(IncompatibleInputs, match="do not describe its model"):
        export_checkpoint(tmp_path / "apart", tmp_path / "back", progress=False)
    export_checkpoint(tmp_path / "apart", tmp_path / "back", reference=tmp_path / "hf", progress=False)
    assert same_tensors(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "hf"))


def test_megatron_finds_what_it_asks_for(tmp_path):
    """Its loader wants every layer's extra state and the arguments in the common state, by names that do not change."""
    save_model(tmp_path / "hf", "Qwen3Moe", **MOE)
    import_folder(tmp_path / "hf", tmp_path / "base", progress=False)
    objects = Checkpoint(tmp_path / "base").model_objects
    assert "decoder.layers.self_attention.linear_qkv._extra_state/shard_1_2" in objects
    assert "decoder.layers.mlp.experts.experts.linear_fc2._extra_state/shard_1.3_2.4" in objects
    # Norms of Transformer Engine 2, where they are modules of their own.
    norms = ("self_attention.q_layernorm", "self_attention.k_layernorm", "pre_mlp_layernorm")
    assert {f"decoder.layers.{norm}._extra_state/shard_{n}_2" for norm in norms for n in range(2)} <= set(objects)
    assert "decoder.final_layernorm._extra_state/shard_0_1" in objects
    assert (tmp_path / "base" / "latest_checkpointed_iteration.txt").read_text() == "release"
    common = torch.load(tmp_path / "base" / "release" / "common.pt", weights_only=False)
    assert common["args"].num_query_groups == 2
    assert common["args"].padded_vocab_size == 256
    assert common["args"].consumed_train_samples == 0
    with open(tmp_path / "base" / "release" / "__0_0.distcp", "rb") as file:
        location = objects["decoder.layers.self_attention.linear_qkv._extra_state/shard_1_2"]
        file.seek(location.position)
        assert torch.load(file, weights_only=True) == [None]


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "llama"
    save_model(folder, "Llama")
    return folder


@pytest.fixture
def copy(llama, tmp_path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copy"))


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


def test_a_vocabulary_that_no_reference_tells(llama, tmp_path, capsys, monkeypatch):
    import_folder(llama, tmp_path / "base", progress=False)
    shutil.rmtree(tmp_path / "base" / "huggingface")
    for size in (0, -5, 257):
        with pytest.raises(ConfigError, match=f"--vocab-size is {size}, expected 1 to 256"):
            export_checkpoint(tmp_path / "base", tmp_path / "x", vocab_size=size, progress=False)
    export_checkpoint(tmp_path / "base", tmp_path / "cut", vocab_size=VOCAB, progress=False)
    assert capsys.readouterr().err == ""
    assert export_checkpoint(tmp_path / "base", tmp_path / "all", progress=False).vocab_size == 256
    said = capsys.readouterr().err
    assert "warning: " in said
    assert "All 256 rows of the vocabulary are written, with what they were padded by, which its saved arguments" in said

    known = exporting.model_arguments
    monkeypatch.setattr(exporting, "model_arguments", lambda state: known(state) | {"vocab_size": VOCAB})
    export_checkpoint(tmp_path / "base", tmp_path / "again", progress=False)
    assert (
        "256 rows of the vocabulary are written, 106 of them padding (trained with vocab_size 150)" in capsys.readouterr().err
    )


def test_an_export_to_a_full_disk(llama, tmp_path):
    import resource

    import_folder(llama, tmp_path / "base", progress=False)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(StorageError, match=r"writing .*: File too large \(.*model.safetensors\)"):
            export_checkpoint(tmp_path / "base", tmp_path / "out", progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_an_export_whose_place_is_taken_meanwhile(llama, tmp_path, monkeypatch):
    import_folder(llama, tmp_path / "base", progress=False)

    def slow(*given):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "other").write_text("")
        return write_weights(*given)

    write_weights = exporting.write_weights
    monkeypatch.setattr(exporting, "write_weights", slow)
    with pytest.raises(OutputExists, match=r"has appeared meanwhile\. Nothing was published"):
        export_checkpoint(tmp_path / "base", tmp_path / "out", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["other"]


def test_done_is_skipped_and_nothing_is_overwritten(llama, tmp_path):
    import_folder(llama, tmp_path / "base", progress=False)
    import_folder(llama, tmp_path / "base", progress=False)
    with pytest.raises(OutputExists, match="other inputs or settings"):
        import_folder(llama, tmp_path / "base", layout=Layout(tensor=2), progress=False)
    with pytest.raises(OutputExists, match="Nothing is overwritten"):
        export_checkpoint(tmp_path / "base", llama, progress=False)


def test_the_command(llama, tmp_path, capsys):
    import yaml

    assert main(["import", str(llama), "--output", str(tmp_path / "base"), "--tensor", "2"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'base'}\n"
    section = yaml.safe_load(said.err[said.err.index("tokenizer:") :])
    assert ModelSpec(**section["model"]).num_query_groups == 2
    assert section["base"] == {"checkpoint": str(tmp_path / "base")}
    assert main(["export", str(tmp_path / "base"), "--output", str(tmp_path / "back"), "--quiet"]) == 0
    assert same_tensors(tensors_of(tmp_path / "back"), tensors_of(llama))
    assert main(["export", str(tmp_path / "nowhere"), "--output", str(tmp_path / "x")]) == 2
    assert "error: checkpoint" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "base"), "--output", str(tmp_path / "x"), "--max-shard-size", "foo"]) == 2
    assert "error: bytes: 'foo' is not understood" in capsys.readouterr().err
