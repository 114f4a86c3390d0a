"""Merging checkpoints on disk into checkpoints on disk: all mixtures from one read of the components."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from megatron_demix import __version__
from megatron_demix.artifact import fingerprint, remove_leftovers
from megatron_demix.checkpoint.common_state import merged_common_state
from megatron_demix.checkpoint.layout import iteration_folder
from megatron_demix.checkpoint.output import Output, is_published, resolved
from megatron_demix.checkpoint.pickles import write_pickle
from megatron_demix.checkpoint.run_config import RUN_CONFIG, merged_run_config
from megatron_demix.checkpoint.writer import CopiedItem, Placement, TensorItem, metadata_files, place
from megatron_demix.errors import ConfigError, CorruptInput, OutputExists, StorageError, VerificationFailed, storage_errors
from megatron_demix.merge.chunks import cut_anew
from megatron_demix.merge.components import Components, without_collector
from megatron_demix.merge.methods import BoundMethod, Linear, Method
from megatron_demix.merge.oracle_methods import Oracle, make_oracle
from megatron_demix.merge.plan import Box, BytePlan
from megatron_demix.merge.verify import Verify, verify_merge
from megatron_demix.merge.weights import Normalize, weight_matrix
from megatron_demix.native import BUFFERS_PER_THREAD, default_threads
from megatron_demix.progress import progress_bar
from megatron_demix.units import format_bytes

Layout = Literal["release", "iter"]
PROVENANCE = "demix_merge.json"

_MAX_MEMORY = 256 << 20
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
    max_memory: int = _MAX_MEMORY,
    max_chunk: int | None = None,
    worker: tuple[int, int] | None = None,
    into_output: bool = False,
    method: Method | None = None,
    said: Mapping[str, Mapping[str, Any]] | None = None,
    dry_run: bool = False,
) -> list[Path]:
    """Merge K component checkpoints into one checkpoint a mixture, at output/<mixture name>, and return those now published.

    Elements are summed in float32 and rounded once to the components' type. The result is a Megatron run's root (tracker and
    release/ or iter_*/) with the model only, and loads with a plain --load: optimizer and random state are not carried,
    consumed samples are zero, `_extra_state` and tensors of other types come from the first component. demix_merge.json says
    what was merged. Equal inputs give equal bytes, whatever the number of threads. A mixture that is already there is skipped.

    method: what the weights mean (megatron_demix.merge.methods); None: a plain weighted average. layout: release starts at
    iteration 0; iter keeps the first component's iteration. max_chunk: cut tensors anew, into chunks of at most so many bytes
    and one layer or expert; None: as the first component is cut. worker (i, n): one of n processes that write together, on any
    machines with one file system: every n-th file from the i-th on, with all mixtures; who finds all files written verifies and
    publishes. Killed, the same or any other worker can be run again. into_output: write the only mixture to output itself.
    max_memory: bytes of buffers. said: more plain facts for demix_merge.json, by mixture. dry_run: check all that needs no
    elements, write nothing, and return what would be published.
    Raises ConfigError, IncompatibleInputs, MixtureError, CorruptInput (damaged components, whose checksums are compared as they
    are read), OutputExists, VerificationFailed, StorageError; what is published is whole and verified.
    """
    for name, value, allowed in (("layout", layout, get_args(Layout)), ("verify", verify, get_args(Verify))):
        if value not in allowed:
            raise ConfigError(f"{name} is {value!r}, expected one of {', '.join(allowed)}.")
    if into_output and len(mixtures) != 1:
        raise ConfigError(f"{len(mixtures)} mixtures cannot be written to {output} itself: give it one, or a folder for all.")
    if max_chunk is not None and max_chunk < 1:
        raise ConfigError(f"max_chunk is {max_chunk} bytes, expected at least 1.")
    if worker is not None and not 0 <= worker[0] < worker[1]:
        raise ConfigError(f"worker is {worker[0]} of {worker[1]}, expected 0 <= worker < number of workers.")
    with without_collector():
        method = method or Linear()
        parts = Components(method.sources(components))
        weights_MK = weight_matrix(mixtures, list(components), normalize)
        method.check_names(list(mixtures))
        output = Path(output)
        targets = [resolved(output if into_output else output / name) for name in mixtures]
        _check_outside(targets, parts)
        job = _Job(parts, layout, method.bind(parts), max_chunk)
        provenances = [
            job.provenance(name, row, normalize) | dict((said or {}).get(name, {}))
            for name, row in zip(mixtures, weights_MK, strict=True)
        ]
        todo = [m for m, target in enumerate(targets) if not job.is_published(target, provenances[m])]
        job.take(worker, [job.output(targets[m], provenances[m], worker) for m in todo])
        threads = threads or default_threads()
        per_pass = _outputs_per_pass(job, threads, max_memory)
        if not dry_run:
            with storage_errors(f"writing {output}"):
                for parent in {target.parent for target in targets}:
                    parent.mkdir(parents=True, exist_ok=True)
                    remove_leftovers(parent)
        _check_place(targets[0].parent, job, len(todo))  # with what the leftovers took
        if dry_run:
            return [targets[m] for m in todo]
        if todo:
            plan = job.plan
            parts.start_read_ahead()
            job.method.prepare(plan, threads)
        for start in range(0, len(todo), per_pass):
            group = todo[start : start + per_pass]
            _merge_group(
                job,
                [job.output(targets[m], provenances[m], worker) for m in group],
                weights_MK[group],
                [provenances[m] for m in group],
                threads,
                _tile_bytes(len(group), threads, max_memory),
                verify,
                progress,
            )
        return [target for m, target in enumerate(targets) if m not in todo or target.exists()]


class _Job:
    """What all outputs of a merge have in common: targets, placement, copied items, common state."""

    def __init__(self, parts: Components, layout: Layout, method: BoundMethod, max_chunk: int | None) -> None:
        self.parts = parts
        self.max_chunk = max_chunk
        self.method = method
        first = parts.checkpoints[0]
        iteration = first.location.iteration
        self.common_state = parts.common_states[0]
        if layout == "iter" and iteration is None:
            iteration = self.common_state.get("iteration")
            if not isinstance(iteration, int) or iteration < 0:
                raise ConfigError(f"layout iter: {first.location.path} does not say its iteration. Use --layout release.")
        self.iteration = (iteration or 0) if layout == "iter" else 0
        self.folder = iteration_folder(self.iteration) if layout == "iter" else "release"
        self.tracker = str(self.iteration) if layout == "iter" else "release"
        self.placements = place(self._items())
        run_config = merged_run_config(first.location)
        self.carried = {} if run_config is None else {RUN_CONFIG: run_config}
        self.common, self.left_out = merged_common_state(self.common_state, self.iteration)
        self.mine = self.placements

    def output(self, target: Path, provenance: Mapping[str, Any], worker: tuple[int, int] | None) -> Output:
        return Output(
            target,
            self.folder,
            PROVENANCE,
            shared_key=None if worker is None else fingerprint({"folder": self.folder, **_identity(provenance)}),
        )

    def is_published(self, target: Path, provenance: Mapping[str, Any]) -> bool:
        """Whether this very merge is there, whatever its components were called. Raises OutputExists if anything else is."""
        return is_published(target, self.folder, provenance, PROVENANCE, _identity)

    def take(self, worker: tuple[int, int] | None, outputs: Sequence[Output]) -> None:
        """Leave out the files that other workers write, and those that are finished in all outputs."""
        if worker is None:
            return
        files = sorted({p.file for p in self.placements}, key=lambda file: (len(file), file))
        mine = {f for f in files[worker[0] :: worker[1]] if any(out.finished(f) is None for out in outputs)}
        self.mine = [p for p in self.placements if p.file in mine]

    @property
    def bytes_each(self) -> int:
        """That this process writes for each output."""
        return sum(p.length for p in self.mine)

    @cached_property
    def beside(self) -> dict[str, bytes]:
        """Files that all outputs have, but for those with tensors."""
        return metadata_files(self.placements) | self.carried

    @cached_property
    def oracle(self) -> Oracle:
        return make_oracle(self.parts, self.method)

    @property
    def tensor_placements(self) -> list[Placement]:
        """Of the files that this process writes."""
        return [p for p in self.mine if isinstance(p.item, TensorItem)]

    @cached_property
    def plan(self) -> BytePlan:
        """The byte plan, with one target for each tensor item in order."""
        plan = BytePlan(self.parts, self.method.partition)
        for p in self.tensor_placements:
            plan.add(Box(p.item.key, p.item.offset or (), p.item.shape, p.item.dtype or ""))
        return plan

    def provenance(self, name: str, weights: np.ndarray, normalize: Normalize) -> dict[str, Any]:
        """Plain facts that do not depend on when, where or by how many threads the merge was made."""
        carried = {file: blake2b(data, digest_size=16).hexdigest() for file, data in self.carried.items()}
        return {
            "format": 3,
            "software": f"megatron_demix {__version__}",
            "mixture": name,
            "method": self.method.describe(name),
            "normalize": normalize,
            "max_chunk": self.max_chunk,
            "weights": dict(zip(self.parts.names[: len(weights)], weights.tolist(), strict=True)),
            "components": {
                part: {"model": self._digest(k), "iteration": self.parts.checkpoints[k].location.iteration}
                for k, part in enumerate(self.parts.names)
            },
            "order": self.parts.names,  # sums, random streams and what is copied depend on it
            "copied_from_first": sorted({item.key for item in self._copied}),
            "copied_digest": self._copied_digest,
            "left_out": self.left_out,
            **({"carried": carried} if carried else {}),
        }

    @property
    def _copied(self) -> list[CopiedItem]:
        return [p.item for p in self.placements if isinstance(p.item, CopiedItem)]

    @cached_property
    def _copied_digest(self) -> str:
        """Of what no weights decide: the common state, and the items copied from the first component."""
        hashed = blake2b(write_pickle(dict(self.common)), digest_size=16)
        for item in self._copied:
            hashed.update(f"{item.key} {item.offset} {len(item.data)}".encode())
            hashed.update(item.data)
        return hashed.hexdigest()

    def _digest(self, k: int) -> str:
        if not hasattr(self, "_digests"):
            self._digests = [self.parts.digest(i) for i in range(len(self.parts.names))]
        return self._digests[k]

    def _items(self) -> list[TensorItem | CopiedItem]:
        """In the order the first component stores them, so that reading it is sequential; what is cut anew lies together."""
        first = self.parts.checkpoints[0]
        located: list[tuple[tuple, TensorItem | CopiedItem]] = []
        for info in self.parts.tensors.values():
            if self.max_chunk is None:
                for chunk in info.chunks:
                    item = TensorItem(info.key, info.dtype, info.shape, chunk.offset, chunk.shape)
                    located.append(((chunk.location.file, chunk.location.position), item))
            else:
                first_place = min((chunk.location.file, chunk.location.position) for chunk in info.chunks)
                for offset, shape in cut_anew(info, self.max_chunk):
                    located.append((first_place, TensorItem(info.key, info.dtype, info.shape, offset, shape)))
        for info in self.parts.copied.values():
            for chunk in info.chunks:
                data = first.sound_blob(chunk.location, info.key).data
                copied = CopiedItem(info.key, data, info.dtype, info.shape, chunk.offset, chunk.shape)
                located.append(((chunk.location.file, chunk.location.position), copied))
        for key, location in first.model_objects.items():
            located.append(((location.file, location.position), CopiedItem(key, first.sound_blob(location, key).data)))
        return [item for _, item in sorted(located, key=lambda entry: entry[0])]


def _identity(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance with the components' places in their order for their names. These are paths in the PATH:WEIGHT form, each
    spelled in many ways, and the bytes do not depend on them."""
    order = provenance.get("order")
    names = order if isinstance(order, list) else []
    places = {name: f"component {k}" for k, name in enumerate(names) if isinstance(name, str)}

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {places.get(key, key): replaced(part) for key, part in value.items()}
        return [replaced(part) for part in value] if isinstance(value, list) else value

    return {key: len(names) if key == "order" else replaced(value) for key, value in provenance.items()}


