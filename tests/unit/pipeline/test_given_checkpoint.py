"""Checkpoints that a user gives: their weights decide keys, and their saved arguments whether they are the study's model."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pytest
import torch
from dist_checkpoints import small_model, write_checkpoint
from small_texts import write_texts

from megatron_demix.checkpoint.reader import Checkpoint
from megatron_demix.checkpoint.summary import format_summary, summarize
from megatron_demix.errors import ConfigError, CorruptInput, IncompatibleInputs
from megatron_demix.pipeline import preflight
from megatron_demix.pipeline.dag import Dag, build_dag
from megatron_demix.pipeline.given_scores import given_scores, named_checkpoints
from megatron_demix.pipeline.merging import check_rules
from megatron_demix.pipeline.train_stages import checkpoint_of
from megatron_demix.study.load import load_study
from megatron_demix.study.training import ModelSpec, TrainSpec
from megatron_demix.train.derived import model_arguments

STUDY = """
name: s
domains:
  - {name: code, inputs: [code.jsonl]}
  - {name: english, inputs: [english.jsonl]}
tokenizer: {type: byte}
model: {num_layers: 2, hidden_size: 8, num_attention_heads: 2}
train: {seq_length: 16, global_batch_size: 4}
base: {checkpoint: base}
component: {maturity_seeds: 0, tokens: 320}
search: {rounds: [8], objective: {code: 1}}
final: {tokens: 1k}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_texts(tmp_path, "code", "english")
    (tmp_path / "study.yaml").write_text(STUDY)
    return tmp_path


def build(folder: Path, *overrides: str) -> Dag:
    return build_dag(load_study(folder / "study.yaml", list(overrides)), folder / "study.yaml", folder / "run")


def saved(**arguments) -> dict:
    """A common state as Megatron-LM saves it, of the study's model but for these arguments."""
    model, train = ModelSpec(num_layers=2, hidden_size=8, num_attention_heads=2), TrainSpec(seq_length=16, global_batch_size=4)
    namespace = argparse.Namespace(**model_arguments(model, train) | arguments)
    return {"args": namespace, "checkpoint_version": 3.0, "iteration": 100}


def test_weights_decide_the_key_and_their_place_does_not(folder, monkeypatch):
    """Of two checkpoints of one shape, .metadata and the sizes of all files are the same."""
    one, other = (write_checkpoint(folder / name, small_model(seed)) for seed, name in enumerate(("base", "other")))
    assert (one / ".metadata").read_bytes() == (other / ".metadata").read_bytes()
    first = build(folder)
    assert build(folder, "base.checkpoint=other").base.key != first.base.key
    first.base.finish()
    monkeypatch.setattr(Checkpoint, "payload", lambda *_: pytest.fail("it was read again"))
    assert build(folder).base.key == first.base.key
    monkeypatch.undo()

    # Moved, it is the same stage, which stands for where it lies now; and others may lie where it was.
    one.rename(folder / "moved")
    shutil.copytree(other, one)
    moved = build(folder, "base.checkpoint=moved").base
    assert (moved.key, moved.done(), checkpoint_of(moved)) == (first.base.key, True, folder / "moved")
    again = build(folder).base
    assert (again.key, again.done()) == (build(folder, "base.checkpoint=other").base.key, False)


def test_scores_of_a_checkpoint_are_those_of_its_weights_and_of_the_model(folder):
    for seed, name in enumerate(("base", "other")):
        write_checkpoint(folder / name / "release", small_model(seed))
        (folder / name / "latest_checkpointed_iteration.txt").write_text("release")

    def key(name: str, *overrides: str) -> str:
        return given_scores(build(folder, *overrides), named_checkpoints([f"mine={folder / name}"]), final=False).key

    assert key("base") != key("other")
    # What is saved says nothing of the model here, so only the key can tell.
    assert key("base") != key("base", "model.norm_epsilon=1e-6")
    assert key("base") == key("base", "train.lr=1")


@pytest.mark.parametrize("lost", [["common.pt"], ["metadata.json"], ["metadata.json", "common.pt"]])
def test_a_checkpoint_that_megatron_would_not_load_is_refused(folder, lost):
    write_checkpoint(folder / "base", small_model(0))
    dag = build(folder)
    scored = write_checkpoint(folder / "scored", small_model(1))
    for place in (scored, folder / "base"):
        for name in lost:
            (place / name).unlink()
    said = rf"scored: {' and '.join(lost)} (is|are) missing, without which Megatron does not load it\. Copy the whole folder"
    with pytest.raises(CorruptInput, match=said):
        given_scores(dag, {"mine": scored}, final=False)
    with pytest.raises(CorruptInput, match=r"base: .* missing"):
        build(folder)
    build_dag(dag.study, folder / "study.yaml", folder / "run", absent_inputs="remembered")  # what looks
    assert f"missing: {', '.join(lost)}; Megatron" in format_summary(summarize(scored))


