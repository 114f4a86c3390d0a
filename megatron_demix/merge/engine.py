"""Merging checkpoints on disk into checkpoints on disk: all mixtures from one read of the components."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from megatron_demix.artifact import remove_leftovers, remove_lock
from megatron_demix.checkpoint.collector import without_collector
from megatron_demix.checkpoint.maps import check_maps
from megatron_demix.checkpoint.output import Output, resolved
from megatron_demix.errors import ConfigError, CorruptInput, OutputExists, StorageError, VerificationFailed, storage_errors
from megatron_demix.merge.components import Components
from megatron_demix.merge.job import DTYPES, Dtype, Job, Layout
from megatron_demix.merge.methods import Linear, Method
from megatron_demix.merge.verify import Verify, verify_merge
from megatron_demix.merge.weights import Normalize, weight_matrix
from megatron_demix.native import BUFFERS_PER_THREAD, default_threads
from megatron_demix.progress import progress_bar
from megatron_demix.units import format_bytes

MAX_MEMORY = 256 << 20
# The tiles of all outputs together should stay in a second-level cache until they are written, but small writes are slow.
_TILES, _LARGEST_TILE, _SMALLEST_TILE = 2 << 20, 1 << 20, 64 << 10


def merge_checkpoints(
    components: Mapping[str, Path],
    mixtures: Mapping[str, Mapping[str, float]],
    output: Path,
    *,
    layout: Layout = "release",
    normalize: Normalize = "error",
    threads: int | None = None,
    progress: bool = True,
    verify: Verify = "sample",
    max_memory: int = MAX_MEMORY,
    max_chunk: int | None = None,
    worker: tuple[int, int] | None = None,
    into_output: bool = False,
    method: Method | None = None,
    dtype: Dtype | None = None,
) -> list[Path]:
    """Merge K component checkpoints into one checkpoint a mixture, at output/<mixture name>, and return those now published.

    Elements are summed in float32 and rounded once to the components' type, or to dtype. The result is a Megatron run's root
    (tracker and release/ or iter_*/) with the model only, and loads with a plain --load: optimizer and random state are not
    carried, consumed samples are zero, `_extra_state` and tensors of other types come from the first component.
    demix_merge.json says what was merged. Equal inputs give equal bytes, whatever the number of threads. A mixture that is
    already there is skipped.

    dtype: of what is written; components may then be of any of the three, each read as it is. Tensors that models of half
    precision have in float32 stay so. None: the components', which then have to be alike.
    method: what the weights mean (megatron_demix.merge.methods); None: a plain weighted average. layout: release starts at
    iteration 0; iter keeps the first component's iteration. max_chunk: cut tensors anew, into chunks of at most so many bytes
    and one layer or expert; None: as the first component is cut. worker (i, n): one of n processes that write together, on any
    machines with one file system: every n-th file from the i-th on, with all mixtures; who finds all files written verifies and
    publishes. Killed, the same or any other worker can be run again. into_output: write the only mixture to output itself.
    max_memory: bytes of buffers.
    Raises ConfigError, IncompatibleInputs, MixtureError, CorruptInput (damaged components, whose checksums are compared as they
    are read), OutputExists, VerificationFailed, StorageError; what is published is whole and verified.
    """
    with without_collector():
        merge = plan_merge(
            components,
            mixtures,
            output,
            layout=layout,
            normalize=normalize,
            max_chunk=max_chunk,
            worker=worker,
            into_output=into_output,
            method=method,
            dtype=dtype,
        )
        return write_merge(merge, threads=threads, progress=progress, verify=verify, max_memory=max_memory)


@dataclass(frozen=True)
class Merge:
    """A merge that could be written: its inputs fit one another, and nothing else is at its outputs."""

    job: Job
    targets: list[Path]
    """One an output, in the mixtures' order, as all lists here."""
    weights_MK: np.ndarray
    provenances: list[dict[str, Any]]
    worker: tuple[int, int] | None
    todo: list[int]
    """Which outputs were not published when this was planned."""

    def output(self, m: int) -> Output:
        return self.job.output(self.targets[m], self.provenances[m], self.worker)

    def is_published(self, m: int) -> bool:
        return self.job.is_published(self.targets[m], self.provenances[m])


