#!/usr/bin/env python3
"""Turn a mixture and a token budget into the data set Megatron trains on: PREFIX.bin and PREFIX.idx, and a manifest.

pool.yaml:     {domains: {code: {prefixes: [path_without_extension, ...], max_epochs: 4}, ...}}
mixture.json:  {"weights": {"code": 0.3, ...}}, actual shares of the trained tokens

Give the run's consumption plus one token as the target (iterations x batch x sequence length + 1): then stock GPTDataset uses
the blend exactly once. Running the command again goes on after an interruption, and does nothing when it is done.
"""

import argparse
import json
import sys
from pathlib import Path

from megatron_demix.artifact import read_json
from megatron_demix.data.blend import MODES, Pool, build_blend
from megatron_demix.data.blend_report import blend_table
from megatron_demix.errors import ConfigError, DemixError
from megatron_demix.mixture import Mixture
from megatron_demix.units import parse_tokens


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, required=True, metavar="YAML", help="the domains' indexed data and epoch limits")
    parser.add_argument("--mixture", type=Path, required=True, metavar="JSON", help="shares by domain")
    parser.add_argument("--target-tokens", required=True, metavar="N", help="token budget: 250000, 4M, 30B")
    parser.add_argument("--output", type=Path, required=True, metavar="PREFIX", help="path prefix of the blend")
    parser.add_argument("--mode", choices=MODES, default="view", help="view (default): pooled .bin and a small .idx; "
                        "materialise: documents written out; args: weights and paths for Megatron's own blending")  # fmt: skip
    parser.add_argument("--seed", type=int, default=1234, help="of the shuffle (default: 1234)")
    parser.add_argument("--on-shortfall", choices=("error", "cap", "redistribute"), default="error",
                        help="a domain has too little: stop and say what would fit (default), take less in all, or give its "
                        "part to the others")  # fmt: skip
    parser.add_argument("--threads", type=int, metavar="N", help="default: all processors")
    parser.add_argument("--json", action="store_true", help="print the manifest instead of a table")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    arguments = parser.parse_args()
    try:
        weights = read_json(arguments.mixture)
        if not isinstance(weights, dict) or not isinstance(weights.get("weights"), dict):
            raise ConfigError(f'{arguments.mixture}: expected {{"weights": {{"<domain>": share, ...}}}}.')
        manifest = build_blend(
            Pool.read(arguments.pool),
            Mixture(weights["weights"], label=str(arguments.mixture)),
            parse_tokens(arguments.target_tokens),
            arguments.output,
            mode=arguments.mode,
            seed=arguments.seed,
            on_shortfall=arguments.on_shortfall,
            threads=arguments.threads,
            progress=not arguments.quiet,
        )
    except DemixError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    print(json.dumps(manifest, indent=1) if arguments.json else blend_table(manifest))
    return 0


if __name__ == "__main__":
    sys.exit(main())
