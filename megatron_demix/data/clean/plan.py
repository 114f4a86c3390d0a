"""The passes of a cleaning: each a datatrove pipeline that runs to its end before the next begins.

Task n of every pass over documents works on the n-th input file, so that the result depends on the files and not on who works
on which. Cheap steps come first, and scores are given last, to what is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_demix.data.clean import contamination, trove
from megatron_demix.data.clean.account import Account
from megatron_demix.data.clean.cuts import Drop, FindCuts, Grade, Grades
from megatron_demix.data.clean.documents import ReadPassed, ReadSources, RecordWriter, Source, passed_writer
from megatron_demix.data.clean.duplicates import KeepFirst, exact_config, near_config
from megatron_demix.data.clean.scores import ForDomains, Perplexity, Quality, Score
from megatron_demix.data.clean.words import Words, WordsAndCharacters
from megatron_demix.data.inputs import BadDocuments
from megatron_demix.errors import StageFailed
from megatron_demix.study.data import CleanSpec

FINDERS = 8
"""Tasks that look for exact duplicates, each in its part of the hashes: fixed, for the files' names depend on it."""


@dataclass(frozen=True)
class Pass:
    name: str
    steps: list[Any]
    tasks: int


class AllDone(trove.PipelineStep):
    """Fails if a task of the pass before is not done: SLURM may start a pass although an array before it has failed."""

    type, name = "🔒", "the pass before is done"

    def __init__(self, logs: Path, tasks: int) -> None:
        super().__init__()
        self.logs, self.tasks = logs, tasks

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        done = len(list((self.logs / "completions").glob("*")))
        if done < self.tasks:
            raise StageFailed(
                f"{self.logs}: {done} of {self.tasks} tasks are done. Look at its logs, then run the command again."
            )


def plan(
    sources: list[Source],
    tasks: dict[str, list[Path]],
    spec: CleanSpec,
    grades: Grades,
    work: Path,
    output: Path,
    on_bad_document: BadDocuments,
) -> list[Pass]:
    """tasks: files of each evaluation task. Scratch lies in `work`, the result in work/result until the last pass moves it."""
    words, grams, count = Words(), WordsAndCharacters(), len(sources)
    passes: list[Pass] = []
    pending: list[Any] = [ReadSources(work, sources, on_bad_document)]

    def end_pass(name: str, *last: Any) -> None:
        """The pending steps are a pass that leaves whole documents behind, and the next pass begins with these."""
        nonlocal pending
        folder = work / "passed" / name
        passes.append(Pass(name, [*pending, passed_writer(folder), *last], count))
        pending = [ReadPassed(str(folder))]

    if spec.heuristics:
        for name in spec.heuristics.use:
            step = _heuristic(name, words, RecordWriter(work, name))
            pending.append(_for(spec.heuristics.domains, step, sources))
    if spec.exact_duplicates:
        exact = exact_config(list(dict.fromkeys(source.domain for source in sources)))
        signatures, found = work / "exact" / "signatures", work / "exact" / "found"
        end_pass("read", trove.ExactDedupSignature(str(signatures), config=exact, finder_workers=FINDERS))
        passes.append(Pass("find_exact", [trove.ExactFindDedups(str(signatures), str(found), config=exact)], FINDERS))
        pending.append(trove.ExactDedupFilter(str(found), config=exact, exclusion_writer=RecordWriter(work, "exact_duplicate")))
    if spec.contamination:
        index = work / "tasks"
        passes.insert(0, Pass("index_tasks", [contamination.IndexTasks(index, tasks, spec.contamination)], 1))
        pending.append(
            trove.NGramsDecontFilter(
                str(index),
                config=contamination.config(spec.contamination),
                exclusion_writer=RecordWriter(work, "contaminated"),
                language=grams,
            )
        )
    if spec.near_duplicates:
        near = near_config(spec.near_duplicates)
        marks, buckets, removals = (work / "near" / part for part in ("signatures", "buckets", "removals"))
        end_pass("sign_near", trove.MinhashDedupSignature(str(marks), config=near, language=grams))
        passes.append(
            Pass("find_near", [trove.MinhashDedupBuckets(str(marks), str(buckets), config=near)], spec.near_duplicates.bands)
        )
        cluster = trove.MinhashDedupCluster(str(buckets), str(removals), config=near, save_cluster_id=True)
        passes.append(Pass("cluster_near", [cluster, KeepFirst(removals)], 1))
        pending.append(trove.MinhashDedupFilter(str(removals), exclusion_writer=RecordWriter(work, "near_duplicate")))
    scores: list[tuple[Score, list[str] | None]] = []
    if spec.perplexity:
        scores.append((Perplexity(work, spec.perplexity), spec.perplexity.domains))
    if spec.quality:
        scores.append((Quality(work, spec.quality), spec.quality.domains))
    if scores:
        pending += [_for(domains, score, sources) for score, domains in scores]
        end_pass("score")
        passes.append(Pass("find_cuts", [FindCuts(work, sources, spec, grades)], 1))
        pending += [Drop(work, score.name, RecordWriter(work, score.name)) for score, _ in scores]
        pending.append(Grade(work))
    passes.append(Pass("write", [*pending, RecordWriter(work)], count))
    passes.append(Pass("account", [Account(work, output, sources, spec, grades)], 1))
    logs = [AllDone(work / "logs" / p.name, p.tasks) for p in passes]
    return [Pass(p.name, [*logs[max(n - 1, 0) : n], *p.steps], p.tasks) for n, p in enumerate(passes)]


def _heuristic(name: str, words: Words, removed: RecordWriter) -> Any:
    kind = {
        "gopher_repetition": trove.GopherRepetitionFilter,
        "gopher_quality": trove.GopherQualityFilter,
        "c4": trove.C4QualityFilter,
        "fineweb": trove.FineWebQualityFilter,
    }[name]
    return kind(language=words, exclusion_writer=removed)


def _for(domains: list[str] | None, step: Any, sources: list[Source]) -> Any:
    return step if domains is None else ForDomains(step, sources, domains)
