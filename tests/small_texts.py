"""A few hundred distinct documents, for studies that are planned, or whose scores are given."""

from __future__ import annotations

from pathlib import Path

SMALL_STUDY = """
name: s
domains:
  - {name: code, inputs: [code.jsonl]}
  - {name: english, inputs: [english.jsonl]}
tokenizer: {type: byte}
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 2}
train: {seq_length: 16, global_batch_size: 4}
base: {tokens: 640}
component: {maturity_seeds: 0, tokens: 320}
search: {rounds: [8, 4], objective: {code: 1}}
final: {tokens: 1k}
"""
"""Of two of them."""


def write_texts(folder: Path, *names: str, num: int = 200) -> None:
    """folder/<name>.jsonl for each."""
    for name in names:
        (folder / f"{name}.jsonl").write_text("".join(f'{{"text": "{name} text {i}"}}\n' for i in range(num)))
