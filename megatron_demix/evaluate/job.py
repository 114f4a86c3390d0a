"""Scoring many models in one process group: proxies merged in place, or checkpoints loaded one after another."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict

from megatron_demix.artifact import read_json, write_json
from megatron_demix.evaluate.ensemble import FOLDER, DomainText, Texts, keep, remove_unfinished
from megatron_demix.evaluate.scores import Score, ScoreTable
from megatron_demix.evaluate.tasks.choices import bits_per_byte
from megatron_demix.evaluate.tasks.task import read_task
from megatron_demix.evaluate.windows import Windows, read_windows
from megatron_demix.native import default_threads
from megatron_demix.progress import Heartbeat
from megatron_demix.study.merging import MergeSpec
from megatron_demix.study.search import TaskSpec
from megatron_demix.study.training import ModelSpec, ParallelSpec, TrainSpec

if TYPE_CHECKING:
    from megatron_demix.checkpoint.live import LiveTensor
    from megatron_demix.evaluate.patience import Patience
    from megatron_demix.evaluate.suite import Scored, Suite, TextCodec

SCORES, NOTES = "scores.json", "tasks.json"


class EvaluateJob(BaseModel):
    """One scoring run, as the JSON file its ranks read. Give `mixtures` over `components`, or `checkpoints`, or both."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["evaluate"] = "evaluate"
    model: ModelSpec
    train: TrainSpec
    parallel: ParallelSpec
    vocab_size: int
    token_bytes: list[int]
    """UTF-8 bytes each token id stands for."""
    domains: dict[str, list[Path]]
    """Indexed prefixes of the split to score on."""
    tokens_per_domain: int
    tasks: list[TaskSpec] = []
    """Each with the path and the split that are scored."""
    tokenizer: Path | None = None
    """Folder of the tokenizer, for tasks."""
    micro_batch_size: int
    generate_batch_size: int | None = None
    components: dict[str, Path] = {}
    mixtures: dict[str, dict[str, float]] = {}
    """Merge weights over `components`, by proxy name."""
    normalize: Literal["error", "affine"] = "error"
    """affine: some of these weights may be negative, though they sum to 1."""
    merge: MergeSpec = MergeSpec()
    base: Path | None = None
    """What the components were trained from, for methods that merge deltas."""
    seed: int = 0
    """Of methods that drop at random."""
    checkpoints: dict[str, Path] = {}
    keep_tokens: list[str] = []
    """Models whose every token's probability stays in work/tokens (megatron_demix.evaluate.ensemble)."""
    part: tuple[int, int] | None = None
    """(i, n): only every n-th model from the i-th on, whose rows stay in `work` for the job that scores the rest."""
    work: Path
    heartbeat: Path | None = None
    threads_per_rank: int = 1

    @property
    def models(self) -> list[str]:
        """The names of those that this job scores."""
        every = [*self.mixtures, *self.checkpoints]
        return every[self.part[0] :: self.part[1]] if self.part else every

    @property
    def max_tokens(self) -> int:
        """What the model reads at once."""
        return self.model.max_position_embeddings or self.train.seq_length


class Merger(Protocol):
    """Writes a proxy into the parameters it was made for (megatron_demix.merge.proxies.ProxyMerger)."""

    def merge(self, weights: Mapping[str, float], *, normalize: Literal["error", "affine"]) -> None: ...


def evaluate(
    job: EvaluateJob,
    make_merger: Callable[[Mapping[str, Path], Sequence[LiveTensor]], Merger],
    load_codec: Callable[[Path], TextCodec] | None = None,
) -> None:
    """Run by every rank: score every model of the job and let rank 0 write work/scores.json, and work/tasks.json with what
    should be known about the tasks' scores. load_codec: the tokenizer in a folder, where there are tasks.

    A replica is all ranks that one model is shared out among; each takes every n-th mixture, and every n-th checkpoint. A
    finished row is appended to work/rows-<part>-<replica>.jsonl at once: a killed run goes on where it stopped, on any number
    of replicas and in any number of parts. Replicas may take any time for a model (evaluate.patience).
    """
    import torch

    from megatron_demix.train.compat import cpu_compat

    torch.set_num_threads(job.threads_per_rank)
    with cpu_compat():
        # Here and not above: what the core decorates is decided when it is imported.
        from megatron_demix.evaluate.patience import Patience
        from megatron_demix.train.model import parallel_groups

        with parallel_groups(job.parallel, seed=0, timeout_s=job.train.timeout):
            first, patience = torch.distributed.get_rank() == 0, Patience()
            known = patience.of_first(_finished_rows(job) if first else None)
            pending = [n for n in job.models if n not in known]
            suite = _suite(job, load_codec)
            made = _score(job, pending, suite, patience, make_merger) if pending else {}
            everywhere = patience.gathered(made)
            if first and job.part is None:
                _collect(job, suite, reduce(or_, everywhere, known))
            torch.distributed.barrier()


