"""How many tokens each domain gives: the budget split by share, held against what the domains have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Literal

from megatron_demix.data.pool import Domain
from megatron_demix.errors import ConfigError, MixtureError
from megatron_demix.mixture import Mixture, apportion

OnShortfall = Literal["error", "cap", "redistribute"]


def quotas(
    domains: Mapping[str, Domain],
    mixture: Mixture,
    target_tokens: int,
    on_shortfall: OnShortfall,
    *,
    taken: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Tokens of each domain (zero weights left out), by largest remainder; they sum to the target unless "cap" cuts those of
    domains that have less, each on its own, so that the others' shares grow.

    taken: tokens that earlier stages of a curriculum have used up. Raises MixtureError with what would fit.
    """
    if target_tokens < 1:
        raise ConfigError(f"target is {target_tokens} tokens, expected at least 1.")
    if on_shortfall not in ("error", "cap", "redistribute"):
        raise ConfigError(f"on_shortfall is {on_shortfall!r}, expected error, cap or redistribute.")
    shares = mixture.over(list(domains))
    names = [name for name in domains if shares[name] > 0]
    limits = _limits(domains, names, taken)
    wanted = dict(zip(names, apportion(target_tokens, [shares[n] for n in names]), strict=True))
    short = [name for name in names if wanted[name] > limits[name]]
    if not short:
        return wanted
    if on_shortfall == "cap":
        return {name: min(wanted[name], limits[name]) for name in names}
    if on_shortfall == "redistribute" and sum(limits.values()) >= target_tokens:
        return _spread(shares, limits, target_tokens)
    raise MixtureError(_explain(domains, shares, limits, wanted, short, target_tokens, fitting_target(domains, mixture, taken)))


def fitting_target(domains: Mapping[str, Domain], mixture: Mixture, taken: Mapping[str, int] | None = None) -> int:
    """The largest target of which the domains can give their shares."""
    shares = mixture.over(list(domains))
    limits = _limits(domains, [name for name in domains if shares[name] > 0], taken)
    # A share as it is written: 0.1 as a binary number is a little more, and 100 tokens would fit 999.
    return min(int(limit / Fraction(str(shares[name]))) for name, limit in limits.items())


def _limits(domains: Mapping[str, Domain], names: Iterable[str], taken: Mapping[str, int] | None) -> dict[str, int]:
    return {name: max(0, domains[name].most_tokens - (taken or {}).get(name, 0)) for name in names}


def _spread(shares: Mixture, limits: Mapping[str, int], total: int) -> dict[str, int]:
    """The mixture nearest in relative entropy within the limits: short domains at their limit, the rest in proportion."""
    given: dict[str, int] = {}
    open_names = list(limits)
    while open_names:
        rest = total - sum(given.values())
        parts = dict(zip(open_names, apportion(rest, [shares[n] for n in open_names]), strict=True))
        over = [n for n in open_names if parts[n] > limits[n]]
        if not over:
            given |= parts
            break
        given |= {n: limits[n] for n in over}
        open_names = [n for n in open_names if n not in over]
    return {name: given[name] for name in limits}


def _explain(
    domains: Mapping[str, Domain],
    shares: Mixture,
    limits: Mapping[str, int],
    wanted: Mapping[str, int],
    short: list[str],
    target: int,
    fits: int,
) -> str:
    lines = []
    for name in short:
        d = domains[name]
        left = "" if limits[name] == d.most_tokens else f", {limits[name]:,} left after the earlier stages"
        lines.append(
            f"domain {name!r} has {d.tokens:,} tokens x {d.max_epochs:g} epochs = {d.most_tokens:,} tokens{left}, but a share "
            f"of {shares[name]:.4g} of {target:,} tokens is {wanted[name]:,}: {wanted[name] - limits[name]:,} short."
        )
    lines.append(f"What would fit: a target of at most {fits:,} tokens at this mixture;")
    if sum(limits.values()) >= target:
        nearest = _spread(shares, limits, target)
        lines.append(f"or, at this target, the mixture {', '.join(f'{n}={t / target:.4g}' for n, t in nearest.items())}")
        lines.append("(on_shortfall=redistribute builds it);")
    else:
        lines.append(f"at this target nothing does: all its domains together allow {sum(limits.values()):,} tokens;")
    epochs = ", ".join(f"{n} to {(wanted[n] + domains[n].most_tokens - limits[n]) / domains[n].tokens:.4g}" for n in short)
    lines.append(f"or max_epochs raised for {epochs}.")
    return " ".join(lines)
