"""Mixtures: weights by domain name on the simplex, and the exact arithmetic between weights, shares and token budgets.

Two kinds of numbers describe one proxy. Its *merge weights* a say how the components' parameters are averaged. Its
*actual shares* s say which data it stands for: every component was trained on b parts of the anchor mixture q and 1-b parts
of its own domain, so  s = b * q + (1 - b) * a.  Only actual shares may be used to build data. (DeMix, section 3.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from numbers import Real

from megatron_demix.errors import MixtureError

TOLERANCE = 1e-6
_LARGEST = 1e300
"""Weights up to this have a sum. No mixture has such a one."""


def tokens_of_epochs(tokens: float, max_epochs: float) -> int:
    """The most tokens that a blend takes of a domain."""
    # As it was written: 1.2 as a binary number is a little less, and 1,000 tokens would be 1,199.
    return math.floor(Fraction(tokens) * Fraction(str(max_epochs)))


class Mixture(Mapping[str, float]):
    """Weights by domain name: finite, non-negative, summing to 1 within TOLERANCE (then divided by their exact sum).

    Immutable, keeps the order of the domains. label: what errors call it. Raises MixtureError naming the offending domain.
    """

    __slots__ = ("_weights", "label")

    def __init__(self, weights: Mapping[str, float], *, label: str = "mixture") -> None:
        if not isinstance(weights, Mapping):
            raise MixtureError(f"{label}: weights are {weights!r}, expected a share for each domain by name.")
        if not weights:
            raise MixtureError(f"{label}: no domains. Give at least one domain with a weight.")
        for name, weight in weights.items():
            if not isinstance(weight, Real) or isinstance(weight, bool) or not 0 <= weight <= _LARGEST:
                raise MixtureError(f"{label}: weight of domain {name!r} is {weight!r:.80}, expected a finite number >= 0.")
        total = math.fsum(weights.values())
        if abs(total - 1) > TOLERANCE:
            listed = ", ".join(f"{n} {w:g}" for n, w in weights.items())
            raise MixtureError(
                f"{label}: weights sum to {total:.6g}, expected 1 (tolerance {TOLERANCE:g}): {listed}. "
                "Correct them, or add the domain that is absent; weights are never normalised silently."
            )
        self._weights = {name: float(weight) / total for name, weight in weights.items()}
        self.label = label

    @classmethod
    def proportional(cls, amounts: Mapping[str, float], *, label: str = "mixture") -> Mixture:
        """The mixture in proportion to non-negative amounts (the natural mixture, from sizes). Asked for, so not silent."""
        total = math.fsum(amounts.values())
        if not amounts or not math.isfinite(total) or total <= 0:
            raise MixtureError(f"{label}: amounts {dict(amounts)} have no positive finite sum.")
        return cls({name: amount / total for name, amount in amounts.items()}, label=label)

    @classmethod
    def uniform(cls, domains: Iterable[str]) -> Mixture:
        return cls.proportional(dict.fromkeys(domains, 1.0))

    @classmethod
    def one_hot(cls, domains: Iterable[str], chosen: str) -> Mixture:
        names = list(domains)
        if chosen not in names:
            raise MixtureError(f"domain {chosen!r} is not among {names}.")
        return cls({name: float(name == chosen) for name in names})

    def __getitem__(self, domain: str) -> float:
        return self._weights[domain]

    def __iter__(self):
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __hash__(self) -> int:
        return hash(frozenset(self._weights.items()))  # as equality: whatever the order

    def __repr__(self) -> str:
        return f"Mixture({self})"

    def __str__(self) -> str:
        return " ".join(f"{name}={weight:.4g}" for name, weight in self.items())

    def over(self, domains: Sequence[str]) -> Mixture:
        """The same mixture listed over exactly `domains`, absent ones at 0. Raises MixtureError on a name not in them."""
        unknown = [name for name in self if name not in domains]
        if unknown:
            raise MixtureError(f"{self.label}: unknown domain {unknown[0]!r}; the domains are {', '.join(domains)}.")
        return Mixture({name: self.get(name, 0.0) for name in domains}, label=self.label)


def actual_shares(merge_weights: Mixture, anchor: Mixture, anchor_share: float) -> Mixture:
    """The data a proxy stands for: b * q + (1 - b) * a. Domains are those of merge_weights; anchor must lie within them."""
    check_anchor_share(anchor_share)
    anchor = anchor.over(list(merge_weights))
    return Mixture({n: anchor_share * anchor[n] + (1 - anchor_share) * a for n, a in merge_weights.items()})


def check_anchor_share(anchor_share: float) -> None:
    if not 0 <= anchor_share < 1:
        raise MixtureError(f"anchor share is {anchor_share}, expected 0 <= share < 1.")


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Split `total` indivisible units by weight, exactly: the parts sum to `total`, each within 1 of its quota.

    Largest remainder (Hamilton) in exact rational arithmetic; ties go to the earlier entry. A zero weight gets zero.
    """
    if total < 0:
        raise MixtureError(f"cannot apportion {total} units, expected >= 0.")
    exact = [Fraction(w) for w in weights if math.isfinite(w)]
    if len(exact) < len(weights) or any(w < 0 for w in exact) or sum(exact) <= 0:
        raise MixtureError(f"cannot apportion by weights {list(weights)}: expected all finite and >= 0, and a positive sum.")
    whole = sum(exact)
    quotas = [w * total / whole for w in exact]
    parts = [int(q) for q in quotas]
    by_remainder = sorted(range(len(parts)), key=lambda i: (parts[i] - quotas[i], i))
    for i in by_remainder[: total - sum(parts)]:
        parts[i] += 1
    return parts
