"""The section about merging: the method, its options, and rules for certain tensors."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from megatron_demix.study.choices import EPSILON, MERGE_OPTIONS, MergeMethod
from megatron_demix.study.section import Section


class MergeRule(Section):
    tensors: str = "*"
    layers: int | str | None = None
    scale: float | None = None
    weights: dict[str, float] | None = None


class MergeSpec(Section):
    """How components become a proxy, in the search and on disk. An option that the method does not have is refused."""

    method: MergeMethod = "linear"
    from_base: bool | None = None
    """Merge the components' deltas from the base instead of the components."""
    scale: float | None = Field(None, allow_inf_nan=False)
    """Of the merged deltas, which are then added to the base."""
    rules: list[MergeRule] | None = None
    """Weights or scales of certain tensors or layers (megatron_demix.merge.rules)."""
    density: float | None = Field(None, gt=0, le=1)
    """Share of each delta that stays."""
    gamma: float | None = Field(None, ge=0, lt=1)
    """Share of the largest changes that are dropped."""
    epsilon: float | None = Field(None, ge=0, lt=0.5)
    """How far the probabilities to stay reach from density."""
    threads: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _options(self) -> MergeSpec:
        keys = type(self).model_fields.keys() - {"method", "threads"}
        has = [option for option in MERGE_OPTIONS[self.method] if option in keys]
        for option in sorted(keys):
            if getattr(self, option) is not None and option not in has:
                raise ValueError(f"merge.{option}: method {self.method} has no {option}; its options are {', '.join(has)}")
        if "density" in has and self.density is None:
            raise ValueError(f"merge.density: method {self.method} needs the share of each delta that stays, such as 0.5")
        epsilon = EPSILON if self.epsilon is None else self.epsilon
        if "epsilon" in has and self.density and self.density < 1 and not epsilon < self.density < 1 - epsilon:
            raise ValueError(f"merge.epsilon: density {self.density} - {epsilon} and + {epsilon} must lie in (0, 1)")
        return self

    @property
    def needs_base(self) -> bool:
        scales = (self.scale, *(rule.scale for rule in self.rules or ()))
        return bool(self.from_base) or self.density is not None or any(scale is not None for scale in scales)

    @property
    def options(self) -> dict[str, Any]:
        """The method's own options that are given, but for the base and the seed."""
        own = [option for option in MERGE_OPTIONS[self.method] if option not in ("from_base", "seed")]
        return {option: value for option in own if (value := getattr(self, option)) is not None}

    @property
    def is_random(self) -> bool:
        return "seed" in MERGE_OPTIONS[self.method]
