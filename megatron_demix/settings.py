"""Where two trees of settings differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple


class Difference(NamedTuple):
    """place: dotted, with the numbers of items in lists. then, now: the values, None where there is none."""

    place: str
    then: Any
    now: Any


def differences(
    then: Any, now: Any, place: str = "", *, as_one: Callable[[Mapping, Mapping], bool] = lambda then, now: False
) -> Iterator[Difference]:
    """Between two trees of mappings and lists, leaf by leaf. Lists of unequal lengths differ as one, as do mappings that as_one
    says so of."""
    inner = f"{place}." if place else ""
    if isinstance(then, Mapping) and isinstance(now, Mapping) and not as_one(then, now):
        for key in {**then, **now}:
            yield from differences(then.get(key), now.get(key), f"{inner}{key}", as_one=as_one)
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        for number, pair in enumerate(zip(then, now, strict=True)):
            yield from differences(*pair, f"{inner}{number}", as_one=as_one)
    elif then != now:
        yield Difference(place, then, now)
