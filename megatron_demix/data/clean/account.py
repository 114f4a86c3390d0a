"""The account of a cleaning, clean.json: what each domain had, what is kept, what was removed and why."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from megatron_demix.artifact import read_json, sync_path, write_json
from megatron_demix.data.clean.contamination import SUMMARY
from megatron_demix.data.clean.cuts import CUTS, GOOD_IS_LOW, Grades
from megatron_demix.data.clean.documents import EXAMPLES, Source
from megatron_demix.data.clean.duplicates import signature_bytes
from megatron_demix.data.clean.trove import PipelineStep
from megatron_demix.errors import VerificationFailed
from megatron_demix.study.data import CleanSpec

MANIFEST = "clean.json"
AFTER_NEAR = ("near_duplicate", "perplexity", "quality")
"""Reasons why documents are removed that were looked at for near duplicates."""


class Account(PipelineStep):
    """The last pass, one task: adds up what the writers counted, and renames work/result to the output."""

    type, name = "🧾 - ACCOUNT", "clean.json"

    def __init__(self, work: Path, output: Path, sources: list[Source], spec: CleanSpec, grades: Grades) -> None:
        super().__init__()
        self.work, self.output, self.sources, self.spec, self.grades = work, output, sources, spec, grades

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        result = self.work / "result"
        if not result.exists():  # published by a task that was killed before it could say so
            return
        write_json(result / MANIFEST, self._account())
        for path in sorted(result.rglob("*"), reverse=True):
            sync_path(path)
        os.rename(result, self.output)
        sync_path(self.output.parent)

    def _account(self) -> dict[str, Any]:
        kept, read = self._sum("kept"), self._sum("read")
        reasons = sorted(p.name for p in (self.work / "counts").iterdir() if p.name not in ("kept", "read"))
        removed = {reason: self._sum(reason) for reason in reasons}
        domains: dict[str, Any] = {}
        for domain in dict.fromkeys(source.domain for source in self.sources):
            folders = [f"{domain}_{grade}" for grade in self.grades.get(domain, {})] or [domain]
            outputs = {f: _without_examples(kept[f]) for f in folders if f in kept}
            own = {reason: counts[domain] for reason, counts in removed.items() if domain in counts}
            total, accounted = read[domain]["documents"], sum(c["documents"] for c in [*outputs.values(), *own.values()])
            if total != accounted:
                raise VerificationFailed(
                    f"domain {domain!r}: {total} documents were read, {accounted} were kept or removed. Delete {self.work} and "
                    "run the command again; the inputs may have changed while they were read."
                )
            domains[domain] = {"documents": total, "kept": outputs, "removed": own}
            if self.spec.near_duplicates:
                compared = [*outputs.values(), *(own[reason] for reason in AFTER_NEAR if reason in own)]
                domains[domain]["too_short"] = sum(c["documents"] for c in compared) - self._signed(domain)
        report: dict[str, Any] = {"settings": _settings(self.spec), "domains": domains}
        if (self.work / CUTS).is_file():
            for domain, cuts in read_json(self.work / CUTS).items():
                signed = {n: -b if n in GOOD_IS_LOW else b for n, b in cuts["drop"]}
                domains[domain]["bounds"] = signed | {f"grade {n}": b for n, b in cuts["grades"] if b is not None}
        if (self.work / "tasks" / SUMMARY).is_file():
            report["tasks"] = read_json(self.work / "tasks" / SUMMARY)
        return report

    def _signed(self, domain: str) -> int:
        """Documents of a domain that have an n-gram, and so can be near duplicates."""
        assert self.spec.near_duplicates
        folder = self.work / "near" / "signatures" / "bucket_000"
        files = [folder / f"{task:05d}.minhash.sig" for task, s in enumerate(self.sources) if s.domain == domain]
        return sum(file.stat().st_size for file in files) // signature_bytes(self.spec.near_duplicates)

    def _sum(self, what: str) -> dict[str, dict[str, Any]]:
        """By folder, over the tasks in their order."""
        total: dict[str, dict[str, Any]] = defaultdict(lambda: {"documents": 0, "bytes": 0, "examples": []})
        for file in sorted((self.work / "counts" / what).glob("*.json")):
            for folder, counts in read_json(file).items():
                entry = total[folder]
                entry["documents"] += counts["documents"]
                entry["bytes"] += counts["bytes"]
                entry["examples"] = [*entry["examples"], *counts["examples"]][:EXAMPLES]
        return total


def _without_examples(counts: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in counts.items() if k != "examples"}


def _settings(spec: CleanSpec) -> dict[str, Any]:
    """Models and tasks by their files' names: an account does not say where it was made."""

    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: bare(v) for k, v in value.items()}
        return (
            value.name if isinstance(value, Path) else [bare(v) for v in value] if isinstance(value, (list, tuple)) else value
        )

    settings = bare(spec.model_dump())
    if spec.contamination:
        settings["contamination"]["tasks"] = sorted(spec.contamination.tasks)
    return settings
