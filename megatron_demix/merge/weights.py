"""Merge weights as users give them: checked against the components, and never normalised silently."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from megatron_demix.artifact import KeyGivenTwice, unique_keys
from megatron_demix.csv_table import NotATable, read_csv
from megatron_demix.errors import ConfigError, MixtureError
from megatron_demix.mixture import TOLERANCE

Normalize = Literal["error", "warn", "apply", "affine", "off"]

LARGEST = float(np.finfo(np.float32).max)
"""Of a weight or scale: elements are summed in float32."""


def is_weight(value: Any) -> bool:
    """Whether it is a number that float32 holds."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST


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
            if not is_weight(weight):
                raise MixtureError(
                    f"mixture {name}: weight of {component!r} is {weight!r:.80}, expected a finite number (in float32, so at "
                    f"most {LARGEST:.3g})."
                )
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
    search_mixture.py writes it, an id and then a column a component. Raises ConfigError, also of one that says in its first
    cell that it holds shares."""
    path = Path(path)
    mixtures: dict[str, dict[str, float]] = {}
    for where, name, weights in _csv_rows(path) if path.suffix == ".csv" else _json_rows(path):
        if not _names_a_folder(name):
            raise ConfigError(f"{where}: {name!r} cannot name an output folder.")
        if name in mixtures:
            raise ConfigError(f"{where}: mixture {name!r} appears twice.")
        mixtures[name] = weights
    if not mixtures:
        raise ConfigError(f"{path}: holds no mixtures.")
    return mixtures


def _json_rows(path: Path) -> Iterator[tuple[str, Any, dict[str, float]]]:
    """(place, name, weights) of each line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot be read ({e}).") from e
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line, object_pairs_hook=unique_keys)
        except KeyGivenTwice as e:
            raise ConfigError(f"{where}: {e}") from e
        except (ValueError, RecursionError) as e:
            raise ConfigError(f"{where}: {line[:80]!r} is not JSON ({e}).") from e
        if not isinstance(row, dict) or "name" not in row or not isinstance(row.get("weights"), dict):
            form = '{"name": ..., "weights": {component: weight}}'
            raise ConfigError(f"{where}: expected {form}, found {line[:80]!r}.")
        yield where, row["name"], row["weights"]


def _csv_rows(path: Path) -> Iterator[tuple[str, str, dict[str, float]]]:
    """(place, name, weights) of each row below the first."""
    try:
        rows = read_csv(path)
    except NotATable as e:
        raise ConfigError(f"{e.place(path)}: {e}") from e
    if not rows:
        return
    first, (holds, *columns) = rows[0]
    if holds == "shares":
        raise ConfigError(
            f"{path}, line {first}: the first cell, 'shares', says that these are actual data shares; expected merge weights. "
            "Give the file that search_mixture.py sample wrote as --output."
        )
    for line, (name, *values) in rows[1:]:
        where = f"{path}, line {line}"
        try:
            weights = dict(zip(columns, map(float, values), strict=True))
        except ValueError as e:
            found = ",".join([name, *values])[:80]
            raise ConfigError(f"{where}: expected a name and {len(columns)} numbers, found {found!r}.") from e
        yield where, name, weights


def _names_a_folder(name: Any) -> bool:
    if not isinstance(name, str) or not name or name in (".", "..") or "/" in name or "\0" in name:
        return False
    try:
        name.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can say and no file system can hold
        return False
    return True