@pytest.mark.parametrize("which", ["base", "scored"])
def test_another_model_is_named_key_by_key(folder, which):
    arguments = {"rotary_base": 500000, "norm_epsilon": 1e-6}
    write_checkpoint(folder / "base", small_model(0), common=saved(**arguments if which == "base" else {}))
    write_checkpoint(folder / "scored", small_model(1), common=saved(**arguments))

    def look(*overrides: str) -> None:
        given_scores(build(folder, *overrides), named_checkpoints([str(folder / "scored")]), final=False)

    message = (
        rf"study 's': checkpoint .*{which} is another model .* It has model.rotary_base: 500000 \(the study: 10000\), "
        r"model.norm_epsilon: 1e-06 \(the study: 1e-05\). Set these."
    )
    with pytest.raises(IncompatibleInputs, match=message):
        look()
    if which == "base":
        build(folder, "model.rotary_base=500000", "model.norm_epsilon=1e-6")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_layers": 4}, r"model.num_layers: 4 \(the study: 2\)"),
        ({"hidden_size": 16, "kv_channels": 8}, r"model.hidden_size: 16 \(the study: 8\)"),
        (
            {"num_layers": 4, "untie_embeddings_and_output_weights": True, "rotary_base": 500},
            r"model.num_layers: 4 \(the study: 2\), model.untie_embeddings_and_output_weights: True \(the study: False\), "
            r"model.rotary_base: 500 \(the study: 10000\)",
        ),
        (
            {"num_experts": 8, "moe_ffn_hidden_size": None, "moe_router_topk": 2},
            r"model.num_experts: 8 \(the study: None\)",
        ),
    ],
)
def test_another_size_is_named_first_and_what_follows_from_it_is_not(folder, arguments, said):
    write_checkpoint(folder / "base", small_model(0), common=saved(**arguments))
    with pytest.raises(
        IncompatibleInputs, match=rf"checkpoint .*base is another model than the study's\. It has {said}\. Set these"
    ):
        build(folder)


def test_layers_are_as_wide_as_the_base_where_the_study_does_not_say(folder):
    write_checkpoint(folder / "base", small_model(0), common=saved(ffn_hidden_size=48))
    assert build(folder).study.model.ffn_hidden_size == 48
    with pytest.raises(IncompatibleInputs, match=r"It has model.ffn_hidden_size: 48 \(the study: 32\)\. Set these"):
        build(folder, "model.ffn_hidden_size=32")
    write_checkpoint(folder / "other", small_model(0), common=saved())
    assert build(folder, "base.checkpoint=other").study.model.ffn_hidden_size is None  # the default stays out of keys


def test_a_model_that_no_study_has(folder):
    write_checkpoint(folder / "base", small_model(0), common=saved(squared_relu=True))
    with pytest.raises(
        IncompatibleInputs, match=r"It has squared_relu True. What has no `model.` before it, no model of a study"
    ):
        build(folder)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        # As stock Megatron-LM saves them, which spells out what is off, in newer versions under other names.
        {"squared_relu": False, "window_size": None, "moe_router_topk_scaling_factor": None, "moe_router_topk": 8},
        {"group_query_attention": False, "num_query_groups": 1, "params_dtype": torch.bfloat16, "hidden_dropout": 0.1},
        {"norm_epsilon": None, "layernorm_epsilon": 1e-5, "multi_latent_attention": False, "q_lora_rank": 512},
    ],
)
def test_what_means_the_same_is_the_same(folder, arguments):
    write_checkpoint(folder / "base", small_model(0), common=saved(**arguments))
    build(folder)


def test_a_base_of_another_precision_is_refused_where_components_are_merged_with_it(folder):
    write_checkpoint(folder / "base", small_model(0))
    preflight.check([build(folder, "merge.scale=0.8").base])
    write_checkpoint(folder / "base", {key: tensor.float() for key, tensor in small_model(0).items()})
    preflight.check([build(folder).base])
    dag = build(folder, "merge.scale=0.8")  # looking, and cancelling, go on
    said = (
        r"base is float32, and components are trained as bfloat16 \(train\.pre.*merge_dist_ckpt.py CHECKPOINT:1 --dtype bf16 "
    )
    with pytest.raises(IncompatibleInputs, match=said):
        preflight.check([dag.base])
    preflight.check([build(folder, "merge.scale=0.8", "train.precision=fp32").base])


def test_rules_of_layers_that_the_model_has_not(folder):
    write_checkpoint(folder / "base", small_model(0))
    check_rules(build(folder, "merge.rules=[{layers: 0-1, scale: 2}]").study)
    for layers in ("1-2", "2-3"):
        said = rf"merge\.rules\.0: layers {layers}, but model\.num_layers is 2, .*: the last is 1"
        with pytest.raises(ConfigError, match=said):
            check_rules(build(folder, f"merge.rules=[{{layers: {layers}, scale: 2}}]").study)


@pytest.mark.parametrize("rows", [400, 401])
def test_the_embedding_keeps_all_its_rows(folder, rows):
    write_checkpoint(folder / "base", small_model(0) | {"embedding.word_embeddings.weight": torch.zeros(rows, 8)})
    assert build(folder).study.model.padded_vocab_size == rows  # 384 would do for the tokenizer's 257 ids
    assert build(folder, "model.padded_vocab_size=512").study.model.padded_vocab_size == 512
    if rows % 2:
        with pytest.raises(ConfigError, match=r"padded_vocab_size is 401, expected at least 401, .* of parallel.tensor 2"):
            build(folder, "parallel.tensor=2")
