"""Multi-SLERP and the Karcher mean: averages on the sphere, of each logical tensor.

Both lie in the span of their inputs, so a tensor's K x K inner products say everything: they give coefficients, and the merge
is the weighted sum it always is. The products are computed once and serve every mixture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from megatron_demix.errors import ConfigError, CorruptInput, MixtureError
from megatron_demix.merge.components import Components
from megatron_demix.merge.logical_tensors import UNKNOWN, FusedLayout, Partition
from megatron_demix.merge.methods import BASE, BoundMethod, Method, Recipe, fused_layout, with_base
from megatron_demix.merge.plan import BytePlan

_EPSILON = 1e-8  # of multi-SLERP, as in mergekit: added to norms, and the norm of a mean that is no direction
_TOLERANCE = 1e-10  # radians: the Karcher mean's last step
_MOST_STEPS = 200
_LINE = 1e-14  # how far from 1 the cosine of one line's vectors may be, by rounding


class NoMean(Exception):
    """The inputs cancel: there is no direction between them."""


@dataclass(frozen=True)
class Spherical(Method):
    """name: multislerp or karcher. With a base, the components' deltas from it are averaged instead of the components.

    layout: what is known of fused projections beside what the components' saved arguments say.
    """

    name: Literal["multislerp", "karcher"] = "multislerp"
    layout: FusedLayout = UNKNOWN

    def __post_init__(self) -> None:
        if self.name not in COEFFICIENTS:
            raise ConfigError(f"method {self.name!r} is not one of {', '.join(COEFFICIENTS)}.")

    def bind(self, components: Components) -> BoundMethod:
        return _BoundSpherical(self, components)

    def describe(self, mixture: str | None = None) -> dict[str, Any]:
        return {"name": self.name} if self.base is None else {"name": self.name, "base": BASE}


class _BoundSpherical(BoundMethod):
    method: Spherical
    partition: Partition

    def __init__(self, method: Spherical, components: Components) -> None:
        super().__init__(method)
        self._components = components
        self._layout = fused_layout(components, method.layout)
        self.partition = Partition(components.tensors, self._layout)
        self._gram: dict[int, np.ndarray] = {}

    def describe(self, mixture: str | None = None) -> dict[str, Any]:
        return super().describe(mixture) | {"fused": self._layout.describe()}

    def prepare(self, plan: BytePlan, threads: int | None) -> None:
        tensors = BytePlan(self._components)
        numbers = sorted(plan.parts)
        for part in self.partition.parts(numbers):
            tensors.add_part(part)
        gram_TJJ = tensors.native.gram(from_base=self.method.base is not None, threads=threads)
        for part, products_KK in zip(self.partition.parts(numbers), gram_TJJ, strict=True):
            bad = np.flatnonzero(~np.isfinite(products_KK.diagonal()))
            if bad.size:
                raise CorruptInput(
                    f"component {self._components.names[bad[0]]!r}: {part.name!r} holds NaN or infinity, so it has no "
                    "direction. Only the linear method merges it."
                )
        self._gram = dict(zip(numbers, gram_TJJ, strict=True))

    def recipe(self, weights_MK: np.ndarray, mixtures: Sequence[str]) -> Recipe:
        coefficients = COEFFICIENTS[self.method.name]
        has_base = self.method.base is not None
        result = np.zeros((self.partition.num_parts, len(weights_MK), weights_MK.shape[1] + has_base))
        for number, products_KK in self._gram.items():
            try:
                rows = np.stack([coefficients(weights_K, products_KK) for weights_K in weights_MK])
            except NoMean as e:
                (part,) = self.partition.parts([number])
                raise MixtureError(f"{self.method.name} of {part.name!r}: {e}. Use the linear method.") from e
            result[number] = with_base(rows) if has_base else rows
        return Recipe(result)


def multislerp(weights_K: np.ndarray, products_KK: np.ndarray) -> np.ndarray:
    """[K] coefficients a with sum_k a_k x_k the multi-SLERP of x_1..x_K (mergekit's, with its epsilon of 1e-8).

    products_KK: inner products of the x. mergekit steps from the normalised weighted mean of the unit vectors by the weighted
    mean of their projections onto its tangent space. Those projections cancel exactly, so the step is 0 and the result is that
    mean direction with the weighted mean of the norms for its length. Where the unit vectors cancel on one line, the sum is
    linear; raises NoMean where they cancel otherwise.
    """
    used = weights_K != 0
    norms_K = np.sqrt(np.diagonal(products_KK))
    if used.sum() == 1 or not norms_K[used].any():
        return weights_K.astype(np.float64)
    # A zero vector adds nothing. A large coefficient for it would still be that of a component and, negated, of its base.
    unit_K = np.where(norms_K > 0, weights_K / (norms_K + _EPSILON), 0.0)
    length = math.sqrt(max(0.0, unit_K @ products_KK @ unit_K))
    if length < _EPSILON:
        if used.sum() == 2 or _on_one_line(products_KK[np.ix_(used, used)]):
            return weights_K.astype(np.float64)  # opposite vectors: the line between them, as in mergekit
        raise NoMean("the components, at these weights, cancel")
    return unit_K * (float(weights_K @ norms_K) / length)


def karcher(weights_K: np.ndarray, products_KK: np.ndarray) -> np.ndarray:
    """[K] coefficients a with sum_k a_k x_k the weighted Karcher mean: the direction whose summed tangents vanish, with the
    weighted mean of the norms for its length. Vectors of length 0 have no direction and only count for the length. On one line,
    as all tensors of one element are, no direction lies between two opposite ones: the sum is linear there, which is the same
    where none are opposite.

    Iterates to a step below 1e-10. Raises NoMean for negative weights, or where the vectors cancel or lie too far apart for it.
    """
    used = weights_K != 0
    if used.sum() <= 1:
        return weights_K.astype(np.float64)
    if (weights_K < 0).any():
        raise NoMean("a weight is negative")
    norms_K = np.sqrt(np.diagonal(products_KK))
    directed = used & (norms_K > 0)
    if not directed.any() or _on_one_line(products_KK[np.ix_(directed, directed)]):
        return weights_K.astype(np.float64)
    alphas = np.where(directed, weights_K, 0) / weights_K[directed].sum()
    inverse_K = np.divide(1.0, norms_K, out=np.zeros_like(norms_K), where=norms_K > 0)
    cosines_KK = products_KK * np.outer(inverse_K, inverse_K)
    mean_K = _unit(alphas, cosines_KK)  # coefficients over unit vectors
    for _ in range(_MOST_STEPS):
        dots_K = np.clip(cosines_KK @ mean_K, -1.0, 1.0)
        # The angle from the part of a unit vector that is orthogonal to the mean: arccos has no digits left near 1.
        apart_K = np.sqrt(
            np.maximum(0.0, np.diagonal(cosines_KK) - 2 * dots_K * dots_K + dots_K**2 * (mean_K @ cosines_KK @ mean_K))
        )
        angles_K = np.arctan2(apart_K, dots_K)
        if (angles_K[directed] > math.pi - 1e-6).any():
            raise NoMean("a component points away from the mean")
        stretch_K = alphas * np.divide(angles_K, apart_K, out=np.ones_like(angles_K), where=apart_K > 1e-12)
        tangent_K = stretch_K - (stretch_K @ dots_K) * mean_K
        step = math.sqrt(max(0.0, tangent_K @ cosines_KK @ tangent_K))
        if step < _TOLERANCE:
            return mean_K * inverse_K * float(weights_K @ norms_K)
        mean_K = _unit(math.cos(step) * mean_K + math.sin(step) / step * tangent_K, cosines_KK)
    raise NoMean(f"its iteration did not come to rest in {_MOST_STEPS} steps")


def _on_one_line(products_JJ: np.ndarray) -> bool:
    """Whether vectors, none of them of length 0, have one direction or its opposite, but for rounding."""
    norms_J = np.sqrt(np.diagonal(products_JJ))
    return bool((np.abs(products_JJ) >= (1 - _LINE) * np.outer(norms_J, norms_J)).all())


def _unit(coefficients_K: np.ndarray, cosines_KK: np.ndarray) -> np.ndarray:
    length = math.sqrt(max(0.0, coefficients_K @ cosines_KK @ coefficients_K))
    if length < _EPSILON:
        raise NoMean("the components, at these weights, cancel")
    return coefficients_K / length


COEFFICIENTS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {"multislerp": multislerp, "karcher": karcher}