def _score(
    job: EvaluateJob,
    pending: Sequence[str],
    suite: Suite | None,
    patience: Patience,
    make_merger: Callable[[Mapping[str, Path], Sequence[LiveTensor]], Merger],
) -> dict[str, dict[str, Any]]:
    """The rows of the models that this rank has written, by name: it scores its replica's part of `pending`."""
    import torch
    from megatron.core import parallel_state

    from megatron_demix.train.model import build_model, live_tensors
    from megatron_demix.train.weights import load_weights

    # Ranks among which experts are shared out read the same texts side by side.
    replica, replicas = parallel_state.get_expert_data_parallel_rank(), job.parallel.data // job.parallel.expert
    # A token of an answer at a time cannot be spread over ranks.
    parallel = job.parallel.model_copy(update={"sequence_parallel": False}) if suite else job.parallel
    model = build_model(job.model, job.train, parallel, job.vocab_size, cached=suite is not None)
    places = parallel_state.get_model_parallel_group().rank(), parallel_state.get_expert_model_parallel_rank()
    writes = places == (0, 0)
    windows = list(_windows(job))
    score = _scorer(job, model, windows, suite, patience, judges=writes)
    merger = make_merger(job.components, live_tensors(model)) if any(n in job.mixtures for n in pending) else None
    heartbeat = Heartbeat(job.heartbeat) if job.heartbeat and torch.distributed.get_rank() == 0 else None
    rows = job.work / f"rows-{'-of-'.join(map(str, job.part)) if job.part else 'all'}-{replica}.jsonl"
    made: dict[str, dict[str, Any]] = {}
    for turn, (name, ours) in enumerate(_turns(job, pending, replica, replicas)):
        if heartbeat:
            done = len(job.models) - len(pending) + turn * replicas
            heartbeat.beat(min(done, len(job.models)), len(job.models), "models")
        if name in job.mixtures:
            assert merger is not None
            merger.merge(job.mixtures[name], normalize=job.normalize)
        else:
            patience.wait_for_all()
            load_weights(model, job.checkpoints[name], vocab_size=job.vocab_size)
        if not ours:
            continue
        scored = score()
        if writes:
            _say(name, scored, first=turn == 0)
            if name in job.keep_tokens:
                keep(job.work / FOLDER, name, _texts(windows, suite), scored.token_nats)
            with open(rows, "a") as file:
                # The leading newline ends a line that a kill cut short.
                made[name] = {"model": name, "scores": scored.scores, "notes": scored.notes}
                file.write("\n" + json.dumps(made[name]) + "\n")
    return made


def _turns(job: EvaluateJob, pending: Sequence[str], replica: int, replicas: int) -> Iterator[tuple[str, bool]]:
    """What a replica makes of its model next, and whether it scores that.

    Replicas merge each for itself, but all ranks load at once, since megatron.core compares what they load: a replica that has
    nothing left to score loads along.
    """
    merged = [name for name in pending if name in job.mixtures]
    loaded = [name for name in pending if name not in job.mixtures]
    yield from ((name, True) for name in merged[replica::replicas])
    for first in range(0, len(loaded), replicas):
        together = loaded[first : first + replicas]
        yield (together[replica], True) if replica < len(together) else (together[0], False)