def _merge_group(
    job: _Job,
    outputs: list[Output],
    weights_MK: np.ndarray,
    provenances: list[dict[str, Any]],
    threads: int,
    tile_bytes: int,
    verify: Verify,
    progress: bool,
) -> None:
    plan, recipe = job.plan, job.method.recipe(weights_MK, [p["mixture"] for p in provenances])
    placed = job.tensor_placements
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
                tile_bytes=tile_bytes,
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
        for m, out in enumerate(outputs):
            out.complete(job.mine, crcs_TM[:, m].tolist())
            with out.turn():
                if job.is_published(out.target, provenances[m]):
                    out.discard_all()
                    continue
                out.finish()
                if any(out.finished(p.file) is None for p in job.placements):
                    continue
                out.seal(job.placements, job.common, provenances[m], job.tracker, job.beside)
                try:
                    expected = job.oracle.mixture(weights_MK[m], provenances[m]["mixture"])
                    verify_merge(out.folder, job.parts, expected, verify, str(out.target))
                except VerificationFailed:
                    job.parts.check_still_there()
                    out.discard_all()
                    raise
                job.parts.check_still_there()
                try:
                    out.publish()
                except OutputExists:
                    if not job.is_published(out.target, provenances[m]):
                        raise
                    out.discard_all()  # another process made the very same
    except BaseException:
        for out in outputs:
            out.discard()
        raise


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


