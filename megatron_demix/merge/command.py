"""The command line of tools/merge_dist_ckpt.py."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_demix.errors import ConfigError, DemixError
from megatron_demix.units import format_bytes, parse_bytes


def main(argv: Sequence[str] | None = None, *, description: str | None = None) -> int:
    """Merge as the arguments say; returns the exit code."""
    arguments = _parser(description).parse_args(argv)
    try:
        return _run(arguments)
    except DemixError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        print("stopped; nothing was published.", file=sys.stderr)
        return 130


def _parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="*", metavar="PATH:WEIGHT", help="a checkpoint and its weight")
    add("--components", nargs="+", metavar="NAME=PATH", default=[], help="named checkpoints, for use with --weights")
    add("--weights", type=Path, metavar="FILE", help="mixtures, one JSON object a line")
    add("--output", type=Path, required=True, metavar="DIR")
    add("--layout", choices=("release", "iter"), default="release", help="release starts at iteration 0 (default)")
    add(
        "--normalize",
        choices=("error", "warn", "apply", "off"),
        default="error",
        help="weights that do not sum to 1 (default: error)",
    )
    add("--verify", choices=("none", "sample", "full"), default="sample", help="what is read again before publishing")
    add("--base", type=Path, metavar="PATH", help="what the components were trained from, for --scale or task arithmetic")
    add("--scale", type=float, default=1.0, help="base + SCALE * sum of w * (component - base) (default: 1)")
    add("--threads", type=int, metavar="N", help="default: all processors this process may use")
    add("--max-memory", type=parse_bytes, default="256MiB", metavar="BYTES", help="for buffers (default: 256MiB)")
    add("--dry-run", action="store_true", help="check everything, say what would be written, write nothing")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    from megatron_demix.merge.engine import merge_checkpoints
    from megatron_demix.merge.methods import Linear

    components, mixtures, single = _what(arguments)
    if arguments.threads is not None and arguments.threads < 1:
        raise ConfigError(f"--threads is {arguments.threads}, expected at least 1.")
    if arguments.dry_run:
        return _dry_run(components, mixtures, arguments)
    written = merge_checkpoints(
        components,
        mixtures,
        arguments.output,
        layout=arguments.layout,
        normalize=arguments.normalize,
        threads=arguments.threads,
        progress=not arguments.quiet,
        verify=arguments.verify,
        max_memory=arguments.max_memory,
        into_output=single,
        method=Linear(arguments.base, arguments.scale),
    )
    for path in written:
        print(path)
    return 0


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
    return components, {arguments.output.name or "merged": weights}, True


def _dry_run(components: dict[str, Path], mixtures: dict[str, dict[str, float]], arguments: argparse.Namespace) -> int:
    from megatron_demix.merge.components import Components
    from megatron_demix.merge.methods import Linear
    from megatron_demix.merge.weights import weight_matrix

    method = Linear(arguments.base, arguments.scale)
    parts = Components(method.sources(components))
    weight_matrix(mixtures, list(components), arguments.normalize)
    size = sum(c.location.length for info in parts.tensors.values() for c in info.chunks)
    print(f"{len(parts.names)} components, {len(parts.tensors)} tensors, {format_bytes(size)} each")
    for name, checkpoint in zip(parts.names, parts.checkpoints, strict=True):
        location = checkpoint.location
        iteration = "" if location.iteration is None else f", iteration {location.iteration}"
        print(f"  {name}: {location.path} ({location.kind}{iteration})")
    print(f"{len(mixtures)} mixtures, {format_bytes(size * len(mixtures))} to write under {arguments.output}")
    return 0
