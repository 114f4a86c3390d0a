"""The command line of tools/convert_hf.py."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_demix.exits import exit_code
from megatron_demix.units import parse_bytes


def main(argv: Sequence[str] | None = None, *, description: str | None = None) -> int:
    """Convert as the arguments say; returns the exit code."""

    def run() -> int:
        arguments = _parser(description).parse_args(argv)  # in here: sizes in it that are not understood are ConfigErrors
        return _import(arguments) if arguments.command == "import" else _export(arguments)

    return exit_code(run)


def _parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="import|export")
    add = commands.add_parser("import", help="a Hugging Face folder into a checkpoint to train from").add_argument
    add("source", type=Path, metavar="HF_DIR", help="a local folder with config.json and safetensors")
    add("--output", type=Path, required=True, metavar="DIR", help="loads with a plain --load DIR")
    add(
        "--tensor", "--tensor-model-parallel-size", type=int, default=1, metavar="N", help="cut chunks for N ranks (default: 1)"
    )
    add(
        "--pipeline",
        "--pipeline-model-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="recorded; layers are chunks anyway",
    )
    add(
        "--make-vocab-size-divisible-by",
        type=int,
        default=128,
        metavar="N",
        help="times --tensor, as in Megatron (default: 128)",
    )
    add(
        "--transformer-impl",
        choices=("transformer_engine", "local"),
        default="transformer_engine",
        help="which layers will load it; only mixtures of experts differ (default: transformer_engine)",
    )
    add("--quiet", action="store_true", help="no progress bar, no study section")
    add = commands.add_parser("export", help="a checkpoint into a Hugging Face folder").add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="a run's root, an iter_* or release folder")
    add("--output", type=Path, required=True, metavar="HF_DIR")
    add("--reference", type=Path, metavar="HF_DIR", help="take config.json and tokenizer from here (default: what import kept)")
    add("--vocab-size", type=int, metavar="N", help="rows of the embedding to keep, where there is no reference")
    add("--max-shard-size", type=parse_bytes, default="4GiB", metavar="BYTES", help="of a file, and of memory (default: 4GiB)")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


def _import(arguments: argparse.Namespace) -> int:
    import yaml

    from megatron_demix.huggingface.folder import COMPANIONS
    from megatron_demix.huggingface.importing import Layout, import_folder

    layout = Layout(arguments.tensor, arguments.pipeline, arguments.make_vocab_size_divisible_by)
    model = import_folder(
        arguments.source,
        arguments.output,
        layout=layout,
        transformer_impl=arguments.transformer_impl,
        progress=not arguments.quiet,
    )
    if not arguments.quiet:
        tokenizer = {"type": "huggingface", "model": str(arguments.output / COMPANIONS)}
        rows = {"padded_vocab_size": layout.padded_vocab_size(model.vocab_size)}
        section = {"tokenizer": tokenizer, "model": model.study() | rows, "base": {"checkpoint": str(arguments.output)}}
        print("In a study:\n" + yaml.safe_dump(section, sort_keys=False), end="", file=sys.stderr)
    print(arguments.output)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from megatron_demix.huggingface.exporting import export_checkpoint

    export_checkpoint(
        arguments.checkpoint,
        arguments.output,
        reference=arguments.reference,
        vocab_size=arguments.vocab_size,
        shard_bytes=arguments.max_shard_size,
        progress=not arguments.quiet,
    )
    print(arguments.output)
    return 0
