"""What of a large study is shown: the domains and scores that matter most, and as many proxies as can be read. Whatever is left
out is said, and is in the table beside the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from megatron_demix.report.data import Fit, ReportData
from megatron_demix.report.drawing import COLOURED

MOST_DOMAINS = 12
"""In plots; all of them, if there are no more."""
MOST_SCORES = 24
"""Drawn in a panel of their own, of each kind; all of them, if there are no more."""
_WORST = 8
"""Of these, scores whose surrogates rank worst, beside those with the largest weights."""
MOST_POINTS = 1000
"""Proxies drawn in one panel: more only fill it."""
MOST_ROWS, _LATEST = 200, 50
"""Proxies in the page's table, and how many of these are the latest where not all are shown; the others are the best."""
_NAMED = 6
"""In a sentence."""

_T = TypeVar("_T")


def ordered_domains(data: ReportData) -> list[str]:
    """In the order of the study where all are drawn; else the largest in the found or the natural mixture first, so that
    whatever moved far is among the first."""
    if len(names := data.domain_names) <= MOST_DOMAINS:
        return names
    sizes = _sizes(data)
    return sorted(names, key=lambda name: -sizes[name])


def drawn_domains(data: ReportData) -> list[str]:
    return ordered_domains(data)[:MOST_DOMAINS]


def colour_indices(data: ReportData) -> dict[str, int | None]:
    """By domain, in their order: the index of its colour; None where it has none, since each colour is to mean one domain."""
    names = ordered_domains(data)
    return {name: i if len(names) <= MOST_DOMAINS or i < COLOURED else None for i, name in enumerate(names)}


def said_of_colours(data: ReportData) -> str:
    """Which domains have one of their own; empty where all are drawn."""
    if (num := len(data.domain_names)) <= MOST_DOMAINS:
        return ""
    return f"Of {num} domains the {COLOURED} that are largest {_where(data)} have a colour; all are in the table."


def said_of_domains(data: ReportData) -> str:
    """Which are drawn; empty where all are."""
    if (num := len(data.domain_names)) <= MOST_DOMAINS:
        return ""
    return f"Of {num} domains the {MOST_DOMAINS} that are largest {_where(data)} are drawn."


def _where(data: ReportData) -> str:
    mixtures = ["the found"] * (data.choice is not None) + ["the natural"] * bool(data.domains)
    return f"in {' or '.join(mixtures)} mixture" if mixtures else "in any proxy"


def _sizes(data: ReportData) -> dict[str, float]:
    mixtures = [data.choice.shares] if data.choice else []
    if data.domains:
        mixtures.append({d.name: d.natural_share for d in data.domains})
    mixtures = mixtures or [p.shares for r in data.rounds for p in r.mixtures]
    return {name: max(mixture.get(name, 0.0) for mixture in mixtures) for name in data.domain_names}


def last_fit(data: ReportData) -> dict[str, Fit]:
    """By score, of the newest round that has any."""
    return dict(next((r.fit for r in reversed(data.rounds) if r.fit), {}))


def ordered_scores(data: ReportData) -> list[str]:
    """Every score: in the order of the data where all are drawn, else the largest weights first, then the worst surrogates."""
    fits = last_fit(data)
    names = list(dict.fromkeys([*data.score_names, *fits]))
    if len(names) <= MOST_SCORES:
        return names

    def badness(name: str) -> float:
        if name not in fits:
            return math.inf
        return fits[name].spearman if math.isfinite(fits[name].spearman) else -1.0

    weighted = sorted((n for n in names if _weight(data, n)), key=lambda name: -_weight(data, name))
    first = weighted[: MOST_SCORES - _WORST]
    return first + sorted((n for n in names if n not in first), key=badness)


def drawn_scores(data: ReportData) -> list[str]:
    return ordered_scores(data)[:MOST_SCORES]


def said_of_scores(data: ReportData) -> str:
    """Which are drawn; empty where all are."""
    if (num := len(ordered_scores(data))) <= MOST_SCORES:
        return ""
    weighted = [name for name in ordered_scores(data) if _weight(data, name)]
    num_first = min(len(weighted), MOST_SCORES - _WORST)
    first = f"the {num_first} in the objective" if num_first == len(weighted) else said_of_weights(data, weighted, num_first)
    others = f"the {MOST_SCORES - num_first} whose surrogates rank worst" if last_fit(data) else f"{MOST_SCORES - num_first}"
    return f"Of {num} scores {MOST_SCORES} are drawn: {first}, and of the others {others}."


def said_of_weights(data: ReportData, names: Sequence[str], num: int) -> str:
    """ "the 3 with the largest weights", or of how many with the same one they are the first."""
    weights = sorted((_weight(data, name) for name in names), reverse=True)
    if weights[0] > weights[num - 1] or len(weights) == num or weights[num] < weights[num - 1]:
        return f"the {num} with the largest weights"
    return f"the first {num} of {weights.count(weights[0])} with the same, largest weight"


def _weight(data: ReportData, score: str) -> float:
    return data.objective.get(score, 0.0)


def best_and_latest(rows_in_order: Sequence[_T], best_first: Sequence[_T]) -> list[_T]:
    """Of the same rows in two orders, MOST_ROWS: the latest and the best of the others, the best first."""
    if len(best_first) <= MOST_ROWS:
        return list(best_first)
    latest = {id(row) for row in rows_in_order[-_LATEST:]}
    best = {id(row) for row in [row for row in best_first if id(row) not in latest][: MOST_ROWS - _LATEST]}
    return [row for row in best_first if id(row) in latest or id(row) in best]


def said_of_rows(num: int) -> str:
    """Which proxies are in the table."""
    if num <= MOST_ROWS:
        return ""
    return f"Of {num} proxies the best {MOST_ROWS - _LATEST} and the latest {_LATEST}"


def evenly(items: Sequence[_T], most: int) -> list[_T]:
    """At most so many of them, at even distances, among them the first and the last; the same ones for the same items."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)] if most > 1 else list(items[:most])


def listed(names: Sequence[str]) -> str:
    """ "a, b, c", or "a, b and 7 more"."""
    return ", ".join(names) if len(names) <= _NAMED + 1 else f"{', '.join(names[:_NAMED])} and {len(names) - _NAMED} more"
