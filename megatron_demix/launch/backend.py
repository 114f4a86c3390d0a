"""What `demix submit`, `status` and `cancel` need from a place where studies run. Another one is one file with such a class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

CANCEL_WAIT_S = 120
"""How long a cancel() waits for what is still saving."""


@dataclass(frozen=True)
class Activity:
    """What becomes of a stage that is under way. failed: of a scheduler's work between stages, which nothing else tells of."""

    state: Literal["running", "queued", "failed"]
    job: str = ""
    """What the scheduler calls it."""
    reason: str = ""
    """Why it waits, in the scheduler's words; or what went wrong."""


class Backend(Protocol):
    """Starts `python -m megatron_demix.launch.stage` (or all of `demix run`) for whatever is not done, needs first.

    What is done is read from the artifacts, what failed from launch.attempts; a backend only knows what is under way.
    """

    def submit(self) -> dict[str, Any]:
        """Start what is missing. Facts about it, with a sentence under "said". Raises Incomplete if it is under way already."""
        ...

    def scripts(self) -> str:
        """What submit() would start, as text. Needs nothing installed."""
        ...

    def cancel(self) -> dict[str, Any]:
        """Let what is under way save and stop. Facts about it, with a sentence under "said"."""
        ...

    def activity(self) -> Mapping[str, Activity]:
        """By the name of each stage that is under way, and of work that a scheduler does between stages."""
        ...
