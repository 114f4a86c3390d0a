"""Where scores are cut: the worst of each domain are dropped, the rest may be graded. A cut is a score or a share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_demix.artifact import read_json, write_json
from megatron_demix.data.clean.documents import Source
from megatron_demix.data.clean.trove import BaseFilter, Document, PipelineStep
from megatron_demix.study.data import CleanSpec
from megatron_demix.units import Cut

CUTS = "cuts.json"
GOOD_IS_LOW = {"perplexity"}
Grades = Mapping[str, Mapping[str, Cut | None]]
"""By domain: grade -> cut, best grade first; None, the rest, for the last."""


def bound(scores: np.ndarray, keep: float) -> float | None:
    """The score of the last of the `keep` (0 ... 1) best documents; None if that is no document. Whoever scores the same is as
    good, so ties keep more. scores: float64 [N], good is high."""
    num = round(keep * len(scores))
    return float(np.partition(scores, len(scores) - num)[len(scores) - num]) if num else None


class FindCuts(PipelineStep):
    """Turns shares into scores, one domain at a time, and writes cuts.json: {domain: {"drop": [[score, bound]], "grades":
    [[name, bound]]}}. Bounds are on the sign of the score for which high is good. Each cut sees what those before it left."""

    type, name = "✂️ - CUT", "bounds"

    def __init__(self, work: Path, sources: list[Source], spec: CleanSpec, grades: Grades) -> None:
        super().__init__()
        self.work, self.sources, self.spec, self.grades = work, sources, spec, grades

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        domains = dict.fromkeys(source.domain for source in self.sources)
        write_json(self.work / CUTS, {domain: self._cut(domain) for domain in domains})

    def _cut(self, domain: str) -> dict[str, Any]:
        scores = {name: self._scores(domain, name) for name in ("perplexity", "quality")}
        left = np.ones(max(len(s) for s in scores.values()), bool)
        drops = []
        for name, spec in (("perplexity", self.spec.perplexity), ("quality", self.spec.quality)):
            if spec is None or not len(scores[name]):
                continue
            if spec.drop.share:
                worst = bound(scores[name][left], 1 - spec.drop.value)
            else:
                worst = -spec.drop.value if name in GOOD_IS_LOW else spec.drop.value
            if worst is not None:
                drops.append([name, worst])
                left &= scores[name] >= worst
        return {"drop": drops, "grades": self._grade(domain, scores["quality"][left[: len(scores["quality"])]])}

    def _grade(self, domain: str, quality: np.ndarray) -> list[list[Any]]:
        grades: list[list[Any]] = []
        share = 0.0
        for name, cut in self.grades.get(domain, {}).items():
            if cut is None:
                grades.append([name, None])
            elif cut.share:
                share += cut.value
                best = bound(quality, min(share, 1.0))
                if best is not None:
                    grades.append([name, best])
            else:
                grades.append([name, cut.value])
        return grades

    def _scores(self, domain: str, name: str) -> np.ndarray:
        files = [self.work / "scores" / name / f"{task:05d}.npy" for task, s in enumerate(self.sources) if s.domain == domain]
        parts = [np.load(file) for file in files if file.is_file()]
        scores = np.concatenate(parts) if parts else np.empty(0)
        return -scores if name in GOOD_IS_LOW else scores


class Drop(BaseFilter):
    """Removes what scores below its domain's bound."""

    def __init__(self, work: Path, score: str, exclusion_writer: Any) -> None:
        super().__init__(exclusion_writer)
        self.score, self.name = score, f"drop by {score}"
        self.path = work / CUTS
        self._cuts: dict[str, Any] = {}

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        self._cuts = self._cuts or read_json(self.path)
        worst = dict(self._cuts[doc.metadata["domain"]]["drop"]).get(self.score)
        if worst is None:
            return True
        sign = -1 if self.score in GOOD_IS_LOW else 1
        value = doc.metadata[self.score]
        if sign * value >= worst:
            return True
        return False, f"{self.score} {value:.6g}, the domain's bound is {sign * worst:.6g}"


class Grade(PipelineStep):
    """Sends each document to its grade's folder, <domain>_<grade>."""

    type, name = "✂️ - CUT", "grade"

    def __init__(self, work: Path) -> None:
        super().__init__()
        self.path = work / CUTS

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        cuts = read_json(self.path)
        for document in data:
            domain = document.metadata["domain"]
            for grade, worst in cuts[domain]["grades"]:
                if worst is None or document.metadata["quality"] >= worst:
                    document.metadata["folder"] = f"{domain}_{grade}"
                    break
            yield document
