#!/usr/bin/env python3
"""Random tokens at every path that study.yaml and recipe.py's pool name, so that both can be planned before the data is there.

    python examples/paper/stand_in.py

Writes examples/paper/data: 100 tokens for each billion of the real sets, and a tokenizer without merges. Plans only: what is
trained on this is noise. Remove the folder before the real data goes there; a folder that exists is left alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from recipe import DEMIX_224, read_sources

from megatron_demix.artifact import temporary_beside
from megatron_demix.indexed.format import token_dtype
from megatron_demix.indexed.writer import IndexedWriter

TOKENS_PER_BILLION = 100
DOCUMENT = 50
VOCAB_SIZE = 151_936


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    data = Path(__file__).with_name("data")
    if data.exists():
        print(f"{data} exists and is left alone")
        return 0
    write(data)
    print(f"wrote {data}: random tokens, good for plans only")
    return 0


def write(data: Path) -> None:
    sources = read_sources()
    unfinished = temporary_beside(data)
    _tokenizer(unfinished / "tokenizer")
    for source in sources:
        _indexed(unfinished / f"{source.name}_text_document", source.tokens)
    for name in DEMIX_224:
        _indexed(unfinished / name, sum(s.tokens for s in sources if s.candidate == name))
        for split in ("valid", "test"):
            _indexed(unfinished / f"{name}_{split}", 10)
    unfinished.rename(data)


def _indexed(prefix: Path, billions: int) -> None:
    lengths = np.full(billions * TOKENS_PER_BILLION // DOCUMENT, DOCUMENT)
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, int(lengths.sum()))
    with IndexedWriter(prefix, token_dtype(VOCAB_SIZE)) as writer:
        writer.add(tokens, lengths)


def _tokenizer(folder: Path) -> None:
    """Bytes, and an end of document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))


if __name__ == "__main__":
    sys.exit(main())
