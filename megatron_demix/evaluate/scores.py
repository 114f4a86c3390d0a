"""The score table: named numbers, each with a unit and a direction, a row per model. What is missing is never zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from megatron_demix.artifact import read_json, write_json
from megatron_demix.errors import CorruptInput


@dataclass(frozen=True)
class Score:
    name: str
    unit: str
    direction: Literal["lower", "higher"]


@dataclass
class ScoreTable:
    """rows: model name -> {score name -> value}, in the order the models were asked for. What is no finite number is absent."""

    scores: list[Score]
    rows: dict[str, dict[str, float]] = field(default_factory=dict)

    def column(self, score: str, models: Sequence[str] | None = None, *, lacking: float | None = None) -> list[float]:
        """One score of the given models (all, by default). lacking: for a model that was scored, but has no such number. Raises
        CorruptInput without."""
        values = []
        for model in models if models is not None else self.rows:
            value = self.rows.get(model, {}).get(score)
            if value is None or not math.isfinite(value):
                if lacking is None or model not in self.rows:
                    raise CorruptInput(
                        f"score {score!r} of model {model!r} is {'missing' if value is None else value}, expected a finite "
                        "number: something is wrong with its weights, or with the text. Look at its losses in training."
                    )
                value = lacking
            values.append(value)
        return values

    def write(self, path: Path) -> None:
        write_json(path, {"scores": [asdict(s) for s in self.scores], "rows": self.rows})

    @classmethod
    def read(cls, path: Path) -> ScoreTable:
        """Raises CorruptInput."""
        data = read_json(path)
        try:
            scores = [Score(**s) for s in data["scores"]]
            rows = {
                model: {score: float(value) for score, value in row.items() if value is not None}
                for model, row in data["rows"].items()
            }
        except (KeyError, ValueError, TypeError, AttributeError) as e:
            raise CorruptInput(
                f'{path}: not a score table, expected {{"scores": [{{"name", "unit", "direction"}}, ...], "rows": {{model: '
                "{score: number}}}."
            ) from e
        return cls(scores, rows)
