"""Hugging Face in and out, judged by transformers: its logits from our import, its tensors back bit for bit from our export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_models import LLAMA3, MOE, SEQUENCE, VOCAB, same_tensors, save_model, tensors_of

from megatron_demix.checkpoint.reader import Checkpoint
from megatron_demix.errors import ConfigError, IncompatibleInputs, OutputExists, StorageError
from megatron_demix.huggingface import exporting
from megatron_demix.huggingface.command import main
from megatron_demix.huggingface.exporting import export_checkpoint
from megatron_demix.huggingface.importing import Layout, import_folder
from megatron_demix.merge.engine import merge_checkpoints
from megatron_demix.study.training import ModelSpec, ParallelSpec, TrainSpec

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama3": ("Llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0} | LLAMA3}),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {}),
    "qwen3_moe": ("Qwen3Moe", MOE | {"norm_topk_prob": True}),
    "qwen3_moe, shares not normalised": ("Qwen3Moe", MOE | {"norm_topk_prob": False}),
}


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


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, SEQUENCE), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("name", "layers"), [*((name, "local") for name in MODELS), ("qwen3_moe", "transformer_engine")])
def test_there_and_back(name, layers, tokens, tmp_path):
    """The model here has local layers: it loads a base that was made for either."""
    kind, settings = MODELS[name]
    original = save_model(tmp_path / "hf", kind, **settings)
    layout = Layout(tensor=2, pipeline=2, make_vocab_size_divisible_by=64)
    arguments = import_folder(tmp_path / "hf", tmp_path / "base", layout=layout, transformer_impl=layers, progress=False)

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


@pytest.mark.parametrize("layers", ["local", "transformer_engine"])
def test_layers_experts_and_halves_by_themselves(tmp_path, layers):
    """As megatron.core saves them with singleton_local_shards, and as a merge of such checkpoints is."""
    from dist_checkpoints import read_checkpoint, write_checkpoint

    save_model(tmp_path / "hf", "Qwen3Moe", **MOE)
    import_folder(tmp_path / "hf", tmp_path / "base", transformer_impl=layers, progress=False)
    apart = {}
    for key, stacked in read_checkpoint(tmp_path / "base" / "release").items():
        if ".layers." not in key:
            apart[key] = stacked
            continue
        for n, layer in enumerate(stacked):
            name = key.replace("layers.", f"layers.{n}.")
            for e, one in enumerate(layer) if ".experts." in key else [(None, layer)]:
                own = name.replace("experts.experts.", f"experts.experts.{e}.")
                apart |= (
                    dict(zip((f"{own}_w", f"{own}_v"), one.chunk(2), strict=True)) if "linear_fc1.weight" in own else {own: one}
                )
    write_checkpoint(tmp_path / "apart", apart, common={"iteration": 0})
    export_checkpoint(tmp_path / "apart", tmp_path / "back", reference=tmp_path / "hf", progress=False)
    assert same_tensors(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "hf"))
    for lost, said in (
        ("decoder.layers.1.mlp.experts.experts.2.linear_fc2.weight", r"has shape \[1, 4, 64, 32\], expected \[2, 4, 64, 32\]"),
        ("decoder.final_layernorm.weight", r"has no 'decoder\.final_layernorm\.weight', which a qwen3_moe model needs"),
    ):
        lacking = tmp_path / lost
        write_checkpoint(lacking, {key: tensor for key, tensor in apart.items() if key != lost}, common={"iteration": 0})
        with pytest.raises(IncompatibleInputs, match=said):
            export_checkpoint(lacking, tmp_path / "other", reference=tmp_path / "hf", progress=False)


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


def test_what_megatron_bridge_saved(llama, tmp_path):
    """Its common state has no arguments; its run_config.yaml describes the model."""
    model = vars(import_folder(llama, tmp_path / "base", progress=False))
    shutil.rmtree(tmp_path / "base" / "huggingface")
    torch.save({"checkpoint_version": 3.0, "iteration": 0}, tmp_path / "base" / "release" / "common.pt")
    fields = {
        "layernorm_epsilon": model.pop("norm_epsilon"),
        "num_moe_experts": model.pop("num_experts"),
        "rope_scaling": model.pop("use_rope_scaling"),
        "share_embeddings_and_output_weights": not model.pop("untie_embeddings_and_output_weights"),
        "seq_length": model.pop("max_position_embeddings"),
        "gated_linear_unit": True,
        "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "position_embedding_type": "rope",
    }
    run_config = tmp_path / "base" / "release" / "run_config.yaml"
    run_config.write_text(yaml.safe_dump({"model": model | fields}))
    export_checkpoint(tmp_path / "base", tmp_path / "back", vocab_size=VOCAB, progress=False)
    assert same_tensors(tensors_of(tmp_path / "back"), tensors_of(llama))
    run_config.write_text(yaml.safe_dump({"model": model | fields | {"rotary_base": 5000.0}}))
    with pytest.raises(IncompatibleInputs, match=r"was trained with rotary_base 5000.0, but .*config.json means 10000.0"):
        export_checkpoint(tmp_path / "base", tmp_path / "other", reference=llama, progress=False)


def test_a_vocabulary_that_no_reference_tells(llama, tmp_path, capsys, monkeypatch):
    import_folder(llama, tmp_path / "base", progress=False)
    shutil.rmtree(tmp_path / "base" / "huggingface")
    for size in (0, -5, 257):
        with pytest.raises(ConfigError, match=f"--vocab-size is {size}, expected 1 to 256"):
            export_checkpoint(tmp_path / "base", tmp_path / "x", vocab_size=size, progress=False)
    export_checkpoint(tmp_path / "base", tmp_path / "cut", vocab_size=VOCAB, progress=False)
    assert capsys.readouterr().err == ""
    export_checkpoint(tmp_path / "base", tmp_path / "all", progress=False)
    assert json.loads((tmp_path / "all" / "config.json").read_text())["vocab_size"] == 256
    said = capsys.readouterr().err
    assert "warning: " in said
    assert "All 256 rows of the vocabulary are written, with what they were padded by, which its saved arguments" in said

    known = exporting.saved_arguments
    monkeypatch.setattr(exporting, "saved_arguments", lambda checkpoint: known(checkpoint) | {"vocab_size": VOCAB})
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
