"""The command line of tools/merge_dist_ckpt.py."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_demix.errors import ConfigError
from megatron_demix.exits import exit_code
from megatron_demix.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from megatron_demix.merge.engine import Merge
    from megatron_demix.merge.methods import Method


def main(argv: Sequence[str] | None = None, *, description: str | None = None) -> int:
    """Merge as the arguments say; returns the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: nothing half done stays
    return exit_code(lambda: _run(_parser(description).parse_args(argv)))


def _parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, epilog=_METHODS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="*", metavar="PATH:WEIGHT", help="a checkpoint and its weight")
    add("--components", nargs="+", metavar="NAME=PATH", default=[], help="named checkpoints, for use with --weights")
    add("--weights", type=Path, metavar="FILE", help="mixtures: one JSON object a line, or CSV with a column a component")
    add(
        "--mixed",
        type=Path,
        metavar="FILE",
        help="with --weights: what some components were trained on, mixtures of the others, in the same form; they correct "
        "merges to second order",
    )
    add("--output", type=Path, required=True, metavar="DIR")
    add("--layout", choices=("release", "iter"), default="release", help="release starts at iteration 0 (default)")
    add(
        "--normalize",
        choices=("error", "warn", "apply", "affine", "off"),
        default="error",
        help="weights that do not sum to 1 (default: error, as are negative ones; affine: these are allowed)",
    )
    add(
        "--dtype",
        choices=("bf16", "fp16", "fp32"),
        help="of what is written; components may then be of any of these (default: the components' own, which has to be one)",
    )
    add(
        "--max-chunk",
        type=parse_bytes,
        metavar="BYTES",
        help="cut tensors anew, by layer and expert, into chunks of at most this (default: as the first component is cut)",
    )
    add(
        "--verify",
        choices=("none", "sample", "full"),
        default="sample",
        help="what is read again before publishing (default: sample)",
    )
    method = parser.add_argument_group("method", "what the weights mean; see below")
    option = method.add_argument
    option("--method", default="linear", metavar="NAME", help="default: linear")
    option("--base", type=Path, metavar="PATH", help="what the components were trained from, for methods that merge deltas")
    option("--scale", type=float, metavar="X", help="base + X * the merged deltas (default: 1)")
    option("--rules", type=Path, metavar="FILE", help="linear: weights or scales of certain tensors or layers (YAML)")
    option("--density", type=float, metavar="SHARE", help="of each delta that stays, in (0, 1]")
    option("--gamma", type=float, metavar="SHARE", help="breadcrumbs: of the largest changes, dropped (default: 0.01)")
    option("--epsilon", type=float, metavar="X", help="della: how far probabilities reach from the density (default: 0.15)")
    option("--seed", type=int, metavar="N", help="dare, della: of what is dropped (default: 0)")
    option("--num-query-groups", type=int, metavar="N", help="of fused attention, where the components do not say")
    option("--kv-channels", type=int, metavar="N", help="the same")
    option("--swiglu", action=argparse.BooleanOptionalAction, help="the same, for linear_fc1")
    add(
        "--worker", metavar="I", help="with --workers: write every N-th file from the I-th on; auto: torchrun's or SLURM's rank"
    )
    add(
        "--workers", type=int, metavar="N", help="N processes write together, on any machines with one disk; the last publishes"
    )
    add("--threads", type=int, metavar="N", help="default: all processors this process may use")
    add("--max-memory", type=parse_bytes, default="256MiB", metavar="BYTES", help="for buffers (default: 256MiB)")
    add("--dry-run", action="store_true", help="check everything, say what would be written, write nothing")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


_METHODS = """\
methods (mergekit's names and definitions, for each layer's, expert's, q, k, v, gate and up tensor by itself). In brackets: how
well rankings of proxies agreed with those of trained models in the paper (arXiv 2602.00747, rho); no interval is known.
  linear (.787)         the weighted average, or base + scale * the averaged deltas. Start here; scale > 1 where components are
                        short and averaging shrinks what they learned
  multislerp (.785)     the average direction, with the average length: averaging does not shrink it
  karcher               the same with the true mean direction; differs where components lie far apart
  della, della_linear (.784), ties (.783), dare_linear, dare_ties (.757), breadcrumbs, breadcrumbs_ties (.735)
                        need --base and --density; drop part of each delta, so that components disturb one another less: ties
                        the small changes, dare any at random, della small ones rather than large ones, breadcrumbs the small
                        and the very large. All but dare_linear, della_linear and breadcrumbs also leave out, element by
                        element, changes against the sign of the weighted sum. For components that moved far
rules (linear): a YAML list; the last rule that matches a tensor counts. {tensors: "*.mlp.*", layers: 0-11, scale: 1.3} replaces
the scale, {tensors: "embedding.*", weights: {general: 1}} the weights; with mixtures: "m1_*", for these outputs only. Stacked
layers have numbers: decoder.layers.3.mlp...

multislerp and karcher average deltas where --base is given. With --normalize off, linear with --base is task arithmetic.
"""


