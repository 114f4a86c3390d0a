"""A study small enough for a test, on real text that every Python installation has."""

import ast
import json
import pydoc_data.topics
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster, private_cluster
from task_files import ARC, write_lines

STUDY = """
name: tiny
seed: 7
tokenizer: {type: bpe, train_vocab_size: 400, train_bytes: 200k}
prepare: {workers: 1, split: [0.8, 0.1, 0.1]}
domains:
  - {name: code, inputs: ["corpus/code.jsonl"], max_epochs: 8}
  - {name: english, inputs: ["corpus/english.jsonl"], max_epochs: 8}
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 2}
train: {seq_length: 32, micro_batch_size: 4, global_batch_size: 8, lr: 3e-3, precision: fp32, save_interval: 5, log_interval: 5}
base: {tokens: 7680}                      # 30 steps
component: {maturity_seeds: 0, tokens: 2560}                 # 10 steps
search: {rounds: [8, 4], objective: {code: 0.7, english: 0.3}, candidates: 2000, top: 16}
evaluate: {tokens_per_domain: 2k, tasks: [{name: quiz, format: arc, path: quiz.jsonl}]}
final: {tokens: 2560, baselines: [uniform], seeds: 1}
launch: {jobs: 2}
"""


@pytest.fixture(scope="session")
def study_folder(tmp_path_factory) -> Path:
    """A folder with study.yaml and its corpus: standard library sources as code, the language reference's topics as English."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "corpus").mkdir()
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = [p.read_text() for name in ("json", "email", "logging") for p in sorted((library / name).glob("*.py"))]
    functions = [
        ast.get_source_segment(s, n)
        for s in sources
        for n in ast.parse(s).body
        if isinstance(n, ast.FunctionDef | ast.ClassDef)
    ]
    topics = list(pydoc_data.topics.topics.values())
    for name, texts in (("code", functions), ("english", topics)):
        lines = [json.dumps({"text": text}) for text in texts if text and len(text) > 200]
        (folder / "corpus" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    write_lines(folder / "quiz.jsonl", ARC)
    (folder / "study.yaml").write_text(STUDY)
    return folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    with private_cluster(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running
