"""What the weights of a mixture mean: the coefficient each checkpoint gets in the sum.

Plain averages, deltas stretched from a common base, and task arithmetic are all linear, so they fold into one matrix of
coefficients and cost the same single pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_demix.errors import ConfigError

BASE = "base"

# A base whose coefficient is this small is one that rounding left over.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Linear:
    """theta = base + scale * sum_k w_k * (theta_k - base); without a base, theta = sum_k w_k * theta_k.

    scale > 1 stretches the components' mean away from the base, which makes up for the norm that averaging nearly orthogonal
    deltas loses. Weights that need not sum to 1 (normalize="off") make it task arithmetic (Ilharco et al., 2023).
    """

    base: Path | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ConfigError(f"scale is {self.scale}, expected a finite number.")
        if self.base is None and self.scale != 1:
            raise ConfigError(f"scale {self.scale:g} needs a base: give the checkpoint that the components were trained from.")

    def sources(self, components: Mapping[str, Path]) -> dict[str, Path]:
        """All checkpoints that are read: the components, then the base. Raises ConfigError if a component is called "base"."""
        if self.base is None:
            return dict(components)
        if BASE in components:
            raise ConfigError(f"a component is called {BASE!r}, which is the base's name. Rename the component.")
        return {**components, BASE: Path(self.base)}

    def coefficients(self, weights_MK: np.ndarray) -> np.ndarray:
        """[M, K] the sum's coefficients, or [M, K + 1] with the base's last."""
        if self.base is None:
            return weights_MK
        rest = np.array([1 - self.scale * math.fsum(row) for row in weights_MK])
        rest[np.abs(rest) < _ROUNDING] = 0
        return np.hstack([self.scale * weights_MK, rest[:, np.newaxis]])

    def describe(self) -> dict[str, Any]:
        """For the provenance of a merge."""
        return {"name": "linear"} if self.base is None else {"name": "linear", "base": BASE, "scale": self.scale}
