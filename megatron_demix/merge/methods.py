"""What the weights of a mixture mean: the merge methods, by the names mergekit gives them, and what each needs to know.

Every method ends as one pass over the components for all mixtures (a Recipe): a weighted sum with coefficients for each logical
tensor, or a sum of deltas from the base that were thinned by rules. What a method must know of whole tensors beforehand (inner
products, thresholds) is computed once, from the components alone, and serves every mixture.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_demix.errors import ConfigError, IncompatibleInputs, MixtureError
from megatron_demix.merge.components import Components
from megatron_demix.merge.logical_tensors import FusedLayout, Partition
from megatron_demix.merge.plan import BytePlan
from megatron_demix.merge.rules import Rule, layer_of
from megatron_demix.merge.weights import LARGEST, is_weight
from megatron_demix.native import DeltaRules

BASE = "base"

# A base whose coefficient is this small is one that rounding left over.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Recipe:
    """What a native plan runs: weights for each part (one set where there is no partition), and rules for deltas, if any.

    Raises MixtureError where float32 does not hold a weight."""

    weights_SMK: np.ndarray
    deltas: DeltaRules | None = None

    def __post_init__(self) -> None:
        if (beyond := ~(np.abs(self.weights_SMK) <= LARGEST)).any():
            raise MixtureError(
                f"weights and scale make a coefficient {self.weights_SMK[beyond].flat[0]:.3g}, expected at most {LARGEST:.3g}: "
                "elements are summed in float32. Give smaller ones."
            )


@dataclass(frozen=True)
class Method(ABC):
    """A merge method with its options. base: the checkpoint that deltas are taken from."""

    base: Path | None = None

    def sources(self, components: Mapping[str, Path]) -> dict[str, Path]:
        """All checkpoints that are read: the components, then the base. Raises ConfigError if a component is called "base"."""
        if self.base is None:
            return dict(components)
        if BASE in components:
            raise ConfigError(f"a component is called {BASE!r}, which is the base's name. Rename the component.")
        return {**components, BASE: Path(self.base)}

    @abstractmethod
    def bind(self, components: Components) -> BoundMethod:
        """For these components (opened from `sources`). Raises ConfigError, IncompatibleInputs; reads no elements."""

    def check_names(self, mixtures: Sequence[str]) -> None:  # noqa: B027 - most name none
        """Raises ConfigError where an option names mixtures that are none of these."""

    @abstractmethod
    def describe(self, mixture: str | None = None) -> dict[str, Any]:
        """Name and options, for the provenance of a merge. Never a path. mixture: only what this one is made by."""


class BoundMethod(ABC):
    """A method for certain components. partition: the logical tensors it tells apart, if it does."""

    partition: Partition | None = None

    def __init__(self, method: Method) -> None:
        self.method = method

    def prepare(self, plan: BytePlan, threads: int | None) -> None:  # noqa: B027 - most need nothing
        """Compute what must be known of the parts that the plan's targets have elements of. Call once."""

    @abstractmethod
    def recipe(self, weights_MK: np.ndarray, mixtures: Sequence[str]) -> Recipe:
        """How to make mixtures, of these names, of the components. Raises MixtureError where the method has no result for some
        weights."""

    def describe(self, mixture: str | None = None) -> dict[str, Any]:
        """For the provenance: the method, and what it took from the components to tell tensors apart."""
        return self.method.describe(mixture)


@dataclass(frozen=True)
class Linear(Method):
    """theta = base + scale * sum_k w_k * (theta_k - base); without a base, theta = sum_k w_k * theta_k.

    scale > 1 stretches the components' mean away from the base, which makes up for the norm that averaging nearly orthogonal
    deltas loses. Weights that need not sum to 1 (normalize="off") make it task arithmetic (Ilharco et al., 2023).
    """

    scale: float = 1.0
    rules: tuple[Rule, ...] = ()
    """For certain tensors, layers or mixtures; the last one that matches counts, for weights and for the scale each."""

    def __post_init__(self) -> None:
        check_scale(self.scale)
        if self.base is None and any(rule.scale is not None for rule in self.rules):
            raise ConfigError("a rule with a scale needs a base: give the checkpoint that the components were trained from.")
        if self.base is None and self.scale != 1:
            raise ConfigError(f"scale {self.scale:g} needs a base: give the checkpoint that the components were trained from.")

    def bind(self, components: Components) -> BoundMethod:
        return _RuledLinear(self, components) if self.rules else _BoundLinear(self)

    def check_names(self, mixtures: Sequence[str]) -> None:
        for rule in self.rules:
            if not any(map(rule.is_for, mixtures)):
                raise ConfigError(f"the rule {rule.describe()} is for none of the mixtures, such as {mixtures[0]!r}.")

    def coefficients(self, weights_MK: np.ndarray, scale: float | None = None) -> np.ndarray:
        """[M, K] the sum's coefficients, or [M, K + 1] with the base's last."""
        return weights_MK if self.base is None else with_base((self.scale if scale is None else scale) * weights_MK)

    def describe(self, mixture: str | None = None) -> dict[str, Any]:
        base = {} if self.base is None else {"base": BASE, "scale": self.scale}
        rules = self.rules
        if mixture is not None:
            rules = tuple(replace(rule, mixtures="*") for rule in self.rules if rule.is_for(mixture))
        return {"name": "linear", **base, **({"rules": [rule.describe() for rule in rules]} if rules else {})}


