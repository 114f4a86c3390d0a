"""What a run was last started with: the settings of that command may be others than those of whoever looks at it later."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_demix.artifact import read_json, write_json
from megatron_demix.errors import DemixError
from megatron_demix.study.launch import LaunchSpec
from megatron_demix.study.study import Study


@dataclass(frozen=True)
class Started:
    """study: as JSON. until: the part of megatron_demix.pipeline.dag.PARTS that it was to end with, None: the last."""

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
        settings = dict(_unequal(now.study, self.study))
        counted = [key for key in settings if not key.startswith("launch.") or key == "launch.backend"]
        words = [word for key in counted for word in ("--set", f"{key}={json.dumps(settings[key])}")]
        if self.until and self.until != now.until:
            words += ["--until", self.until]
        return shlex.join(words)


def _path(run: Path) -> Path:
    return run / "started.json"


def _unequal(now: Any, then: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted place, value then) wherever two studies differ; whole, where names have dots themselves."""
    inner = f"{place}." if place else ""
    if isinstance(now, Mapping) and isinstance(then, Mapping) and set(then) >= set(now) and not any("." in key for key in then):
        for key in then:
            yield from _unequal(now.get(key), then[key], f"{inner}{key}")
    elif isinstance(now, list) and isinstance(then, list) and len(now) == len(then):
        for i, (a, b) in enumerate(zip(now, then, strict=True)):
            yield from _unequal(a, b, f"{inner}{i}")
    elif now != then:
        yield place, then
