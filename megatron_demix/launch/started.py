"""What a run was last started with: the settings of that command may be others than those of whoever looks at it later."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_demix.artifact import read_json, write_json
from megatron_demix.errors import DemixError
from megatron_demix.settings import differences
from megatron_demix.study.launch import LaunchSpec
from megatron_demix.study.study import Study


@dataclass(frozen=True)
class Started:
    """study: as JSON. until: which of megatron_demix.pipeline.dag.MILESTONES it was to end with, None: the last."""

    study: Mapping[str, Any]
    until: str | None

    @classmethod
    def of(cls, study: Study, until: str | None) -> Started:
        return cls(study.model_dump(mode="json"), until)

    @classmethod
    def read(cls, run: Path) -> Started | None:
        """None where nothing was started, or nothing is known of it."""
        try:
            found = read_json(_path(run))
            with suppress(ValidationError):  # an earlier version may have started it, whose settings are not all of these
                return cls.of(Study.model_validate(found["study"]), found["until"])
            return cls(dict(found["study"]), found["until"])
        except (DemixError, KeyError, TypeError, ValueError):
            return None

    def write(self, run: Path) -> None:
        """By the one who holds the run's lock."""
        write_json(_path(run), {"study": self.study, "until": self.until})

    @property
    def launch(self) -> LaunchSpec | None:
        """Where it was started, which is where it can be asked for and stopped."""
        try:
            return LaunchSpec.model_validate(self.study["launch"])
        except (KeyError, ValidationError):
            return None

    def otherwise(self, now: Started) -> str:
        """The arguments that lead from the study as it is now to what was started; empty if that is the same. What only says
        where and how fast it runs does not count, but for the backend."""
        settings = {place: then for place, then, _ in differences(self.study, now.study, as_one=_in_one_setting)}
        counted = [key for key in settings if not key.startswith("launch.") or key == "launch.backend"]
        words = [word for key in counted for word in ("--set", f"{key}={json.dumps(settings[key])}")]
        if self.until and self.until != now.until:
            words += ["--until", self.until]
        return shlex.join(words)


def _path(run: Path) -> Path:
    return run / "started.json"


def _in_one_setting(then: Mapping, now: Mapping) -> bool:
    """Whether no settings of single keys lead from one mapping to the other: what is too much stays, and a dot ends a key."""
    return not set(then) >= set(now) or any("." in key for key in then)
