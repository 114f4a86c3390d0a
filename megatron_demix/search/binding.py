"""Which bounds hold a mixture back: those it lies at, and which setting each comes from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_demix.mixture import Mixture
from megatron_demix.search.space import SearchSpace

NEAR = 0.005
"""A share closer to its bound than this lies at it: a chosen mixture is a mean of many, most of them on the bound."""


@dataclass(frozen=True)
class Binding:
    """A bound that a mixture lies at. of: the domain or group ("" for max_kl); limit and value: actual shares, or nats.

    constraint "anchor": the components themselves allow no less (their part of the anchor) or no more of the domain.
    """

    constraint: Literal["max_epochs", "max_share", "min_share", "anchor", "group", "max_kl"]
    of: str
    side: Literal["at most", "at least"]
    limit: float
    value: float


def binding(space: SearchSpace, weights: Mixture) -> list[Binding]:
    """The bounds that the mixture of these merge weights lies at, in the order of the domains, then groups, then the leash.

    Bounds that could not be otherwise, a share of 0 or of 1, are none.
    """
    weights_D = np.array([weights[name] for name in space.domains])
    shares_D = space.shares(weights_D)
    found = [bound for d, name in enumerate(space.domains) for bound in _of_domain(space, d, name, float(shares_D[d]))]
    for label, group in space.groups.items():
        total = float(sum(shares_D[space.domains.index(name)] for name in group.domains))
        near = _near(group.lowest, group.highest)
        if group.highest < 1 and total > group.highest - near:
            found.append(Binding("group", label, "at most", group.highest, total))
        if group.lowest > 0 and total < group.lowest + near:
            found.append(Binding("group", label, "at least", group.lowest, total))
    if space.max_kl is not None and (distance := float(space.kl(weights_D[None])[0])) > 0.98 * space.max_kl:
        found.append(Binding("max_kl", "", "at most", space.max_kl, distance))
    return found


def _near(low: float, high: float) -> float:
    """Between bounds that are close together a share at one is not at the other, unless they are the same."""
    return min(NEAR, 0.05 * (high - low)) or NEAR


def _of_domain(space: SearchSpace, d: int, name: str, share: float) -> Iterator[Binding]:
    low, high = map(float, space.bounds_D2[d])
    near = _near(low, high)
    if high < 1 and share > high - near:
        if space.epoch_caps.get(name, 1.0) <= high:
            yield Binding("max_epochs", name, "at most", high, share)
        elif space.max_shares.get(name, 1.0) <= high:
            yield Binding("max_share", name, "at most", high, share)
        else:
            yield Binding("anchor", name, "at most", high, share)
    if low > 0 and share < low + near:
        yield Binding("min_share" if space.min_shares.get(name, 0.0) >= low else "anchor", name, "at least", low, share)
