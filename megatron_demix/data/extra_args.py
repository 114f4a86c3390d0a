"""For a training script of one's own that calls Megatron-LM's pretrain(): one flag that makes its data a mixture.

from megatron_demix.data.extra_args import add_demix_args
pretrain(..., extra_args_provider=add_demix_args)

torchrun my_pretrain.py --demix-blend pool.yaml mixture.json 20B ...
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_demix.artifact import read_json
from megatron_demix.data.blend_files import megatron_words
from megatron_demix.data.pool import Pool, open_pool
from megatron_demix.data.quota import quotas
from megatron_demix.errors import DemixError, MixtureError
from megatron_demix.mixture import Mixture
from megatron_demix.units import parse_tokens

_OTHER_WAYS = ("--data-path", "--data-args-path", "--train-data-path", "--valid-data-path", "--test-data-path",
               "--per-split-data-args-path", "--mock-data")  # fmt: skip


def add_demix_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add --demix-blend to Megatron-LM's parser; an extra_args_provider.

    The flag sets --train-data-path (and those of the pool's valid and test data), in each rank alike. Together with another of
    Megatron's ways to name data, and for a mixture that the data cannot fill, it is an error."""
    group = parser.add_argument_group("megatron_demix")
    action = group.add_argument(
        "--demix-blend",
        nargs=3,
        action=_Blend,
        default=None,
        metavar=("POOL", "MIXTURE", "TOKENS"),
        help="train on this mixture (shares by domain) of the pool's indexed data: pool.yaml, mixture.json and the tokens that "
        "the run reads, as in 20B, by which epoch limits are checked",
    )
    # Megatron-LM would take one of them and say nothing of the other. argparse has no public way to add options that exist.
    ways = parser.add_mutually_exclusive_group()
    ways._group_actions += [action, *(a for a in parser._actions if set(a.option_strings) & set(_OTHER_WAYS))]
    return parser


class _Blend(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, _: Any = None) -> None:
        try:
            words = _words(Path(values[0]), Path(values[1]), parse_tokens(values[2]))
        except DemixError as e:
            parser.error(f"--demix-blend: {e}")
        setattr(namespace, self.dest, values)
        for split, given in words.items():
            setattr(namespace, f"{split}_data_path", given)


def _words(pool: Path, mixture: Path, num_tokens: int) -> dict[str, list[str] | None]:
    wanted = read_json(mixture)
    if not isinstance(wanted, dict) or not isinstance(wanted.get("weights"), dict):
        raise MixtureError(f'{mixture}: expected {{"weights": {{"<domain>": share, ...}}}}, one mixture.')
    domains = open_pool(Pool.read(pool)).domains
    planned = quotas(domains, Mixture(wanted["weights"], label=str(mixture)), num_tokens, "error")
    return megatron_words({name: tokens for name, tokens in planned.items() if tokens}, domains)
