"""Weights and scales of certain tensors or layers, where they are not those of the rest."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from megatron_demix.errors import ConfigError
from megatron_demix.merge.weights import is_weight
from megatron_demix.mixture import TOLERANCE

_LAYER = re.compile(r"(?!mtp\.)(?:.*\.)?layers\.(\d+)\.")
_KEYS = ("tensors", "layers", "mixtures", "scale", "weights")


@dataclass(frozen=True)
class Rule:
    """For the tensors it matches, either `weights` in place of the mixture's, or `scale` in place of the method's.

    tensors: a glob over names, in which stacked layers have their numbers (decoder.layers.3.mlp.linear_fc1.weight). layers: the
    first and last layer, counted from 0; tensors outside of layers, and of multi-token prediction, are then not matched.
    mixtures: a glob over the names of the mixtures it is for.
    """

    tensors: str = "*"
    layers: tuple[int, int] | None = None
    scale: float | None = None
    weights: tuple[tuple[str, float], ...] | None = None
    mixtures: str = "*"

    def is_for(self, mixture: str) -> bool:
        return fnmatchcase(mixture, self.mixtures)

    def matches(self, name: str) -> bool:
        if self.layers is not None:
            layer = layer_of(name)
            if layer is None or not self.layers[0] <= layer <= self.layers[1]:
                return False
        return fnmatchcase(name, self.tensors)

    def describe(self) -> dict[str, Any]:
        """What it says, as parse_rules takes it."""
        said: dict[str, Any] = {"tensors": self.tensors}
        if self.layers is not None:
            said["layers"] = f"{self.layers[0]}-{self.layers[1]}"
        if self.mixtures != "*":
            said["mixtures"] = self.mixtures
        return said | ({"scale": self.scale} if self.weights is None else {"weights": dict(self.weights)})


def layer_of(name: str) -> int | None:
    """Which of the model's layers a tensor is of. None for one outside of them, and of multi-token prediction, whose layers are
    counted by themselves."""
    found = _LAYER.match(name)
    return int(found[1]) if found else None


def parse_rules(given: Any, what: str) -> tuple[Rule, ...]:
    """Rules from plain data: a list of {tensors, layers, mixtures, scale | weights}. what: where they are from, for messages.

    Raises ConfigError for unknown keys, wrong values, and weights that do not sum to 1.
    """
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise ConfigError(f"{what}: expected a list of rules, each with {', '.join(_KEYS[:2])}, and scale or weights.")
    return tuple(_parse(rule, f"{what}, rule {number}") for number, rule in enumerate(given, 1))


def read_rules(path: Path) -> tuple[Rule, ...]:
    """Rules of a YAML file. Raises ConfigError, for a key that is given twice too, of which YAML would take the last."""
    from megatron_demix.yaml_file import read_yaml

    return parse_rules(read_yaml(Path(path), str(path)), str(path))


def _parse(given: Any, what: str) -> Rule:
    if not isinstance(given, Mapping) or (unknown := set(given) - set(_KEYS)):
        said = f"unknown key {sorted(map(str, unknown))[0]!r}" if isinstance(given, Mapping) else f"{given!r}"
        raise ConfigError(f"{what}: {said}; a rule has {', '.join(_KEYS)}.")
    tensors, scale, weights = given.get("tensors", "*"), given.get("scale"), given.get("weights")
    if not isinstance(tensors, str):
        raise ConfigError(f"{what}: tensors is {tensors!r}, expected a pattern such as '*.mlp.*'.")
    if not isinstance(mixtures := given.get("mixtures", "*"), str):
        raise ConfigError(f"{what}: mixtures is {mixtures!r}, expected a pattern such as 'm1_*'.")
    if (scale is None) == (weights is None):
        raise ConfigError(f"{what}: give either scale or weights.")
    if scale is not None and not is_weight(scale):
        raise ConfigError(f"{what}: scale is {scale!r:.80}, expected a finite number (in float32).")
    if weights is not None and not (isinstance(weights, Mapping) and weights and all(map(is_weight, weights.values()))):
        raise ConfigError(f"{what}: weights are {weights!r}, expected a number for each component that counts.")
    if weights is not None and abs(math.fsum(weights.values()) - 1) > TOLERANCE:
        raise ConfigError(f"{what}: weights sum to {math.fsum(weights.values()):.6g}, expected 1.")
    pairs = None if weights is None else tuple((str(name), float(w)) for name, w in weights.items())
    return Rule(tensors, _layers(given.get("layers"), what), None if scale is None else float(scale), pairs, mixtures)


def _layers(given: Any, what: str) -> tuple[int, int] | None:
    if given is None:
        return None
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", str(given))
    if not found or int(found[2] or found[1]) < int(found[1]):
        raise ConfigError(f"{what}: layers is {given!r}, expected a number or a range such as 0-11, counted from 0.")
    return int(found[1]), int(found[2] or found[1])
