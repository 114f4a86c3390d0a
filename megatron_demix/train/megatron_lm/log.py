"""What Megatron-LM prints about an iteration, as the row of losses.jsonl that it stands for."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

# " [2026-01-01 00:00:00] iteration       12/     100 | consumed samples: ... | lm loss: 1.085432E+01 | ..."
_LINE = re.compile(r"^ ?\[[^\]]+\] iteration +(\d+)/ *(\d+) \|(.*)$")
_NAMES = {"lm loss": "lm loss", "learning rate": "learning-rate", "grad norm": "grad-norm"}


@dataclass(frozen=True)
class Iteration:
    row: dict[str, float]
    """As losses.read_losses describes, but the learning rate is the next iteration's: Megatron prints it after the schedule's
    step. An iteration without a loss, which Megatron skipped as NaN, has NaN."""
    seconds: float | None
    """It took."""


def parse_iteration(line: str) -> Iteration | None:
    """The iteration that a line of the last rank's output is about; None for any other line."""
    match = _LINE.match(line.rstrip())
    if match is None:
        return None
    values: dict[str, float] = {}
    for part in match[3].split("|"):
        name, _, text = part.strip().rpartition(":")
        try:
            values[name] = float(text)
        except ValueError:
            continue
    row: dict[str, float] = {"iteration": int(match[1])}
    row |= {ours: values.get(theirs, math.nan) for theirs, ours in _NAMES.items()}
    elapsed_ms = values.get("elapsed time per iteration (ms)")
    return Iteration(row, None if elapsed_ms is None else elapsed_ms / 1000)
