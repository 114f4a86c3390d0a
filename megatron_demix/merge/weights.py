"""Merge weights as users give them: checked against the components, and never normalised silently."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from megatron_demix.errors import ConfigError, MixtureError
from megatron_demix.mixture import TOLERANCE

Normalize = Literal["error", "warn", "apply", "affine", "off"]


def weight_matrix(
    mixtures: Mapping[str, Mapping[str, float]], components: Sequence[str], normalize: Normalize = "error"
) -> np.ndarray:
    """weights_MK, float64. A component that a mixture does not name has weight 0.

    normalize: what to do with weights that do not sum to 1: error (also refuses negative ones), affine (error, but some may be
    negative), warn and normalise, apply (normalise), or off (use as given).
    Raises MixtureError naming the mixture, ConfigError for an unknown `normalize`.
    """
    if normalize not in get_args(Normalize):
        raise ConfigError(f"normalize is {normalize!r}, expected one of {', '.join(get_args(Normalize))}.")
    if not mixtures:
        raise MixtureError("no mixtures to merge. Give at least one set of weights.")
    weights = np.zeros((len(mixtures), len(components)))
    for m, (name, given) in enumerate(mixtures.items()):
        for component, weight in given.items():
            if component not in components:
                raise MixtureError(f"mixture {name}: {component!r} is not a component; they are {', '.join(components)}.")
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
                raise MixtureError(f"mixture {name}: weight of {component!r} is {weight!r}, expected a finite number.")
            weights[m, components.index(component)] = weight
        weights[m] = _normalized(weights[m], name, dict(zip(components, weights[m].tolist(), strict=True)), normalize)
    return weights


def _normalized(row: np.ndarray, name: str, shown: Mapping[str, float], normalize: Normalize) -> np.ndarray:
    if normalize == "off":
        return row
    total = math.fsum(row)
    listed = ", ".join(f"{component} {weight:g}" for component, weight in shown.items())
    if normalize == "error" and (row < 0).any():
        raise MixtureError(f"mixture {name}: a weight is negative: {listed}. Use --normalize affine if that is meant.")
    if abs(total - 1) <= TOLERANCE:
        return row
    if normalize in ("error", "affine"):
        raise MixtureError(
            f"mixture {name}: weights sum to {total:.6g}, expected 1 (tolerance {TOLERANCE:g}): {listed}. Correct them, or say "
            "--normalize apply to divide by the sum, or off to use them as they are."
        )
    if total <= 0:
        raise MixtureError(f"mixture {name}: weights sum to {total:g} and cannot be normalised: {listed}.")
    if normalize == "warn":
        warnings.warn(f"mixture {name}: weights sum to {total:.6g}; divided by the sum.", stacklevel=3)
    return row / total


def read_weights(path: Path) -> dict[str, dict[str, float]]:
    """Mixtures of a weights.jsonl, one {"name": ..., "weights": {component: weight}} a line; or of a CSV file (.csv) as
    search_mixture.py writes it, an id and then a column a component. Raises ConfigError."""
    mixtures: dict[str, dict[str, float]] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot be read ({e}).") from e
    columns = lines.pop(0).split(",")[1:] if Path(path).suffix == ".csv" and lines else None
    for number, line in enumerate(lines, 1 if columns is None else 2):
        if not line.strip():
            continue
        try:
            if columns is None:
                row = json.loads(line)
                name, weights = row["name"], dict(row["weights"])
            else:
                name, *values = line.split(",")
                weights = dict(zip(columns, map(float, values), strict=True))
        except (ValueError, KeyError, TypeError) as e:
            form = '{"name": ..., "weights": {component: weight}}' if columns is None else f"a name and {len(columns)} numbers"
            raise ConfigError(f"{path}, line {number}: expected {form}, found {line[:80]!r} ({e!r}).") from e
        if not isinstance(name, str) or not name or name in (".", "..") or "/" in name or "\0" in name:
            raise ConfigError(f"{path}, line {number}: {name!r} cannot name an output folder.")
        if name in mixtures:
            raise ConfigError(f"{path}, line {number}: mixture {name!r} appears twice.")
        mixtures[name] = weights
    if not mixtures:
        raise ConfigError(f"{path}: holds no mixtures.")
    return mixtures
