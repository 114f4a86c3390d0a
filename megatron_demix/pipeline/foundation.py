"""What a study's search stands on, and what its final runs are compared by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_demix.pipeline.stage import Stage
from megatron_demix.pipeline.task_inputs import TaskInputs
from megatron_demix.study.study import Study


@dataclass(frozen=True)
class Ground:
    """What every model is trained from."""

    study: Study
    run: Path
    tokenizer: Stage
    data: Mapping[str, Stage]
    """By domain."""
    base: Stage


@dataclass(frozen=True)
class Foundation(Ground):
    """Everything that is there before any mixture."""

    components: Mapping[str, Stage]
    """By domain, as they are merged; empty where the study trains its proxies."""
    mixed: Mapping[str, Stage]
    """By name, components that were trained on mixed weights (component.mixed), as they are merged."""
    tasks: TaskInputs

    @property
    def merged(self) -> dict[str, Stage]:
        """All that a proxy is merged from, in the order of megatron_demix.merge.second_order."""
        return {**self.components, **self.mixed}