class _BoundLinear(BoundMethod):
    method: Linear

    def recipe(self, weights_MK: np.ndarray, mixtures: Sequence[str]) -> Recipe:
        return Recipe(self.method.coefficients(weights_MK)[np.newaxis])


class _RuledLinear(BoundMethod):
    method: Linear
    partition: Partition

    def __init__(self, method: Linear, components: Components) -> None:
        super().__init__(method)
        self.partition = Partition(components.tensors, None)
        self._names = [name for name in components.names if method.base is None or name != BASE]
        self._weights: dict[Rule, np.ndarray] = {}
        names = [part.name for part in self.partition.parts()]
        last = max((layer for name in names if (layer := layer_of(name)) is not None), default=None)
        matches_SR = np.array([[rule.matches(name) for rule in method.rules] for name in names])
        for rule, matches_S in zip(method.rules, matches_SR.T, strict=True):
            if rule.layers is not None and last is not None and rule.layers[1] > last:
                raise ConfigError(
                    f"the rule {rule.describe()} is for layers that the components have not: theirs are 0-{last}."
                )
            if not matches_S.any():
                raise ConfigError(f"the rule {rule.describe()} matches no tensor of the components, such as {names[0]!r}.")
            given = dict(rule.weights or ())
            if unknown := set(given) - set(self._names):
                raise ConfigError(
                    f"the rule {rule.describe()}: {sorted(unknown)[0]!r} is not a component; they are {', '.join(self._names)}."
                )
            self._weights[rule] = np.array([given.get(name, 0.0) for name in self._names])
        # [U, R] the sets of rules that match some part, of which there are few, and [S] which of them matches each.
        self._sets_UR, self._set_of_part = np.unique(matches_SR, axis=0, return_inverse=True)

    def recipe(self, weights_MK: np.ndarray, mixtures: Sequence[str]) -> Recipe:
        sets = [list(itertools.compress(self.method.rules, matching_R)) for matching_R in self._sets_UR]
        coefficients_UMK = np.stack([self._coefficients(rules, weights_MK, mixtures) for rules in sets])
        return Recipe(coefficients_UMK[self._set_of_part.ravel()])

    def _coefficients(self, rules: Sequence[Rule], weights_MK: np.ndarray, mixtures: Sequence[str]) -> np.ndarray:
        rows = []
        for weights_K, mixture in zip(weights_MK, mixtures, strict=True):
            scale = None
            for rule in rules:
                if rule.is_for(mixture) and rule.weights is not None:
                    weights_K = self._weights[rule]
                elif rule.is_for(mixture):
                    scale = rule.scale
            rows.append(self.method.coefficients(weights_K[np.newaxis], scale))
        return np.concatenate(rows)


def check_scale(scale: float) -> None:
    """Raises ConfigError."""
    if not is_weight(scale):
        raise ConfigError(f"scale is {scale}, expected a finite number (in float32, so at most {LARGEST:.3g}).")


def with_base(coefficients_MK: np.ndarray) -> np.ndarray:
    """[M, K + 1] of sums over components and base, from the coefficients [M, K] of the components' deltas."""
    rest = np.array([1 - math.fsum(row) for row in coefficients_MK])
    rest[np.abs(rest) < _ROUNDING] = 0
    return np.hstack([coefficients_MK, rest[:, np.newaxis]])


def fused_layout(components: Components, known: FusedLayout) -> FusedLayout:
    """How the components' projections are fused: what their saved arguments say, else what is known. Raises ConfigError where
    these two contradict each other, IncompatibleInputs where there is an output gate, or gate and up rows alternate."""
    arguments = components.arguments[0]
    if arguments.get("attention_output_gate"):
        raise IncompatibleInputs(
            "the components' attention has an output gate, which fuses a fourth projection into linear_qkv: this method, which "
            "tells q, k and v apart, cannot merge them. Use --method linear."
        )
    for name in ("moe_mlp_glu_interleave_size", "moe_shared_expert_glu_interleave_size"):
        if arguments.get(name):
            raise IncompatibleInputs(
                f"the components were trained with {name} {arguments[name]}, which mixes gate and up rows in linear_fc1: this "
                "method, which tells them apart, cannot merge them. Use --method linear."
            )
    return FusedLayout.of_arguments(arguments).with_known(known)