def _method(arguments: argparse.Namespace) -> Method:
    from megatron_demix.merge.logical_tensors import FusedLayout
    from megatron_demix.merge.methods_by_name import make_method
    from megatron_demix.merge.rules import read_rules

    options = {name: getattr(arguments, name) for name in ("scale", "density", "gamma", "epsilon", "seed")}
    options["rules"] = read_rules(arguments.rules) if arguments.rules else None
    layout = FusedLayout(arguments.num_query_groups, arguments.kv_channels, arguments.swiglu)
    return make_method(arguments.method, arguments.base, layout=layout, **options)


def _run(arguments: argparse.Namespace) -> int:
    from megatron_demix.checkpoint.collector import without_collector
    from megatron_demix.merge.engine import check_means, plan_merge, write_merge

    components, mixtures, single = _what(arguments)
    said: dict[str, dict[str, Any]] = {}
    if arguments.mixed:
        mixtures, said = _corrected(list(components), mixtures, arguments)
        arguments.normalize = "affine"
    if arguments.threads is not None and arguments.threads < 1:
        raise ConfigError(f"--threads is {arguments.threads}, expected at least 1.")
    with without_collector():
        merge = plan_merge(
            components,
            mixtures,
            arguments.output,
            layout=arguments.layout,
            normalize=arguments.normalize,
            max_chunk=arguments.max_chunk,
            worker=_worker(arguments),
            into_output=single,
            method=_method(arguments),
            dtype=arguments.dtype,
            said=said,
        )
        if arguments.dry_run:
            check_means(merge, threads=arguments.threads, max_memory=arguments.max_memory)
            _show_plan(merge, arguments.output)
            return 0
        written = write_merge(
            merge,
            threads=arguments.threads,
            progress=not arguments.quiet,
            verify=arguments.verify,
            max_memory=arguments.max_memory,
        )
    for path in written:
        print(path)
    if len(written) < len(mixtures):
        print(
            f"{len(mixtures) - len(written)} outputs are not published yet: other workers write parts of them", file=sys.stderr
        )
    return 0


# Set by torchrun and by srun, for each process: its number, and how many there are. A batch script has SLURM_PROCID and
# SLURM_NTASKS, too, and is one process.
_RANKS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))


def _worker(arguments: argparse.Namespace) -> tuple[int, int] | None:
    """Raises ConfigError where --worker and --workers do not say who this process is."""
    if arguments.worker == "auto" and arguments.workers is None:
        for rank, size in _RANKS:
            if os.environ.get(rank, "").isdecimal() and os.environ.get(size, "").isdecimal():
                return int(os.environ[rank]), int(os.environ[size])
        raise ConfigError("--worker auto: neither torchrun nor srun has started this process. Give --worker I --workers N.")
    if (arguments.worker is None) != (arguments.workers is None):
        raise ConfigError("--worker and --workers go together.")
    if arguments.worker is None:
        return None
    if not arguments.worker.isdecimal():
        raise ConfigError(f"--worker is {arguments.worker!r}, expected a number from 0, or auto without --workers.")
    return int(arguments.worker), arguments.workers


