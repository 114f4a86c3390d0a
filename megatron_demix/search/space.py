"""The feasible mixtures: bounds on the data a mixture stands for, and the way from any weights to the nearest feasible ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from megatron_demix.errors import MixtureError
from megatron_demix.mixture import Mixture, check_anchor_share, tokens_of_epochs
from megatron_demix.search.waterfill import GRID, ceil_to_grid, floor_to_grid, waterfill

TOLERANCE = 1e-9


@dataclass(frozen=True)
class Group:
    """Bounds on the summed actual shares of some domains (all code, say). A domain belongs to one group at most."""

    domains: tuple[str, ...]
    lowest: float = 0.0
    highest: float = 1.0


def epoch_caps(tokens: Mapping[str, float], max_epochs: Mapping[str, float], target_tokens: float) -> dict[str, float]:
    """The largest actual share of each domain: max_epochs x available tokens / final budget, at most 1.

    In whole tokens, as the blend counts that is built of it. A domain absent from max_epochs has no cap. Raises MixtureError on
    a budget or a size that is not positive.
    """
    if target_tokens <= 0:
        raise MixtureError(f"target tokens are {target_tokens}, expected > 0: the final run's budget.")
    for name, count in tokens.items():
        if count <= 0:
            raise MixtureError(f"domain {name!r} has {count} tokens, expected > 0. Drop it, or prepare its data.")
    caps = dict.fromkeys(tokens, 1.0)
    return caps | {name: min(1.0, tokens_of_epochs(tokens[name], most) / target_tokens) for name, most in max_epochs.items()}


def _root(grows: Callable[[float], float]) -> float:
    """Where a function that grows passes 0, or the end of [-40, 40] where it does not: logarithms of scales."""
    low, high = -40.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if grows(middle) < 0 else (low, middle)
    return high


@dataclass(frozen=True)
class SearchSpace:
    """The mixtures a search may propose.

    natural: shares of the data at hand; its order is the order of the columns D everywhere. anchor, anchor_share: what every
    component was trained on beside its own domain. All bounds are on *actual* shares, s = b * anchor + (1 - b) * weights:
    what the data allow (epoch_caps, from the function of that name), what is asked for (max_shares, min_shares, groups), and
    max_kl, a leash KL(s || natural) in nats. A domain with min_shares == max_shares is fixed. Domains without a bound are free.
    Raises MixtureError, naming the constraint and by how much it fails, when nothing is feasible.
    """

    natural: Mixture
    anchor: Mixture
    anchor_share: float
    max_shares: Mapping[str, float] = field(default_factory=dict)
    min_shares: Mapping[str, float] = field(default_factory=dict)
    groups: Mapping[str, Group] = field(default_factory=dict)
    max_kl: float | None = None
    epoch_caps: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_anchor_share(self.anchor_share)
        object.__setattr__(self, "anchor", self.anchor.over(self.domains))
        self._check_names()
        self._check_domains()
        self._check_sums()
        if self.max_kl is not None and (closest := float(self.kl(self.centre_D[None])[0])) > self.max_kl + TOLERANCE:
            raise MixtureError(
                f"max_kl: no feasible mixture lies within {self.max_kl:g} nats of the natural shares; the closest is at "
                f"{closest:.4g} ({self.mixture(self.centre_D, actual=True)}). Set max_kl above that, or "
                "loosen the other bounds."
            )

    @cached_property
    def domains(self) -> tuple[str, ...]:
        return tuple(self.natural)

    @cached_property
    def floor_D(self) -> np.ndarray:
        """The share the anchor alone gives each domain."""
        return self.anchor_share * np.array([self.anchor[name] for name in self.domains])

    @cached_property
    def bounds_D2(self) -> np.ndarray:
        """Lowest and highest actual share of each domain, the anchor's part included."""
        low = [max(self.min_shares.get(name, 0.0), self.floor_D[d]) for d, name in enumerate(self.domains)]
        reach = 1 - self.anchor_share
        high = [
            min(self.max_shares.get(name, 1.0), self.epoch_caps.get(name, 1.0), self.floor_D[d] + reach)
            for d, name in enumerate(self.domains)
        ]
        return np.stack([np.array(low), np.array(high)], axis=1)

    @cached_property
    def blocks(self) -> list[tuple[np.ndarray, float, float]]:
        """The groups, and every other domain as a group of one: (columns, lowest, highest actual share)."""
        blocks = [
            (np.array([self.domains.index(name) for name in group.domains]), group.lowest, group.highest)
            for group in self.groups.values()
        ]
        grouped = {d for columns, _, _ in blocks for d in columns}
        return blocks + [(np.array([d]), 0.0, 1.0) for d in range(len(self.domains)) if d not in grouped]

    @cached_property
    def ranges_D2(self) -> np.ndarray:
        """Lowest and highest actual share that each domain can have, all other bounds but max_kl kept."""
        lows_D, highs_D = self.bounds_D2.T
        lows_G, highs_G = np.array(
            [
                (max(lowest, lows_D[columns].sum()), min(highest, highs_D[columns].sum()))
                for columns, lowest, highest in self.blocks
            ]
        ).T
        ranges_D2 = np.empty_like(self.bounds_D2)
        for (columns, _, _), low, high in zip(self.blocks, lows_G, highs_G, strict=True):
            low, high = max(low, 1 - (highs_G.sum() - high)), min(high, 1 - (lows_G.sum() - low))
            ranges_D2[columns, 0] = np.maximum(lows_D[columns], low - (highs_D[columns].sum() - highs_D[columns]))
            ranges_D2[columns, 1] = np.minimum(highs_D[columns], high - (lows_D[columns].sum() - lows_D[columns]))
        return ranges_D2

    @cached_property
    def grid_bounds(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Bounds on merge weights as grid counts: lows_D, highs_D of domains, lows_G, highs_G of blocks.

        Rounded inwards, so that no cap is passed; outwards where the bounds leave no more than a point to choose from.
        """
        grid = self._grid_rounded(inwards=True)
        lows_D, highs_D, lows_G, highs_G = grid
        roomy = (lows_D <= highs_D).all() and (lows_G <= highs_G).all() and lows_G.sum() <= GRID <= highs_G.sum()
        return grid if roomy else self._grid_rounded(inwards=False)

    def _grid_rounded(self, *, inwards: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        round_low, round_high = (ceil_to_grid, floor_to_grid) if inwards else (floor_to_grid, ceil_to_grid)
        lows_D, highs_D = (self._weights_of_shares(self.bounds_D2[:, i]) for i in (0, 1))
        lows_D, highs_D = round_low(lows_D), round_high(highs_D)
        lows, highs = [], []
        for columns, lowest, highest in self.blocks:
            low, high = (np.clip((x - self.floor_D[columns].sum()) / (1 - self.anchor_share), 0, 1) for x in (lowest, highest))
            lows.append(max(int(round_low(low)), int(lows_D[columns].sum())))
            highs.append(min(int(round_high(high)), int(highs_D[columns].sum())))
        return lows_D, highs_D, np.array(lows), np.array(highs)

    @cached_property
    def centre_D(self) -> np.ndarray:
        """Merge weights of the feasible mixture whose shares are closest to the natural ones, in KL."""
        return self._fill(self._weights_of_shares(self._nearest_shares())[None])[0]

    def _weights_of_shares(self, shares_D: np.ndarray) -> np.ndarray:
        return np.clip((shares_D - self.floor_D) / (1 - self.anchor_share), 0.0, 1.0)

    def _nearest_shares(self) -> np.ndarray:
        lows_D, highs_D = floor_to_grid(self.bounds_D2[:, 0]), ceil_to_grid(self.bounds_D2[:, 1])
        natural_D = np.array([self.natural[name] for name in self.domains])
        shares_D = waterfill(natural_D[None], lows_D, highs_D, np.array([GRID]))[0] / GRID
        sums_G = np.array([shares_D[columns].sum() for columns, _, _ in self.blocks])
        lows_G, highs_G = (np.array(bounds) for bounds in zip(*(block[1:] for block in self.blocks), strict=True))
        if (sums_G >= lows_G - TOLERANCE).all() and (sums_G <= highs_G + TOLERANCE).all():
            return shares_D
        return self._nearest_shares_in_groups(lows_G, highs_G)

    def _nearest_shares_in_groups(self, lows_G: np.ndarray, highs_G: np.ndarray) -> np.ndarray:
        """One scale of the natural shares serves all domains but those at a bound and those of a group at its bound, which have
        a scale of their own. Sums grow with the scales, so bisection finds each."""
        natural_D = np.maximum([self.natural[name] for name in self.domains], 1e-12)

        def filled(columns: np.ndarray, log_scale: float) -> np.ndarray:
            return np.clip(np.exp(log_scale) * natural_D[columns], *self.bounds_D2[columns].T)

        def scaled_to(columns: np.ndarray, total: float) -> np.ndarray:
            return filled(columns, _root(lambda x: float(filled(columns, x).sum() - total)))

        def totals_G(log_scale: float) -> np.ndarray:
            return np.clip([filled(columns, log_scale).sum() for columns, _, _ in self.blocks], lows_G, highs_G)

        shares_D = np.empty(len(self.domains))
        for (columns, _, _), total in zip(self.blocks, totals_G(_root(lambda x: totals_G(x).sum() - 1)), strict=True):
            shares_D[columns] = scaled_to(columns, total)
        return shares_D

    def shares(self, weights_MD: np.ndarray) -> np.ndarray:
        """Actual data shares of merge weights: shares_MD = b * anchor + (1 - b) * weights_MD."""
        return self.floor_D + (1 - self.anchor_share) * np.asarray(weights_MD, np.float64)

    def kl(self, weights_MD: np.ndarray) -> np.ndarray:
        """KL(actual shares || natural shares) of each row, in nats."""
        shares_MD = self.shares(weights_MD)
        natural_D = np.maximum([self.natural[name] for name in self.domains], 1e-12)
        return np.where(shares_MD > 0, shares_MD * np.log(np.maximum(shares_MD, 1e-300) / natural_D), 0.0).sum(axis=1)

    def nearest(self, amounts_MD: np.ndarray) -> np.ndarray:
        """Feasible merge weights_MD close to `amounts_MD` (finite, >= 0, any scale): bounded entries are set to their bound and
        what they lack or lose is spread over the others in proportion; a row beyond the leash is pulled towards the centre.

        Rows sum to exactly 1 in float64, whatever the order of summation. Rows that are feasible already stay as they are.
        """
        weights_MD = self._fill(np.asarray(amounts_MD, np.float64))
        if self.max_kl is None:
            return weights_MD
        far_M = self.kl(weights_MD) > self.max_kl
        if far_M.any():
            weights_MD[far_M] = self._pull_in(weights_MD[far_M])
        return weights_MD

    def _fill(self, amounts_MD: np.ndarray) -> np.ndarray:
        lows_D, highs_D, lows_G, highs_G = self.grid_bounds
        sums_MG = np.stack([amounts_MD[:, columns].sum(axis=1) for columns, _, _ in self.blocks], axis=1)
        counts_MG = waterfill(sums_MG, lows_G, highs_G, np.full(len(amounts_MD), GRID))
        counts_MD = np.empty(amounts_MD.shape, np.int64)
        for g, (columns, _, _) in enumerate(self.blocks):
            if len(columns) == 1:
                counts_MD[:, columns[0]] = counts_MG[:, g]
            else:
                counts_MD[:, columns] = waterfill(amounts_MD[:, columns], lows_D[columns], highs_D[columns], counts_MG[:, g])
        return counts_MD / GRID

    def _pull_in(self, weights_MD: np.ndarray) -> np.ndarray:
        """The last feasible point on the way from the centre to each row. KL is convex, so bisection finds it."""
        low_M, high_M = np.zeros(len(weights_MD)), np.ones(len(weights_MD))
        for _ in range(40):
            middle_M = (low_M + high_M) / 2
            inside_M = self.kl(self.centre_D + middle_M[:, None] * (weights_MD - self.centre_D)) <= self.max_kl
            low_M, high_M = np.where(inside_M, middle_M, low_M), np.where(inside_M, high_M, middle_M)
        return self._fill(self.centre_D + low_M[:, None] * (weights_MD - self.centre_D))

    def mixture(self, weights_D: np.ndarray, *, actual: bool = False) -> Mixture:
        """One row of merge weights as a Mixture, or the actual shares it stands for."""
        row_D = self.shares(weights_D) if actual else weights_D
        return Mixture(dict(zip(self.domains, map(float, row_D), strict=True)))

    def _check_names(self) -> None:
        bounds = {"max_shares": self.max_shares, "min_shares": self.min_shares, "epoch_caps": self.epoch_caps}
        for what, names in bounds.items():
            for name, share in names.items():
                self._check_name(what, name)
                if not 0 <= share <= 1:
                    raise MixtureError(f"{what} of domain {name!r} is {share}, expected a share between 0 and 1.")
        owner: dict[str, str] = {}
        for label, group in self.groups.items():
            if not 0 <= group.lowest <= group.highest <= 1:
                raise MixtureError(
                    f"group {label!r} has bounds {group.lowest} to {group.highest}, expected 0 <= lowest <= highest <= 1."
                )
            for name in group.domains:
                self._check_name(f"group {label!r}", name)
                if name in owner:
                    raise MixtureError(f"domain {name!r} is in the groups {owner[name]!r} and {label!r}; one group at most.")
                owner[name] = label

    def _check_name(self, what: str, name: str) -> None:
        if name not in self.natural:
            raise MixtureError(f"{what}: unknown domain {name!r}; the domains are {', '.join(self.domains)}.")

    def _check_domains(self) -> None:
        for d, name in enumerate(self.domains):
            low, high = self.bounds_D2[d]
            if low <= high + TOLERANCE:
                continue
            limit, advice = self._upper_limit(d)
            if self.floor_D[d] > high + TOLERANCE:
                raise MixtureError(
                    f"domain {name!r}: {limit} {high:.4g}, but the anchor alone gives it {self.floor_D[d]:.4g} (anchor share "
                    f"{self.anchor_share:g} x {self.anchor[name]:g}): {self.floor_D[d] - high:.4g} too much. {advice}, or "
                    "lower its part in the anchor."
                )
            raise MixtureError(
                f"domain {name!r}: min_share asks for {low:.4g}, but {limit} {high:.4g}: {low - high:.4g} short. "
                f"Lower min_share, or {advice[0].lower()}{advice[1:]}."
            )

    def _upper_limit(self, d: int) -> tuple[str, str]:
        """What keeps domain d from a larger share, and what to do about it."""
        name, high = self.domains[d], self.bounds_D2[d, 1]
        if self.epoch_caps.get(name, 1.0) <= high < 1:
            more = "Allow it more epochs, prepare more of its data, train fewer final tokens"
            return "max_epochs x its tokens / the final budget allow a share of", more
        if self.max_shares.get(name, 1.0) <= high < 1:
            return "max_share allows", "Raise max_share"
        return "the components reach", "Lower the anchor's share"

    def _check_sums(self) -> None:
        _, _, lows_G, highs_G = self.grid_bounds
        for (columns, lowest, highest), label in zip(self.blocks, self.groups, strict=False):
            low, high = self.bounds_D2[columns].sum(axis=0)
            if low > highest + TOLERANCE:
                raise MixtureError(
                    f"group {label!r} may have at most {highest:.4g}, but its domains' minimums and the anchor already give "
                    f"{low:.4g}: {low - highest:.4g} too much. Raise the group's bound, or lower its domains'."
                )
            reached = self.floor_D[columns].sum() + 1 - self.anchor_share
            if reached < lowest - TOLERANCE:
                raise MixtureError(
                    f"group {label!r} must have at least {lowest:.4g}, but the components reach {reached:.4g} (anchor share "
                    f"{self.anchor_share:g}): {lowest - reached:.4g} short. Lower the group's bound, or the anchor's share."
                )
            if high < lowest - TOLERANCE:
                raise MixtureError(
                    f"group {label!r} must have at least {lowest:.4g}, but its domains' maximums sum to {high:.4g}: "
                    f"{lowest - high:.4g} short. Lower the group's bound, or raise its domains'."
                )
        low, high = (self.anchor_share + (1 - self.anchor_share) * int(counts_G.sum()) / GRID for counts_G in (lows_G, highs_G))
        if highs_G.sum() < GRID:
            tightest = min(
                range(len(self.domains)), key=lambda d: self.bounds_D2[d, 1] / max(self.natural[self.domains[d]], 1e-12)
            )
            listed = ", ".join(f"{name} {share:.4g}" for name, share in zip(self.domains, self.bounds_D2[:, 1], strict=True))
            raise MixtureError(
                f"the largest allowed shares sum to {high:.4g}, expected at least 1: {1 - high:.4g} short ({listed}). Tightest "
                f"for its size: {self.domains[tightest]!r}. {self._upper_limit(tightest)[1]}."
            )
        if lows_G.sum() > GRID:
            raise MixtureError(
                f"the smallest allowed shares sum to {low:.4g}, expected at most 1: {low - 1:.4g} too much. Lower min_share "
                "or the groups' lowest shares."
            )
