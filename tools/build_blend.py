#!/usr/bin/env python3
"""Turn a mixture and a token budget into the data set Megatron trains on: PREFIX.bin and PREFIX.idx, and a manifest.

pool.yaml:     {domains: {code: {prefixes: [path_without_extension, ...], max_epochs: 4}, ...}}
mixture.json:  {"weights": {"code": 0.3, ...}}, actual shares of the trained tokens; or a curriculum, PREFIX-stage1, ...:
               {"stages": [{"weights": {...}, "tokens": "10B"}, ...]} (then without --target-tokens)

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
from megatron_demix.data.curriculum import Stage, build_curriculum
from megatron_demix.errors import ConfigError
from megatron_demix.exits import exit_code
from megatron_demix.mixture import Mixture
from megatron_demix.units import parse_tokens


def build(arguments: argparse.Namespace) -> list[dict]:
    wanted = read_json(arguments.mixture)
    if not isinstance(wanted, dict) or not ("weights" in wanted) ^ ("stages" in wanted):
        raise ConfigError(f'{arguments.mixture}: expected {{"weights": {{"<domain>": share, ...}}}}, or "stages".')
    if ("stages" in wanted) == (arguments.target_tokens is not None):
        raise ConfigError("--target-tokens is needed for one mixture; the stages of a curriculum have their own.")
    if (arguments.worker is None) != (arguments.workers is None):
        raise ConfigError("--worker and --workers go together.")
    pool = Pool.read(arguments.pool)
    options = {
        "mode": arguments.mode,
        "seed": arguments.seed,
        "on_shortfall": arguments.on_shortfall,
        "worker": None if arguments.worker is None else (arguments.worker, arguments.workers),
        "pool_cache": arguments.pool_cache,
        "index_cache": arguments.data_cache_path,
        "remember_hashes": True,
        "threads": arguments.threads,
        "progress": not arguments.quiet,
    }
    label = str(arguments.mixture)
    if "weights" in wanted:
        mixture = Mixture(wanted["weights"], label=label)
        return [build_blend(pool, mixture, parse_tokens(arguments.target_tokens), arguments.output, **options)]
    return build_curriculum(pool, _stages(wanted["stages"], label), arguments.output, **options)


def _stages(given: object, label: str) -> list[Stage]:
    form = '{"weights": {"<domain>": share, ...}, "tokens": "10B"}'
    if not isinstance(given, list):
        raise ConfigError(f"{label}: stages are {given!r:.80}, expected a list of {form}.")
    stages = []
    for number, stage in enumerate(given, 1):
        where = f"{label}, stage {number}"
        if not isinstance(stage, dict) or not {"weights", "tokens"} <= set(stage):
            raise ConfigError(f"{where}: found {stage!r:.80}, expected {form}.")
        mixture = Mixture(stage["weights"], label=where)
        try:
            stages.append(Stage(mixture, parse_tokens(stage["tokens"])))
        except ConfigError as e:
            raise ConfigError(f"{where}: {e}") from e
    return stages


def main() -> int:
    return exit_code(run)


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, required=True, metavar="YAML", help="the domains' indexed data and epoch limits")
    parser.add_argument("--mixture", type=Path, required=True, metavar="JSON", help="shares by domain")
    parser.add_argument("--target-tokens", metavar="N", help="token budget: 250000, 4M, 30B")
    parser.add_argument("--output", type=Path, required=True, metavar="PREFIX", help="path prefix of the blend")
    parser.add_argument("--mode", choices=MODES, default="view", help="view (default): pooled .bin and a small .idx; "
                        "materialise: documents written out; args: weights and paths for Megatron's own blending")  # fmt: skip
    parser.add_argument("--seed", type=int, default=1234, help="of the shuffle (default: 1234)")
    parser.add_argument("--on-shortfall", choices=("error", "cap", "redistribute"), default="error",
                        help="a domain has too little: stop and say what would fit (default), take what it has and as much "
                        "of the others as without it, or give its part to the others; both change the shares")  # fmt: skip
    parser.add_argument("--worker", type=int, metavar="I", help="with --workers: this process writes shards I, I + N, ...")
    parser.add_argument("--workers", type=int, metavar="N", help="materialise together with N - 1 other processes, such as a "
                        "SLURM array; the last publishes")  # fmt: skip
    parser.add_argument("--pool-cache", type=Path, metavar="DIR", help="views of one pool share its .bin there (hard links)")
    parser.add_argument("--data-cache-path", type=Path, metavar="DIR", help="the run's; warns of stale indexes in it")
    parser.add_argument("--threads", type=int, metavar="N", help="default: all processors")
    parser.add_argument("--json", action="store_true", help="print the manifest instead of a table")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    arguments = parser.parse_args()
    manifests = build(arguments)
    for manifest in manifests:
        print(json.dumps(manifest, indent=1) if arguments.json else blend_table(manifest))
        if not manifest["files"]:
            print("not published yet: shards of other workers are missing", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