def _what(arguments: argparse.Namespace) -> tuple[dict[str, Path], dict[str, dict[str, float]], bool]:
    """(components, mixtures, whether the one mixture goes to --output itself). Raises ConfigError."""
    from megatron_demix.merge.weights import read_weights

    if bool(arguments.inputs) == bool(arguments.components):
        raise ConfigError("give either PATH:WEIGHT arguments, or --components NAME=PATH with --weights FILE.")
    if bool(arguments.components) != bool(arguments.weights):
        raise ConfigError("--components and --weights go together.")
    if arguments.components:
        components = {}
        for text in arguments.components:
            name, equals, path = text.partition("=")
            if not equals or not name or not path:
                raise ConfigError(f"--components {text!r}: expected NAME=PATH.")
            if name in components:
                raise ConfigError(f"--components: {name!r} is given twice.")
            components[name] = Path(path)
        _check_distinct(components)
        return components, read_weights(arguments.weights), False
    components, weights = {}, {}
    for text in arguments.inputs:
        path, colon, weight = text.rpartition(":")
        try:
            value = float(weight)
        except ValueError:
            colon = ""
        if not colon or not path:
            raise ConfigError(f"{text!r}: expected PATH:WEIGHT, such as /runs/code:0.25.")
        if path in components:
            raise ConfigError(f"{path!r} is given twice. Add up its weights.")
        components[path], weights[path] = Path(path), value
    _check_distinct(components)
    return components, {arguments.output.name or "merged": weights}, True


def _check_distinct(components: dict[str, Path]) -> None:
    """Raises ConfigError where two are one checkpoint, whatever leads there: links, or a run's root and its tracker."""
    from megatron_demix.checkpoint.layout import find_checkpoint

    seen: dict[Path, str] = {}
    for name, path in components.items():
        folder = find_checkpoint(path).path.resolve()
        if (other := seen.setdefault(folder, name)) != name:
            raise ConfigError(f"components {other!r} and {name!r} are one checkpoint, {folder}. Add up its weights.")


def _corrected(
    components: Sequence[str], mixtures: dict[str, dict[str, float]], arguments: argparse.Namespace
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, Any]]]:
    """(coefficients of all components, what they were made from), by mixture, from weights of those that are not mixed. Raises
    ConfigError, MixtureError."""
    from megatron_demix.merge.second_order import SecondOrder
    from megatron_demix.merge.weights import read_weights, weight_matrix

    if not arguments.components or arguments.method != "linear" or arguments.normalize == "off":
        raise ConfigError("--mixed goes with --components, --method linear and weights that sum to 1 (not --normalize off).")
    mixed = read_weights(arguments.mixed)
    if unknown := [name for name in mixed if name not in components]:
        raise ConfigError(f"--mixed: {unknown[0]!r} is not among --components, which are {', '.join(components)}.")
    alone = [name for name in components if name not in mixed]
    weight_matrix(mixed, alone)  # raises where one is no mixture of these
    order = SecondOrder(alone, mixed)
    weights_MK = weight_matrix(mixtures, alone, arguments.normalize)
    coefficients, made_from = {}, {}
    for name, row, weights in zip(mixtures, order.coefficients(weights_MK).tolist(), weights_MK.tolist(), strict=True):
        coefficients[name] = dict(zip(order.names, row, strict=True))
        made_from[name] = {"second_order": {"weights": dict(zip(alone, weights, strict=True)), "mixed": mixed}}
    return coefficients, made_from


def _show_plan(merge: Merge, output: Path) -> None:
    job, parts = merge.job, merge.job.parts
    size = sum(p.length for p in job.placements)
    print(f"{len(parts.names)} components, {len(parts.tensors)} tensors, {format_bytes(size)} each")
    for name, checkpoint in zip(parts.names, parts.checkpoints, strict=True):
        location = checkpoint.location
        iteration = "" if location.iteration is None else f", iteration {location.iteration}"
        print(f"  {name}: {location.path} ({location.kind}{iteration})")
    bound = job.method
    if job.dtype:
        kept = sum(1 for key in parts.tensors if parts.kept_in_float32(key)) if job.dtype != "fp32" else 0
        print(f"written as {job.dtype}" + (f", {kept} tensors as fp32, as in the components" if kept else ""))
    described = bound.describe()
    options = [f"{k} {v}" for k, v in described.items() if k not in ("name", "base", "fused", "rules")]
    within = f"{bound.partition.num_parts} logical tensors" if bound.partition else "all tensors alike"
    print(f"method {', '.join([described['name'], *options])}: {within}")
    for rule in described.get("rules", ()):
        print(f"  rule: {', '.join(f'{k} {v}' for k, v in rule.items())}")
    if fused := described.get("fused"):
        print(f"  fused projections: {', '.join(f'{k} {v}' for k, v in fused.items())}")
    done = f" ({len(merge.targets) - len(merge.todo)} are there already)" if len(merge.todo) < len(merge.targets) else ""
    to_write = format_bytes(job.bytes_each * len(merge.todo))
    print(f"{len(merge.targets)} mixtures{done}, {to_write} to write under {output}")
