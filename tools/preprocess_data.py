#!/usr/bin/env python3
"""Tokenize text into Megatron's indexed format, with the flags of Megatron-LM's tools/preprocess_data.py.

Writes PREFIX_<key>_document.bin/.idx (PREFIX_<key>_sentence with --split-sentences) for each JSON key. Inputs are JSON Lines
(.jsonl, .json, .ndjson; also .gz and .zst), Parquet, plain text, folders of them, or globs. Interrupted, the same command goes
on where it stopped; finished, it prints the same counts and changes nothing. The output does not depend on --workers and
--partitions.

On several machines with one disk, each runs the same command with a --partition of its own, in a SLURM array for example:
    preprocess_data.py ... --partitions 16 --partition $SLURM_ARRAY_TASK_ID
The last to finish puts the parts together. Uncompressed JSON Lines are cut between lines, Parquet between row groups;
compressed and plain text files stay whole.
"""

import argparse
import json
import sys
from pathlib import Path

from megatron_demix.data.input_files import resolve_inputs
from megatron_demix.data.prepare import preprocess
from megatron_demix.data.tokenizer import Tokenizer, load_tokenizer
from megatron_demix.data.vocabularies import GPT2, find_file
from megatron_demix.errors import ConfigError
from megatron_demix.exits import check_at_least, exit_code
from megatron_demix.study.data import TokenizerSpec

# Megatron's names for what we call a tokenizer's type; its TikTokenizer reads a JSON of its own, not a .tiktoken file.
TYPES = {
    "byte": "byte",
    "ByteTokenizer": "byte",
    "bpe": "bpe",
    "huggingface": "huggingface",
    "HuggingFaceTokenizer": "huggingface",
    "GPT2BPETokenizer": "gpt2",
    "sentencepiece": "sentencepiece",
    "SentencePieceTokenizer": "sentencepiece",
    "GPTSentencePieceTokenizer": "sentencepiece",
    "Llama2Tokenizer": "sentencepiece",
    "tiktoken": "tiktoken",
}


def tokenizer_from(kind: str, model: Path | None, vocabulary: Path | None, merges: Path | None) -> Tokenizer:
    if TYPES[kind] == "gpt2":
        if vocabulary is None or merges is None or model is not None:
            raise ConfigError(f"--tokenizer-type {kind} needs --vocab-file and --merge-file, and takes no --tokenizer-model.")
        return Tokenizer(GPT2("gpt2", find_file("gpt2", vocabulary), None, merges))
    if vocabulary is not None or merges is not None:
        raise ConfigError(f"--vocab-file and --merge-file are for GPT2BPETokenizer, --tokenizer-type is {kind}.")
    if model is not None and (model / "meta.json").is_file():
        return load_tokenizer(model)
    if TYPES[kind] == "bpe":
        raise ConfigError("--tokenizer-type bpe needs --tokenizer-model, a tokenizer folder that demix prepare trained.")
    if (model is None) != (TYPES[kind] == "byte"):
        raise ConfigError(f"--tokenizer-type {kind} {'needs' if model is None else 'takes no'} --tokenizer-model.")
    return load_tokenizer(TokenizerSpec(type=TYPES[kind], model=model))


def main() -> int:
    return exit_code(run)


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files, folders or globs")
    parser.add_argument("--output-prefix", type=Path, required=True, metavar="PREFIX")
    parser.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY", help="default: text; for Parquet, a column")
    parser.add_argument(
        "--tokenizer-type",
        choices=TYPES,
        default="HuggingFaceTokenizer",
        metavar="TYPE",
        help=f"{', '.join(TYPES)} (default: %(default)s)",
    )
    parser.add_argument("--tokenizer-model", type=Path, metavar="PATH",
                        help="tokenizer.json, .model or .tiktoken file, or a folder that holds one")  # fmt: skip
    parser.add_argument("--vocab-file", type=Path, metavar="JSON", help="GPT2BPETokenizer's vocab.json")
    parser.add_argument("--merge-file", type=Path, metavar="TXT", help="GPT2BPETokenizer's merges.txt")
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    parser.add_argument("--split-sentences", action="store_true", help="one sequence a sentence (for BERT; GPTDataset would "
                        "shuffle sentences apart, so a blend refuses such data)")  # fmt: skip
    parser.add_argument("--keep-newlines", action="store_true", help="with --split-sentences: keep what separates sentences")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="threads (default: 1)")
    parser.add_argument("--on-bad-document", choices=("error", "reject"), default="error",
                        help="a line that is not UTF-8, not JSON or without text: stop (default), or leave it out and list it "
                        "in PREFIX_<key>_document.rejected.jsonl")  # fmt: skip
    parser.add_argument("--partitions", type=int, default=1, metavar="N", help="parts the input is cut into (default: 1)")
    parser.add_argument("--partition", type=int, metavar="I", help="make only this part, 0 to N - 1 (default: all, in turn; "
                        "what other processes have made is used)")  # fmt: skip
    parser.add_argument("--log-interval", type=int, metavar="N", help="accepted for Megatron's scripts; progress is a bar")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    arguments = parser.parse_args()
    if arguments.keep_newlines and not arguments.split_sentences:
        raise ConfigError("--keep-newlines has no effect without --split-sentences.")
    check_at_least("--workers", arguments.workers, 1)
    check_at_least("--partitions", arguments.partitions, 1)
    given = arguments
    tokenizer = tokenizer_from(given.tokenizer_type, given.tokenizer_model, given.vocab_file, given.merge_file)
    inputs = resolve_inputs(arguments.input)
    sentences = None
    if arguments.split_sentences:
        from megatron_demix.data.sentences import punkt

        sentences = punkt(keep_newlines=arguments.keep_newlines)
    number = arguments.partitions
    if not 0 <= (arguments.partition or 0) < number:
        raise ConfigError(f"--partition is {arguments.partition} of {number} partitions, expected 0 to {number - 1}.")
    parts = [(i, number) for i in range(number)] if arguments.partition is None else [(arguments.partition, number)]
    for key in arguments.json_keys:
        prefix = Path(f"{arguments.output_prefix}_{key}_{'sentence' if sentences else 'document'}")
        for part in parts:
            counts = preprocess(
                inputs,
                tokenizer,
                prefix,
                json_key=key,
                workers=arguments.workers,
                append_eod=arguments.append_eod,
                sentences=sentences,
                on_bad_document=arguments.on_bad_document,
                part=part if number > 1 else None,
                progress=not arguments.quiet,
            )
        if counts:
            print(json.dumps({"prefix": str(prefix)} | counts))
        else:
            print(f"{prefix} is not published yet: other partitions are missing", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