def _suite(job: EvaluateJob, load_codec: Callable[[Path], TextCodec] | None) -> Suite | None:
    if not job.tasks:
        return None
    assert load_codec is not None
    assert job.tokenizer is not None
    import torch

    from megatron_demix.evaluate.suite import Suite
    from megatron_demix.evaluate.tasks.sandbox import is_isolated

    tasks = [read_task(spec) for spec in job.tasks]
    workers = max(1, default_threads() // job.parallel.world_size)
    suite = Suite(tasks, load_codec(job.tokenizer), max_tokens=job.max_tokens, workers=workers)
    if suite.runs_code and torch.distributed.get_rank() == 0 and not is_isolated():
        print(
            "warning: the kernel has neither namespaces for this user nor Landlock of version 6, or no filters, so programs "
            "that models write are limited in time, memory, file size and processes, but could change files or open sockets",
            flush=True,
        )
    return suite


def _say(model: str, scored: Scored, *, first: bool) -> None:
    """What the log should know of tasks. first: of this run; what is so for every model is said once."""
    for task, notes in scored.notes.items():
        if first and notes["cut"]:
            print(
                f"warning: {task}: {notes['cut']} texts are longer than the model reads: their beginning, worked examples "
                "first, is left out",
                flush=True,
            )
        if notes.get("endless") or notes.get("stopped"):
            print(
                f"{model}: {task}: of {notes['items']} answers {notes['endless']} did not end by themselves, and "
                f"{notes['stopped']} had to be stopped when they were run or compared",
                flush=True,
            )


def _scorer(
    job: EvaluateJob, model: Any, windows: Sequence[Windows], suite: Suite | None, patience: Patience, *, judges: bool
) -> Callable[[], Scored]:
    """What scores the model as it is at the time. Its tokens are those of domains, then those of tasks."""
    from megatron_demix.evaluate.live import LiveModel
    from megatron_demix.evaluate.loss import token_nats
    from megatron_demix.evaluate.suite import Scored

    live = LiveModel(model, vocab_size=job.vocab_size, max_tokens=job.max_tokens) if suite else None

    def score() -> Scored:
        nats = {w.name: token_nats(model, w, micro_batch_size=job.micro_batch_size) for w in windows}
        losses = {w.name: bits_per_byte(float(nats[w.name].sum(dtype=np.float64)), w.target_bytes) for w in windows}
        if suite is None or live is None:
            return Scored(losses, token_nats=[*nats.values()])
        tokens = job.micro_batch_size * job.train.seq_length
        written = job.generate_batch_size * job.max_tokens if job.generate_batch_size else tokens
        scored = suite.score(live, tokens, generate_tokens=written, judges=judges, wait=patience.wait_for_replica)
        return Scored(losses | scored.scores, scored.notes, [*nats.values(), *scored.token_nats])

    return score


def _texts(windows: Sequence[Windows], suite: Suite | None) -> Texts:
    domains = {w.name: DomainText(w.tokens.shape[0], w.tokens.shape[1] - 1, w.target_bytes) for w in windows}
    return Texts(domains, suite.texts if suite else {})


def _windows(job: EvaluateJob) -> Iterator[Windows]:
    table = np.asarray(job.token_bytes, dtype=np.int32)
    for name, prefixes in job.domains.items():
        yield read_windows(
            name,
            prefixes,
            seq_length=job.train.seq_length,
            num_tokens=job.tokens_per_domain,
            token_bytes=table,
            vocab_size=job.vocab_size,
        )


def _finished_rows(job: EvaluateJob) -> dict[str, dict[str, Any]]:
    """By model, the rows that have been written: "scores" and "notes". A run that was killed after it had put them all together
    has them in the table, and perhaps there alone. Checkpoints without a score are scored again."""
    rows: dict[str, dict[str, Any]] = {}
    work = job.work
    if (work / SCORES).exists():
        notes = read_json(work / NOTES) if (work / NOTES).exists() else {}
        for model, scores in ScoreTable.read(work / SCORES).rows.items():
            rows[model] = {"scores": scores, "notes": notes.get(model, {})}
    for path in sorted(work.glob("rows-*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # empty, or cut short by a kill: that model is scored again
            rows[row["model"]] = row
    return {
        model: row
        for model, row in rows.items()
        if model in job.mixtures or all(math.isfinite(score) for score in row["scores"].values())
    }


def _collect(job: EvaluateJob, suite: Suite | None, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """A proxy's score that is no finite number is left out of the table; of a checkpoint, it is an error."""
    table = ScoreTable([*(Score(name, "bits/byte", "lower") for name in job.domains), *(suite.scores if suite else ())])
    for name in job.models:
        scores = rows[name]["scores"]
        table.rows[name] = {score: value for score, value in scores.items() if math.isfinite(value)}
        if lacking := [f"{score} {value}" for score, value in scores.items() if not math.isfinite(value)]:
            print(f"warning: {name}: {', '.join(lacking)}: not counted", flush=True)
    for score in table.scores:
        table.column(score.name, [name for name in job.models if name in job.checkpoints])
    if suite:
        write_json(job.work / NOTES, {name: rows[name]["notes"] for name in job.models})
    table.write(job.work / SCORES)
    remove_unfinished(job.work / FOLDER)
    for path in job.work.glob("rows-*.jsonl"):
        path.unlink()