def plan_merge(
    components: Mapping[str, Path],
    mixtures: Mapping[str, Mapping[str, float]],
    output: Path,
    *,
    layout: Layout = "release",
    normalize: Normalize = "error",
    max_chunk: int | None = None,
    worker: tuple[int, int] | None = None,
    into_output: bool = False,
    method: Method | None = None,
    dtype: Dtype | None = None,
    said: Mapping[str, Mapping[str, Any]] | None = None,
) -> Merge:
    """Check all of merge_checkpoints that needs no elements, and write nothing. Raises as it does.

    said: more plain facts for demix_merge.json, by mixture."""
    if layout not in get_args(Layout):
        raise ConfigError(f"layout is {layout!r}, expected one of {', '.join(get_args(Layout))}.")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}.")
    if into_output and len(mixtures) != 1:
        raise ConfigError(f"{len(mixtures)} mixtures cannot be written to {output} itself: give it one, or a folder for all.")
    if max_chunk is not None and max_chunk < 1:
        raise ConfigError(f"max_chunk is {max_chunk} bytes, expected at least 1.")
    if worker is not None and not 0 <= worker[0] < worker[1]:
        raise ConfigError(f"worker is {worker[0]} of {worker[1]}, expected 0 <= worker < number of workers.")
    method = method or Linear()
    parts = Components(method.sources(components))
    weights_MK = weight_matrix(mixtures, list(components), normalize)
    method.check_names(list(mixtures))
    targets = [resolved(Path(output) if into_output else Path(output) / name) for name in mixtures]
    _check_outside(targets, parts)
    if worker is None:
        check_maps(parts.num_files, f"the tensors of {len(parts.names)} components")
    job = Job(parts, layout, method.bind(parts), max_chunk, dtype, shared=worker is not None)
    provenances = [
        job.provenance(name, row, normalize) | dict((said or {}).get(name, {}))
        for name, row in zip(mixtures, weights_MK, strict=True)
    ]
    todo = [m for m, target in enumerate(targets) if not job.is_published(target, provenances[m])]
    merge = Merge(job, targets, weights_MK, provenances, worker, todo)
    job.take(worker, [merge.output(m) for m in todo])
    return merge


def check_means(merge: Merge, *, threads: int | None = None, max_memory: int = MAX_MEMORY) -> int:
    """That there are the memory, the open files, the disk and the permission to write it. Returns how many outputs may be made
    from one read. Raises ConfigError, StorageError."""
    per_pass = _outputs_per_pass(merge.job, threads or default_threads(), max_memory)
    _check_place([merge.targets[m] for m in merge.todo], merge.job)
    return per_pass


def write_merge(
    merge: Merge,
    *,
    threads: int | None = None,
    progress: bool = True,
    verify: Verify = "sample",
    max_memory: int = MAX_MEMORY,
) -> list[Path]:
    """Write and publish what is missing. Returns what is published then, by whomever. Raises as merge_checkpoints does."""
    if verify not in get_args(Verify):
        raise ConfigError(f"verify is {verify!r}, expected one of {', '.join(get_args(Verify))}.")
    threads = threads or default_threads()
    job, todo = merge.job, merge.todo
    _outputs_per_pass(job, threads, max_memory)  # before anything is touched
    _allow_open_files(_open_file_limit(job))
    parents = {target.parent for target in merge.targets}
    for parent in parents:
        with storage_errors(f"writing {parent}"):
            parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(parent)
    for m, target in enumerate(merge.targets):
        if m not in todo:
            remove_lock(target)
    per_pass = check_means(merge, threads=threads, max_memory=max_memory)  # with what the leftovers took
    if todo:
        plan = job.plan  # while a disk reads no more than is asked of it
        job.parts.start_read_ahead()
        job.method.prepare(plan, threads)
    for start in range(0, len(todo), per_pass):
        _write_together(merge, todo[start : start + per_pass], threads, max_memory, verify, progress)
    job.parts.leave_pages(threads)
    return [target for m, target in enumerate(merge.targets) if m not in todo or merge.is_published(m)]


def _write_together(merge: Merge, which: Sequence[int], threads: int, max_memory: int, verify: Verify, progress: bool) -> None:
    """Several outputs from one read."""
    job, outputs = merge.job, [merge.output(m) for m in which]
    recipe = job.method.recipe(merge.weights_MK[list(which)], [merge.provenances[m]["mixture"] for m in which])
    plan, placed = job.plan, job.tensor_placements
    try:
        for out in outputs:
            with out.turn():
                out.create(job.mine)
        shape_TM = (len(placed), len(outputs))
        descriptors_TM = np.array([[out.descriptors[p.file] for out in outputs] for p in placed], np.int64).reshape(shape_TM)
        direct_TM = np.array([[out.direct[p.file] for out in outputs] for p in placed], np.int64).reshape(shape_TM)
        offsets_T = [p.record_at for p in placed if p.record_at is not None]
        total = sum(plan.native.target_bytes) * len(outputs)
        with (
            storage_errors(f"writing {outputs[0].target.parent}"),
            progress_bar(
                f"merging {len(job.parts.names)} into {len(outputs)}", total, unit="bytes", enabled=progress
            ) as advance,
        ):
            outcome = plan.native.run(
                recipe.weights_SMK,
                deltas=recipe.deltas,
                descriptors_TM=descriptors_TM,
                direct_TM=direct_TM,
                offsets_T=offsets_T,
                threads=threads,
                tile_bytes=_tile_bytes(len(outputs), threads, max_memory),
                check_sources=True,
                shows_cached=all(checkpoint.shows_cached for checkpoint in job.parts.checkpoints),
                progress=_Increments(advance) if progress else None,
            )
        job.parts.check_still_there()
        if outcome["damaged"]:
            raise CorruptInput(
                f"{plan.record_name(outcome['damaged'][0])}: its bytes differ from their checksum. Copy or save the component "
                "again; nothing was published."
            )
        plan.warn_not_finite(outcome["not_finite"], np.flatnonzero(recipe.weights_SMK.any(axis=(0, 1))).tolist())
        crcs_TM = np.array(outcome["crcs"], np.uint64).reshape(shape_TM)
        for m, out, crcs_T in zip(which, outputs, crcs_TM.T, strict=True):
            out.complete(job.mine, crcs_T.tolist())
            with out.turn():
                _publish(merge, m, out, verify)
    except BaseException:
        for out in outputs:
            out.discard()
        raise


