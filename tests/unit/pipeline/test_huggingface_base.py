"""base.huggingface: a folder that transformers wrote is a study's base, and what is trained from it goes back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_texts import write_texts

from megatron_demix.checkpoint.reader import Checkpoint
from megatron_demix.errors import ConfigError, IncompatibleInputs
from megatron_demix.huggingface.exporting import export_checkpoint
from megatron_demix.pipeline.dag import build_dag
from megatron_demix.pipeline.train_stages import checkpoint_of
from megatron_demix.study.load import load_study
from megatron_demix.train.derived import padded_vocab_size

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

VOCAB = 400  # more than the tokenizer's 257, as published models have it
STUDY = """
name: hf
tokenizer: {type: byte}
domains:
  - {name: code, inputs: [code.jsonl]}
  - {name: english, inputs: [english.jsonl]}
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 4, num_query_groups: 2, kv_channels: 16, ffn_hidden_size: 48,
        qk_layernorm: true, untie_embeddings_and_output_weights: true, norm_epsilon: 1.0e-6}
parallel: {tensor: 2}
train: {seq_length: 32, global_batch_size: 8, precision: fp32}
base: {huggingface: qwen}
component: {maturity_seeds: 0, tokens: 512}
search: {rounds: [8], objective: {code: 1}}
final: {tokens: 512}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A study and the folder it starts from."""
    folder = tmp_path_factory.mktemp("hf")
    torch.manual_seed(1)
    config = transformers.Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder / "qwen")
    (folder / "qwen" / "tokenizer.json").write_text("{}")
    write_texts(folder, "code", "english")
    (folder / "study.yaml").write_text(STUDY)
    return folder


def dag(folder, *overrides):
    return build_dag(load_study(folder / "study.yaml", list(overrides)), folder / "study.yaml", folder / "run")


def test_the_folder_becomes_the_base_and_a_component_of_it_goes_back(folder, make_train_job):
    from megatron_demix.train.trainer import train

    found = dag(folder)
    study, base = found.study, found.base
    assert (base.ranks, base.needs) == (0, ())
    base.finish()
    assert base.done()
    checkpoint = checkpoint_of(base)
    assert checkpoint == base.folder / "imported"
    # Rows of the folder's embedding, padded as every run of the study pads them, and cut for its tensor parallelism.
    rows = padded_vocab_size(study.model, study.parallel, 257)
    embedding = Checkpoint(checkpoint).model_tensors["embedding.word_embeddings.weight"]
    assert (rows, embedding.shape, len(embedding.chunks)) == (512, (512, 32), 2)

    model = study.model.model_dump()
    job = make_train_job(folder / "component", model=model, init_checkpoint=checkpoint, train_iters=2)
    train(job)
    export_checkpoint(job.work, folder / "back", reference=folder / "qwen", progress=False)
    back = transformers.AutoModelForCausalLM.from_pretrained(folder / "back")
    assert back.get_input_embeddings().weight.shape == (VOCAB, 32)
    assert (folder / "back" / "tokenizer.json").is_file()


def test_its_bytes_are_in_the_keys(folder):
    before = dag(folder)
    weights = folder / "qwen" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        after = dag(folder)
    finally:
        weights.write_bytes(content)
    assert before.base.key != after.base.key
    assert before.components["code"].key != after.components["code"].key
    assert dag(folder).base.key == before.base.key


def test_another_model_is_named_key_by_key(folder):
    message = (
        r"another model than the study's. It has model.num_layers: 2 \(the study: 4\), "
        r"model.qk_layernorm: True \(the study: False\)"
    )
    with pytest.raises(IncompatibleInputs, match=message):
        dag(folder, "model.num_layers=4", "model.qk_layernorm=false")
    with pytest.raises(ConfigError, match=r"base needs one of `tokens` \(train one\), `checkpoint` and `huggingface`"):
        dag(folder, "base.tokens=1M")
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        dag(folder, "base.huggingface=nowhere")


def test_an_embedding_is_not_cut(folder):
    with pytest.raises(ConfigError, match=r"model.padded_vocab_size is 258, expected at least 400"):
        dag(folder, "model.padded_vocab_size=258")
    assert dag(folder, "model.padded_vocab_size=400").study.model.padded_vocab_size == 400


def test_with_experts_stock_megatron_lm_has_to_be_told_its_layers(folder):
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
    shape = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Qwen3MoeConfig(
        **sizes, **shape, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False, max_position_embeddings=64
    )
    config.save_pretrained(folder / "moe")
    settings = [
        "base.huggingface=moe",
        "parallel.sequence_parallel=true",
        "model.num_experts=4",
        "model.moe_router_topk=2",
        "model.moe_ffn_hidden_size=16",
        "model.moe_aux_loss_coeff=0.001",
    ]
    assert dag(folder, *settings).study.model.padded_vocab_size == 512
    stock = ["trainer.backend=megatron_lm", "trainer.checkout=/somewhere"]
    with pytest.raises(
        ConfigError, match=r"Set model.transformer_impl to transformer_engine if that is installed where it tra"
    ):
        dag(folder, *settings, *stock)
    named = [dag(folder, *settings, f"model.transformer_impl={impl}") for impl in ("transformer_engine", "local")]
    assert [each.base.key == dag(folder, *settings).base.key for each in named] == [True, False]
    assert dag(folder, *settings, "model.transformer_impl=local").study.model.padded_vocab_size == 512
    with pytest.raises(IncompatibleInputs, match=r"It has model.moe_aux_loss_coeff: 0.001 \(the study: 0.01\)\. Set"):
        dag(folder, *settings[:-1])
    with pytest.raises(IncompatibleInputs, match=r"model.num_experts: 4 \(the study: None\)"):
        dag(folder, "base.huggingface=moe")


def test_rows_that_cannot_be():
    from megatron_demix.study.training import ModelSpec, ParallelSpec

    model = ModelSpec(num_layers=1, hidden_size=8, num_attention_heads=2, padded_vocab_size=300)
    assert padded_vocab_size(model, ParallelSpec(tensor=2), 257) == 300
    for parallel, vocabulary in ((ParallelSpec(), 301), (ParallelSpec(tensor=8), 257)):
        with pytest.raises(ConfigError, match=rf"model.padded_vocab_size is 300, expected at least {vocabulary}, the ids"):
            padded_vocab_size(model, parallel, vocabulary)