def _outputs_per_pass(job: _Job, threads: int, max_memory: int) -> int:
    """As many outputs as the buffers' memory and the open files allow; more are made in further reads."""
    smallest = threads * BUFFERS_PER_THREAD * _SMALLEST_TILE
    if max_memory < smallest:
        raise ConfigError(
            f"--max-memory {format_bytes(max_memory)} is less than {threads} threads need ({format_bytes(smallest)})."
        )
    files = 2 * max(1, len({p.file for p in job.mine}))  # inputs are mapped, and not kept open
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = files * 1024 + 256
    if soft < wanted:
        soft = min(wanted, hard) if hard != resource.RLIM_INFINITY else wanted
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    in_use = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 64
    if soft - in_use < files:
        raise ConfigError(
            f"one output takes {files} open files, but this process may open {max(0, soft - in_use)} more (limit: {soft}). "
            "Raise the limit (ulimit -n), or share the files among processes (--workers)."
        )
    return max(1, min(max_memory // smallest, (soft - in_use - 32) // files))


def _check_outside(targets: Sequence[Path], parts: Components) -> None:
    """Raises ConfigError for an output within a component's checkpoint, which would be no longer what its run saved."""
    for checkpoint in parts.checkpoints:
        folder = Path(os.path.realpath(checkpoint.location.path))
        if inside := [target for target in targets if folder in target.parents]:
            raise ConfigError(f"output {inside[0]} lies within {folder}, which is merged. Choose a folder outside of it.")


def _check_place(folder: Path, job: _Job, num_outputs: int) -> None:
    """That outputs can be made in a folder, which need not exist. Raises StorageError."""
    while not folder.exists():
        folder = folder.parent
    if num_outputs and not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise StorageError(f"{folder}: nothing can be written there. Choose another place for the output.")
    needed = num_outputs * job.bytes_each
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StorageError(
            f"{folder}: {num_outputs} merged checkpoints of {format_bytes(job.bytes_each)} need {format_bytes(needed)}, but "
            f"{format_bytes(free)} are free. Free {format_bytes(needed - free)}, or choose another disk. Nothing was written."
        )