def _publish(merge: Merge, m: int, out: Output, verify: Verify) -> None:
    """An output, if all of its files are written, by whomever."""
    job, provenance = merge.job, merge.provenances[m]
    if merge.is_published(m):
        out.discard_all()
        return
    out.finish()
    if any(out.finished(p.file) is None for p in job.placements):
        return
    out.seal(job.placements, job.common, provenance, job.tracker, job.beside)
    try:
        expected = job.oracle.mixture(merge.weights_MK[m], provenance["mixture"])
        verify_merge(out.folder, job.parts, expected, verify, str(out.target))
    except VerificationFailed:
        job.parts.check_still_there()
        out.discard_all()
        raise
    job.parts.check_still_there()
    try:
        out.publish()
    except OutputExists:
        if not merge.is_published(m):
            raise
        out.discard_all()  # another process made the very same


class _Increments:
    """Turns bytes done so far into steps of a progress bar."""

    def __init__(self, advance: Any) -> None:
        self._advance, self._seen = advance, 0

    def __call__(self, done: int) -> None:
        self._advance(done - self._seen)
        self._seen = done


def _tile_bytes(num_outputs: int, threads: int, max_memory: int) -> int:
    wanted = min(_LARGEST_TILE, _TILES // num_outputs)
    return max(_SMALLEST_TILE, min(wanted, max_memory // (num_outputs * threads * BUFFERS_PER_THREAD)) // 4096 * 4096)


def _outputs_per_pass(job: Job, threads: int, max_memory: int) -> int:
    """As many outputs as the buffers' memory and the open files allow; more are made in further reads."""
    smallest = threads * BUFFERS_PER_THREAD * _SMALLEST_TILE
    if max_memory < smallest:
        raise ConfigError(
            f"--max-memory {format_bytes(max_memory)} is less than {threads} threads need ({format_bytes(smallest)})."
        )
    files, limit = _open_files_each(job), _open_file_limit(job)
    in_use = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 64
    if limit - in_use < files:
        raise ConfigError(
            f"one output takes {files} open files, but this process may open {max(0, limit - in_use)} more (limit: {limit}). "
            "Raise the limit (ulimit -n), or share the files among processes (--workers)."
        )
    return max(1, min(max_memory // smallest, (limit - in_use - 32) // files))


def _open_files_each(job: Job) -> int:
    """Of one output. Inputs are mapped, and not kept open."""
    return 2 * max(1, len({p.file for p in job.mine}))


def _open_file_limit(job: Job) -> int:
    """The limit on open files that a merge works under: this process's, raised as far as helps and it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _open_files_each(job) * 1024 + 256
    return max(soft, wanted if hard == resource.RLIM_INFINITY else min(wanted, hard))


def _allow_open_files(limit: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _check_outside(targets: Sequence[Path], parts: Components) -> None:
    """Raises ConfigError for an output within a component's checkpoint, which would be no longer what its run saved."""
    for checkpoint in parts.checkpoints:
        folder = Path(os.path.realpath(checkpoint.location.path))
        if inside := [target for target in targets if folder in target.parents]:
            raise ConfigError(f"output {inside[0]} lies within {folder}, which is merged. Choose a folder outside of it.")


def _check_place(targets: Sequence[Path], job: Job) -> None:
    """That outputs can be made where they are to lie, in folders that need not exist, on one disk or several (links may lead to
    others). Raises StorageError."""
    disks: dict[int, list[Path]] = {}
    for target in targets:
        folder = next(parent for parent in target.parents if parent.exists())
        if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
            raise StorageError(f"{folder}: nothing can be written there. Choose another place for the output.")
        disks.setdefault(folder.stat().st_dev, []).append(folder)
    for folders in disks.values():
        needed, free = len(folders) * job.bytes_each, shutil.disk_usage(folders[0]).free
        if needed > free:
            raise StorageError(
                f"{folders[0]}: {len(folders)} merged checkpoints of {format_bytes(job.bytes_each)} need "
                f"{format_bytes(needed)}, but {format_bytes(free)} are free. Free {format_bytes(needed - free)}, or choose "
                "another disk. Nothing was written."
            )
