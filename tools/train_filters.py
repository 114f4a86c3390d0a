#!/usr/bin/env python3
"""Train the models that tools/clean_data.py scores documents with, from samples of one's own, and print how good they are on
documents held out. Nothing is downloaded, and the same samples give the same bytes.
"""

import argparse
import json
import sys
from pathlib import Path

from megatron_demix.data.input_files import resolve_inputs
from megatron_demix.errors import ConfigError
from megatron_demix.exits import exit_code


def main() -> int:
    return exit_code(run)


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    perplexity = kinds.add_parser("perplexity", help="an n-gram model of text one trusts: a folder with model.arpa and "
                                  "sentencepiece.model")  # fmt: skip
    perplexity.add_argument("--input", nargs="+", required=True, metavar="PATH", help="text that is as it should be")
    perplexity.add_argument("--order", type=int, default=3, metavar="N", help="pieces in an n-gram (default: 3)")
    perplexity.add_argument("--vocab-size", type=int, default=8000, metavar="N", help="SentencePiece's (default: 8000)")
    quality = kinds.add_parser("quality", help="a fastText classifier: a .bin file")
    quality.add_argument("--input", nargs="+", required=True, metavar="LABEL=PATH", help="examples of each label, such as "
                         "high=textbooks/*.jsonl low=crawl.jsonl")  # fmt: skip
    for kind in (perplexity, quality):
        kind.add_argument("--output", type=Path, required=True, metavar="PATH")
        kind.add_argument("--json-key", default="text", metavar="KEY", help="default: text")
    arguments = parser.parse_args()
    from megatron_demix.data.clean.models import train_perplexity, train_quality

    if arguments.kind == "perplexity":
        files = resolve_inputs(arguments.input)
        report = train_perplexity(files, arguments.output, order=arguments.order, vocab_size=arguments.vocab_size,
                                  json_key=arguments.json_key)  # fmt: skip
    else:
        samples: dict[str, list[Path]] = {}
        for given in arguments.input:
            label, equals, pattern = given.partition("=")
            if not equals:
                raise ConfigError(f"--input {given}: expected LABEL=PATH.")
            samples.setdefault(label, []).extend(resolve_inputs([pattern]))
        report = train_quality(samples, arguments.output, json_key=arguments.json_key)
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
