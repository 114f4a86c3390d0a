"""Why what was made before is made again: what differs from the artifact of other settings or inputs that lies beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from megatron_demix.artifact import Manifest
from megatron_demix.errors import CorruptInput
from megatron_demix.pipeline.stage import Stage
from megatron_demix.settings import Difference, differences

_DIGEST = re.compile(r"[0-9a-f]{12}|[0-9a-f]{16}|[0-9a-f]{32}")
_MOST = 3


def changes(stages: Sequence[Stage]) -> list[str]:
    """A sentence for each difference, naming the first stages that it makes anew; not those that only need one of these.

    stages: needs first.
    """
    again: set[str] = set()
    found: dict[str, list[str]] = {}
    for stage in stages:
        if stage.state() in ("done", "damaged"):
            continue
        if any(need.name in again for need in stage.needs):
            again.add(stage.name)
        elif (before := _nearest(stage)) is not None:
            again.add(stage.name)
            said = "; ".join(before[:_MOST]) + (f"; and {len(before) - _MOST} more" if len(before) > _MOST else "")
            found.setdefault(said or "it was made from other artifacts", []).append(stage.name)
    return [f"{_named(names)} will be made anew: {said}" for said, names in found.items()]


def _named(stages: Sequence[str]) -> str:
    return f"{stages[0]} and what needs it" if len(stages) == 1 else f"{stages[0]}, {len(stages) - 1} more and what needs them"


def _nearest(stage: Stage) -> list[str] | None:
    """What differs from the artifact beside it that differs least, the newest of several; None where there is none."""
    best: list[str] | None = None
    now = json.loads(json.dumps(stage.settings, default=str))
    name = stage.folder.name.removesuffix(stage.key)
    beside = [path for path in stage.folder.parent.glob(f"{name}*") if _DIGEST.fullmatch(path.name.removeprefix(name))]
    for path in sorted(beside, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            manifest = Manifest.read(path)
        except CorruptInput:
            continue
        if manifest and manifest.key != stage.key:
            differs = [_in_words(one) for one in differences(manifest.settings, now)]
            best = differs if best is None or len(differs) < len(best) else best
    return best


def _in_words(difference: Difference) -> str:
    place, then, now = difference
    if all(isinstance(value, str) and _DIGEST.fullmatch(value) for value in (then, now)):
        return f"{place}: other content than before"
    return f"{place} was {_short(then)}, is {_short(now)}"


def _short(value: Any) -> str:
    text = "not set" if value is None else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
