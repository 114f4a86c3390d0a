"""Indexed data that a study is given is checked when it is planned and prepared, not after the search by the final blend."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from indexed_data import make_indexed

from megatron_demix.data.tokenizer import load_tokenizer
from megatron_demix.errors import ConfigError, DemixError, IncompatibleInputs
from megatron_demix.indexed.writer import IndexedWriter
from megatron_demix.pipeline.dag import build_dag
from megatron_demix.study.data import TokenizerSpec
from megatron_demix.study.load import load_study

STUDY = """
name: s
domains:
  - {name: code, prefixes: {train: [code], valid: [code_valid], test: [code_test]}}
  - {name: math, prefixes: {train: [math], valid: [math_valid], test: [math_test]}}
tokenizer: {type: byte}
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 2}
train: {seq_length: 16, global_batch_size: 4}
base: {tokens: 640}
component: {maturity_seeds: 0, tokens: 320}
search: {rounds: [8, 4], objective: {code: 1}}
final: {tokens: 1k}
"""


@pytest.fixture
def study_path(tmp_path: Path) -> Path:
    for number, name in enumerate(("code", "code_valid", "code_test", "math", "math_valid", "math_test")):
        make_indexed(tmp_path / name, [30] * 9, seed=number, vocab_size=257)
    (tmp_path / "study.yaml").write_text(STUDY)
    return tmp_path / "study.yaml"


def prepare(study_path: Path, *overrides: str, run: str = "run") -> dict[str, dict[str, int]]:
    """The statistics of domain code."""
    dag = build_dag(load_study(study_path, list(overrides)), study_path, study_path.parent / run)
    dag.tokenizer.finish()
    dag.data["code"].finish()
    return json.loads((dag.data["code"].folder / "stats.json").read_text())["splits"]


def note(prefix: Path, **facts: object) -> None:
    Path(f"{prefix}.meta.json").write_text(json.dumps(facts))


def test_what_fits_is_counted(study_path):
    note(study_path.parent / "code", tokenizer=load_tokenizer(TokenizerSpec(type="byte")).fingerprint)
    assert prepare(study_path) == {split: {"documents": 9, "tokens": 270} for split in ("train", "valid", "test")}


def sentences(prefix: Path) -> None:
    with IndexedWriter(prefix, np.dtype("<u2"), sentences=True) as writer:
        writer.add(np.arange(270), np.full(9, 30), sequences_a_document=np.array([2, 7]))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda prefix: note(prefix, tokenizer="another"),
            r"'code', split 'valid': .*code_valid was made with tokenizer another",
        ),
        (sentences, r"code_valid has 9 sequences in 2 documents, expected one a document"),
    ],
    ids=["tokenizer", "sentences"],
)
def test_what_does_not_fit_is_refused(study_path, spoil, message):
    spoil(study_path.parent / "code_valid")
    with pytest.raises(DemixError, match=message):
        prepare(study_path)


def test_a_split_that_is_trained_on_may_not_be_empty(study_path):
    make_indexed(study_path.parent / "code_test", [0])
    assert prepare(study_path)["test"] == {"documents": 0, "tokens": 0}
    make_indexed(study_path.parent / "code", [0])
    with pytest.raises(DemixError, match=r"'code' is empty \(.*code hold no tokens\)"):
        prepare(study_path, run="another")


def test_ids_may_be_stored_wider_than_they_have_to_be_if_all_data_is_given(study_path):
    make_indexed(study_path.parent / "code", [30] * 9, vocab_size=70_000)
    assert prepare(study_path)["train"] == {"documents": 9, "tokens": 270}
    (study_path.parent / "math.jsonl").write_text('{"text": "one and one"}\n')
    with pytest.raises(IncompatibleInputs, match=r"'train': .* int32 tokens, expected uint16, which"):
        prepare(study_path, "domains.1={name: math, inputs: [math.jsonl]}", run="another")


def test_a_tokenizer_of_another_type_with_the_same_file_is_the_same(study_path):
    from megatron_demix.data.vocabularies import train_bpe

    (study_path.parent / "tokenizer.json").write_text(train_bpe(b"some text " * 50, 300))
    spec = TokenizerSpec(type="huggingface", model=study_path.parent / "tokenizer.json")
    own, of_bpe = load_tokenizer(spec).fingerprints
    given = "tokenizer={type: huggingface, model: tokenizer.json}"
    for noted in (own, of_bpe):
        note(study_path.parent / "code", tokenizer=noted)
        prepare(study_path, given, run=noted)
    note(study_path.parent / "code_test", tokenizer=load_tokenizer(TokenizerSpec(type="byte")).fingerprint)
    with pytest.raises(IncompatibleInputs, match=r"give the study that tokenizer, or prepare the data again"):
        prepare(study_path, given)


@pytest.mark.parametrize("absent", ["refused", "allowed"])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "domains.0.prefixes={train: [code], valid: [./code], test: [code_test]}",
            "'valid' of domain 'code': code is given twice",
        ),
        (
            "domains.1.prefixes={train: [link], valid: [math_valid], test: [math_test]}",
            "also as split 'train' of domain 'code'",
        ),
    ],
)
def test_data_that_is_named_twice_is_refused_when_the_study_is_planned(study_path, override, message, absent):
    (study_path.parent / "link.bin").symlink_to("code.bin")
    (study_path.parent / "link.idx").symlink_to("code.idx")
    if absent == "allowed":
        (study_path.parent / "code.bin").unlink()
    with pytest.raises(ConfigError, match=message):
        build_dag(load_study(study_path, [override]), study_path, study_path.parent / "run", absent_inputs=absent)
