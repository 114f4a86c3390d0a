"""Running a cleaning: its passes one after the other on this machine, or as chained job arrays on SLURM."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import cache
from pathlib import Path
from typing import Any

from megatron_demix.artifact import fingerprint, own_folder, read_json, write_json
from megatron_demix.data.clean import REVISION, trove
from megatron_demix.data.clean.account import MANIFEST
from megatron_demix.data.clean.cuts import Grades
from megatron_demix.data.clean.documents import Source
from megatron_demix.data.clean.plan import Pass, plan
from megatron_demix.data.clean.scores import Perplexity, Quality, forget_models
from megatron_demix.data.input_files import names_of, resolve_inputs
from megatron_demix.data.inputs import BadDocuments
from megatron_demix.errors import ConfigError, OutputExists, storage_errors
from megatron_demix.locks import open_lock, take_lock
from megatron_demix.process import die_with_parent
from megatron_demix.progress import progress_bar
from megatron_demix.study.data import CleanSpec
from megatron_demix.units import Cut

IDENTITY = "identity.json"


def clean_domains(
    inputs: Mapping[str, Sequence[Path]],
    output: Path,
    spec: CleanSpec,
    *,
    grades: Grades | None = None,
    json_keys: Mapping[str, str] | None = None,
    on_bad_document: BadDocuments = "error",
    root: Path | str = ".",
    work: Path | None = None,
    workers: int = 1,
    slurm: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any] | None:
    """Write output/<domain>/*.jsonl.zst of what is kept, output/removed/<reason>/<domain>/*.jsonl.zst of the rest, and
    output/clean.json, which is returned. The same bytes for any number of workers.

    inputs: files by domain; of duplicates across domains the domain named first keeps its own. grades: the kept documents of
    these domains go to output/<domain>_<grade>. json_keys: by domain, "text" where none is given. root: what the tasks' files
    are relative to. work: scratch, by default beside the output; an interrupted cleaning of the same inputs with the same
    settings goes on there. slurm: arguments of datatrove's SlurmPipelineExecutor; submits all passes and returns None.
    Raises ConfigError, CorruptInput, OutputExists, Incomplete (another process is at it), StorageError, VerificationFailed.
    """
    grades, output = grades or {}, Path(output).absolute()
    _check(inputs, spec, grades)
    # A study knows by its artifacts what is done; beside an output of its own, a note says what it was made from.
    note = output.with_name(f".{output.name}.made_from.json") if work is None else None
    work = Path(work or output.with_name(f".{output.name}.work")).absolute()
    sources = [
        Source(domain, file.absolute(), name, (json_keys or {}).get(domain, "text"))
        for domain, files in inputs.items()
        for file, name in zip(files, names_of(files), strict=True)
    ]
    tasks = {n: resolve_inputs(files, root) for n, files in (spec.contamination.tasks if spec.contamination else {}).items()}
    identity = fingerprint(_identity(sources, tasks, spec, grades, output, on_bad_document))
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if identity not in (_noted(note), _noted(work / IDENTITY)):
            raise OutputExists(
                f"{output} exists, and was not made from these inputs with these settings. Move it away or choose another "
                "output; nothing is overwritten."
            )
        _tidy(work, note, identity)  # jobs on SLURM may have made it, and this is the first look at it since
        return read_json(output / MANIFEST)
    with storage_errors(f"writing {output}"), _only_one(work):
        _begin(work, identity)
        with _quiet("datatrove.pipeline.dedup.exact_dedup"):  # which reminds of what plan does
            passes = plan(sources, tasks, spec, grades, work, output, on_bad_document)
        if slurm is not None:
            _submit(passes, work, slurm)
            return None
        try:
            with progress_bar("cleaning", len(passes), unit="passes", enabled=progress) as advance:
                for step in passes:
                    _Local(step.steps, step.tasks, min(step.tasks, workers), work / "logs" / step.name).run()
                    advance(1, info=step.name)
        finally:
            forget_models()
        _tidy(work, note, identity)
    report = read_json(output / MANIFEST)
    _warn_of_losses(report, output)
    _warn_of_what_is_too_short(report)
    return report


def _warn_of_losses(report: Mapping[str, Any], output: Path) -> None:
    """Say of which domains more than half of the documents are gone, and why: it may be a filter that does not suit them."""
    for domain, entry in report["domains"].items():
        counts = {reason: counts["documents"] for reason, counts in entry["removed"].items()}
        if 2 * sum(counts.values()) > entry["documents"]:
            reasons = ", ".join(f"{n} as {reason}" for reason, n in sorted(counts.items(), key=lambda c: -c[1]))
            warnings.warn(
                f"cleaning removed {sum(counts.values())} of {entry['documents']} documents of domain {domain!r}: {reasons}. "
                f"{output / 'removed'} has them; if they belong to the domain, leave that step out for it.",
                stacklevel=3,
            )


def _warn_of_what_is_too_short(report: Mapping[str, Any]) -> None:
    """Say where a step could look at little of what it was asked to look at: too few words for an n-gram."""
    settings = report["settings"]
    for task, counts in report.get("tasks", {}).items():
        if 2 * counts["too_short"] > counts["items"] or not counts["ngrams"]:
            warnings.warn(
                f"cleaning could not look for {counts['too_short']} of {counts['items']} items of task {task!r}: they have "
                f"fewer words than an n-gram ({settings['contamination']['ngram']}). Take shorter n-grams, or more fields.",
                stacklevel=3,
            )
    for domain, entry in report["domains"].items():
        short = entry.get("too_short", 0)
        if 2 * short > entry["documents"]:
            words = settings["near_duplicates"]["ngram"]
            warnings.warn(
                f"cleaning could not compare {short} of {entry['documents']} documents of domain {domain!r} for near "
                f"duplicates: they have fewer words than an n-gram ({words}). Take shorter n-grams.",
                stacklevel=3,
            )


def _check(inputs: Mapping[str, Sequence[Path]], spec: CleanSpec, grades: Grades) -> None:
    """All that can be known to be wrong before anything is read."""
    names = ", ".join(inputs)
    if "removed" in inputs:
        raise ConfigError("a domain cannot be called 'removed': the folder of that name holds what was removed.")
    if unknown := spec.unknown_domain(inputs):
        raise ConfigError(f"{unknown[0]}: {unknown[1]!r} is not one of {names}.")
    for domain, cuts in grades.items():
        if domain not in inputs:
            raise ConfigError(f"grades: {domain!r} is not one of {names}.")
        if spec.quality is None or domain not in (spec.quality.domains or inputs):
            raise ConfigError(f"grades: {domain!r} has no score; grades are cut from `quality`, which is not set for it.")
        _check_grades(domain, list(cuts.items()))
        if taken := [f"{domain}_{grade}" for grade in cuts if f"{domain}_{grade}" in inputs]:
            raise ConfigError(f"grades: {taken[0]!r} is a domain already.")
    if spec.perplexity:
        Perplexity(Path(), spec.perplexity).check()
    if spec.quality:
        Quality(Path(), spec.quality).check()


def _check_grades(domain: str, cuts: list[tuple[str, Cut | None]]) -> None:
    bounds = [cut for _, cut in cuts[:-1]]
    if not bounds or cuts[-1][1] is not None or any(cut is None for cut in bounds):
        raise ConfigError(f"grades of {domain!r}: expected two or more, each with a cut but the last, which is the rest.")
    known = [cut for cut in bounds if cut is not None]
    if len({cut.share for cut in known}) > 1:
        raise ConfigError(f"grades of {domain!r}: the cuts are partly shares and partly scores; use one kind.")
    values = [cut.value for cut in known]
    if known[0].share and sum(values) >= 1:
        raise ConfigError(f"grades of {domain!r}: the shares add up to {sum(values):.0%}, nothing is left for {cuts[-1][0]!r}.")
    if not known[0].share and values != sorted(set(values), reverse=True):
        raise ConfigError(f"grades of {domain!r}: the scores must fall from grade to grade, found {values}.")


def _identity(sources: list[Source], tasks: dict[str, list[Path]], spec: CleanSpec, *rest: Any) -> list[Any]:
    """What the bytes in the work folder depend on."""
    models = [path for _, path in spec.models()]
    files = [s.file for s in sources] + [f for found in tasks.values() for f in found] + models
    facts = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    return [REVISION, facts, [[s.domain, s.json_key] for s in sources], spec.model_dump(mode="json"), *rest]


def _begin(work: Path, identity: str) -> None:
    """An empty work folder, or the one of an interrupted cleaning of the same."""
    if _noted(work / IDENTITY) == identity:
        return
    for path in work.iterdir():
        if path.name != _LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_json(work / IDENTITY, identity)


def _noted(path: Path | None) -> str | None:
    return read_json(path) if path is not None and path.is_file() else None


def _tidy(work: Path, note: Path | None, identity: str) -> None:
    if note is not None:
        write_json(note, identity)
    shutil.rmtree(work, ignore_errors=True)


_LOCK = "lock"


@contextmanager
def _only_one(work: Path) -> Iterator[None]:
    """One process at a time in a work folder. Its workers die with it, so that nobody writes there when the lock is free."""
    own_folder(work)
    with open_lock(work / _LOCK) as file:
        take_lock(file, f"another process that cleans in {work}", wait_s=0)
        yield


@contextmanager
def _quiet(module: str) -> Iterator[None]:
    """Without what a module of datatrove's reports."""
    trove.logger.disable(module)
    try:
        yield
    finally:
        trove.logger.enable(module)


class _Local(trove.LocalPipelineExecutor):
    """datatrove's, with what its tasks report in their log files only, and with workers that die with their parent."""

    def __init__(self, steps: list[Any], tasks: int, workers: int, logs: Path) -> None:
        super().__init__(steps, tasks=tasks, workers=workers, logging_dir=str(logs))

    def run(self) -> Any:
        global _forking_workers
        _watch_forks()
        _forking_workers = True
        try:
            with _quiet(_EXECUTOR):
                return super().run()
        finally:
            _forking_workers = False

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        if self.workers > 1:
            trove.logger.disable(_EXECUTOR)
            die_with_parent(signal.SIGKILL)
        try:
            with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
                return super()._run_for_rank(rank, local_rank, node_rank)
        finally:
            trove.setup_default_logger()  # its last one writes to `nowhere`, which is closed


_EXECUTOR = "datatrove.executor.local"
_forking_workers = False


@cache
def _watch_forks() -> None:
    """The executor's queue lives in a process of its own, which would outlive a killed parent and keep its lock."""
    os.register_at_fork(after_in_child=lambda: die_with_parent(signal.SIGKILL) if _forking_workers else None)


def _submit(passes: list[Pass], work: Path, slurm: Mapping[str, Any]) -> None:
    """Each pass as a job array that starts when the one before has ended well."""
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        raise ConfigError("this is a task of a SLURM array; submit from outside of one.")
    if shutil.which("sbatch") is None:
        raise ConfigError("sbatch is not in PATH; submit from a machine that has SLURM's commands, or leave out --slurm.")
    settings: dict[str, Any] = {"env_command": f"export PATH={shlex.quote(str(_commands(work)))}:$PATH", "qos": None}
    # Without it, what waits for a pass that failed would wait for ever.
    settings |= {"sbatch_args": {"kill-on-invalid-dep": "yes"}} | dict(slurm)
    before = None
    for step in passes:
        try:
            before = _Slurm(
                step.steps,
                tasks=step.tasks,
                depends=before,
                job_name=f"clean_{step.name}",
                logging_dir=str(work / "logs" / step.name),
                **settings,
            )
        except TypeError as e:
            raise ConfigError(
                f"slurm: {e}. The settings are those of datatrove's SlurmPipelineExecutor; time and partition are needed."
            ) from e
    assert before is not None
    try:
        with _quiet("datatrove.executor.slurm"):
            before.run()
    except subprocess.CalledProcessError as e:
        raise ConfigError(f"sbatch refused ({e.stderr or e}); {work}/logs has the scripts.") from e


class _Slurm(trove.SlurmPipelineExecutor):
    """datatrove's, without a second job after each pass: its statistics are of no use here."""

    def launch_merge_stats(self) -> None:
        pass


def _commands(work: Path) -> Path:
    """A folder with the command that datatrove's jobs begin with, run by this Python wherever it has its scripts."""
    command = work / "bin" / "launch_pickled_pipeline"
    command.parent.mkdir(exist_ok=True)
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m datatrove.tools.{command.name} "$@"\n')
    command.chmod(0o755)
    return command.parent
