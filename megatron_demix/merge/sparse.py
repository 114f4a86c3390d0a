"""TIES, DARE, DELLA and breadcrumbs: sums of the components' deltas from the base of which parts are dropped.

theta = base + scale * sum_k w_k * thin(theta_k - base). The methods differ in what they keep of a delta, and in whether terms
that disagree with the sign of the sum are left out. A decision belongs to one element of one logical tensor of one component:
it does not depend on the mixture, on how checkpoints are cut, or on threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal

import numpy as np

from megatron_demix.errors import ConfigError
from megatron_demix.merge.components import Components
from megatron_demix.merge.logical_tensors import UNKNOWN, FusedLayout, Partition
from megatron_demix.merge.methods import BASE, BoundMethod, Method, Recipe, check_scale, fused_layout
from megatron_demix.merge.plan import BytePlan
from megatron_demix.native import DeltaRules
from megatron_demix.study.choices import EPSILON, MERGE_OPTIONS

Keep = Literal["largest", "middle", "random", "row_rank"]

_ANY = 0xFFFFFFFF  # above every magnitude's bits


@dataclass(frozen=True)
class Thinning:
    """keep: the largest magnitudes of a tensor; those left when the gamma largest are dropped, too; any, at random; at random
    with a probability that grows with the rank in the row. elect: leave out terms against the sign of the sum. average:
    divide by the weights of those left, instead of adding up."""

    keep: Keep
    elect: bool = False
    average: bool = False


THINNINGS = {
    "ties": Thinning("largest", elect=True, average=True),
    "dare_linear": Thinning("random"),
    "dare_ties": Thinning("random", elect=True),
    "della": Thinning("row_rank", elect=True, average=True),
    "della_linear": Thinning("row_rank"),
    "breadcrumbs": Thinning("middle"),
    "breadcrumbs_ties": Thinning("middle", elect=True),
}


@dataclass(frozen=True)
class Sparse(Method):
    """One of THINNINGS. density: the share of a delta that stays, in (0, 1]. gamma: the share of largest magnitudes that
    breadcrumbs drops as outliers. epsilon: how far DELLA's probabilities reach from density. seed: of the random drops.
    scale: of the sum.

    layout: what is known of fused projections beside what the components' saved arguments say (DARE does not need it).
    """

    name: str = "ties"
    density: float = 1.0
    gamma: float = 0.01
    epsilon: float = EPSILON
    seed: int = 0
    scale: float = 1.0
    layout: FusedLayout = UNKNOWN

    def __post_init__(self) -> None:
        if self.name not in THINNINGS:
            raise ConfigError(f"method {self.name!r} is not one of {', '.join(THINNINGS)}.")
        if self.base is None:
            raise ConfigError(f"{self.name} needs a base: give the checkpoint that the components were trained from.")
        if not 0 < self.density <= 1:
            raise ConfigError(f"density is {self.density}, expected a share in (0, 1].")
        check_scale(self.scale)
        options = MERGE_OPTIONS[self.name]
        if "gamma" in options and not 0 <= self.gamma < 1:
            raise ConfigError(f"gamma is {self.gamma}, expected a share in [0, 1).")
        if "epsilon" in options and self.density < 1 and not 0 <= self.epsilon < min(self.density, 1 - self.density):
            raise ConfigError(
                f"epsilon is {self.epsilon}: density {self.density} - epsilon and + epsilon must lie in (0, 1), so it must "
                f"be below {min(self.density, 1 - self.density):g}."
            )

    @property
    def thinning(self) -> Thinning:
        return THINNINGS[self.name]

    def bind(self, components: Components) -> BoundMethod:
        return _BoundSparse(self, components)

    def describe(self, mixture: str | None = None) -> dict[str, Any]:
        return {"name": self.name, "base": BASE} | {option: getattr(self, option) for option in MERGE_OPTIONS[self.name]}


class _BoundSparse(BoundMethod):
    method: Sparse
    partition: Partition

    def __init__(self, method: Sparse, components: Components) -> None:
        super().__init__(method)
        self._components = components
        # A random drop is the same whatever tensor its element is said to belong to, so DARE can do without the layout.
        self._layout = None if method.thinning.keep == "random" else fused_layout(components, method.layout)
        self.partition = Partition(components.tensors, self._layout)
        self._rules: DeltaRules | None = None

    def describe(self, mixture: str | None = None) -> dict[str, Any]:
        return super().describe(mixture) | ({"fused": self._layout.describe()} if self._layout else {})

    def prepare(self, plan: BytePlan, threads: int | None) -> None:
        method, thinning = self.method, self.method.thinning
        num_components = len(self._components.names) - 1
        shared: dict[str, Any] = {"elect": thinning.elect, "average": thinning.average, "scale": method.scale}
        if method.density == 1 or thinning.keep in ("largest", "middle"):
            windows_SK2 = np.zeros((self.partition.num_parts, num_components, 2), np.int64)
            windows_SK2[:, :, 1] = _ANY
            if method.density < 1:
                self._set_windows(windows_SK2, sorted(plan.parts), threads)
            self._rules = DeltaRules("window", windows_SK2=windows_SK2, **shared)
            return
        streams_SK = np.zeros((self.partition.num_parts, num_components), np.uint64)
        numbers = sorted(plan.parts)
        for number, part in zip(numbers, self.partition.parts(numbers), strict=True):
            streams_SK[number] = [random_stream(method.seed, part.name, k) for k in range(num_components)]
        if thinning.keep == "random":
            self._rules = DeltaRules("random", density=method.density, streams_SK=streams_SK, **shared)
            return
        tensors, target_S = BytePlan(self._components), np.full(self.partition.num_parts, -1)
        for number, part in zip(numbers, self.partition.parts(numbers), strict=True):
            target_S[number] = tensors.add_part(part)
        self._rules = DeltaRules(
            "row_rank",
            density=method.density,
            epsilon=method.epsilon,
            streams_SK=streams_SK,
            tensors=tensors.native,
            target_S=target_S.tolist(),
            **shared,
        )

    def _set_windows(self, windows_SK2: np.ndarray, numbers: list[int], threads: int | None) -> None:
        tensors = BytePlan(self._components)
        kept, ranks = [], []
        for number, part in zip(numbers, self.partition.parts(numbers), strict=True):
            lowest, highest = kept_ranks(self.method, math.prod(part.shape))
            if lowest > highest:
                windows_SK2[number] = [1, 0]  # nothing stays
                continue
            kept.append(number)
            ranks.append([lowest, highest])
            tensors.add_part(part)
        if kept:
            windows_SK2[kept] = tensors.native.delta_magnitudes(np.array(ranks), threads=threads)
        if self.method.thinning.keep == "largest":
            windows_SK2[kept, :, 1] = _ANY

    def recipe(self, weights_MK: np.ndarray, mixtures: Sequence[str]) -> Recipe:
        assert self._rules is not None, "prepare() comes first"
        read_base = np.ones((len(weights_MK), 1))
        weights = np.hstack([weights_MK, read_base])
        return Recipe(np.broadcast_to(weights, (self.partition.num_parts, *weights.shape)), self._rules)


def kept_ranks(method: Sparse, num_elements: int) -> tuple[int, int]:
    """The first and last rank, in ascending order of magnitude, that stay of a tensor; equal magnitudes stay together.

    largest: max(1, int(density * n)) of n. middle: int(density * n) below the int(gamma * n) largest, fewer of which are
    dropped where there are not enough elements. As in mergekit.
    """
    wanted = int(method.density * num_elements)
    if method.thinning.keep == "largest":
        return num_elements - max(1, wanted), num_elements - 1
    lowest = max(0, num_elements - wanted - int(method.gamma * num_elements))
    return lowest, lowest + wanted - 1


def random_stream(seed: int, name: str, component: int) -> int:
    """The 64-bit stream of random bits for one component's elements of a logical tensor. component: its place among them."""
    return int.from_bytes(blake2b(f"{seed}\0{name}\0{component}".encode(), digest_size=8).digest(), "little")
