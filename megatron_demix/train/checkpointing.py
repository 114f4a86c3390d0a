"""Checkpoints of a run: torch_dist folders in Megatron's layout, published by rename, verified before they are resumed from.

    work/iter_0000500/{.metadata, __0_0.distcp, ..., common.pt, metadata.json, checksums.json}
    work/latest_checkpointed_iteration.txt

Two runs that do the same work write the same bytes: no path, time or random id gets into a checkpoint. What data-parallel ranks
all hold is shared out over them: each writes, and reads, its part. Folders without checksums.json are another program's, and
never removed.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from megatron_demix.artifact import Manifest, hash_file, write_atomic, write_json
from megatron_demix.checkpoint.layout import METADATA, TRACKER, iteration_folder, iterations_in
from megatron_demix.errors import (
    ConfigError,
    CorruptInput,
    IncompatibleInputs,
    StageFailed,
    StorageError,
    storage_errors,
)
from megatron_demix.train import torch_dist
from megatron_demix.train.common_state import (
    blend_without_paths,
    changed_settings,
    megatron_args,
    rng_state,
    same_rng_layout,
    set_rng_state,
    start_without_path,
    without_identity,
)
from megatron_demix.train.derived import wsd_decay_iters
from megatron_demix.train.job import TrainJob
from megatron_demix.train.optimizer import loading, use_fused_kernel
from megatron_demix.train.torch_dist import first_line

logger = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"
_UNFINISHED, _DAMAGED, _OLD = ".unfinished-", ".damaged-", ".old-"


class Checkpoints:
    """Saves and resumes one run. All ranks call save() and resume() together; `work` is on storage that all of them see."""

    def __init__(
        self,
        job: TrainJob,
        model: GPTModel,
        optimizer: MegatronOptimizer,
        schedule: OptimizerParamScheduler,
    ) -> None:
        """model: the GPTModel without wrappers."""
        self._job, self._model, self._optimizer, self._schedule = job, model, optimizer, schedule
        self._rank, self._num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._blend = blend_without_paths(job)
        self._start = self._gather(start_without_path(job) if self._rank == 0 else None)[0]

    def save(self, iteration: int) -> Path:
        """Publish the state after `iteration` steps, then drop all but the newest keep_checkpoints and job.keep. Raises
        StorageError."""
        target = self._folder(iteration)
        unfinished = _beside(target, _UNFINISHED)
        with self._writing(target, unfinished):
            torch_dist.write(self._state(iteration), unfinished)
            torch.distributed.barrier()
            files = self._checksums(unfinished)
            if self._rank == 0:
                write_json(unfinished / CHECKSUMS, files)
                os.rename(unfinished, target)
                write_atomic(self._job.work / TRACKER, str(iteration))
                older = [i for i in iterations_in(self._job.work) if i < iteration and i not in self._job.keep]
                self._drop(older[: 1 - self._job.train.keep_checkpoints])
                for damaged in self._job.work.glob(f"{_DAMAGED}*"):
                    if damaged.name <= f"{_DAMAGED}{target.name}":
                        shutil.rmtree(damaged, ignore_errors=True)
        torch.distributed.barrier()
        return target

    @contextmanager
    def _writing(self, target: Path, unfinished: Path) -> Iterator[None]:
        """An empty folder to write into; on an error it is removed again, and a disk's refusal becomes StorageError."""
        try:
            with storage_errors(f"writing {target}"):
                if self._rank == 0:
                    shutil.rmtree(unfinished, ignore_errors=True)
                    unfinished.mkdir(parents=True)
                torch.distributed.barrier()
                yield
        except BaseException as e:
            if self._rank == 0:
                shutil.rmtree(unfinished, ignore_errors=True)
            if torch_dist.is_writing_failed(e):
                raise StorageError(
                    f"writing {target}: the disk takes no more ({first_line(e)}). Free space or choose another disk, then run "
                    "again; nothing that was finished is lost."
                ) from e
            raise

    def resume(self) -> int:
        """Restore the newest sound checkpoint; its iteration, or 0 in a folder that has none. Damaged ones are named in a
        warning, and set aside once an older one has been restored, until the run has saved a newer one.

        Raises ConfigError where another program has saved here, CorruptInput where all checkpoints are damaged, StageFailed
        where one cannot be read now.
        """
        damaged: dict[int, str] = {}
        for iteration in reversed(self._agreed_iterations()):
            folder = self._folder(iteration)
            if problem := self._problem(folder):
                damaged[iteration] = problem
                if self._rank == 0:
                    logger.warning("checkpoint %s is damaged: %s. Going back to the one before.", folder, problem)
                continue
            self._load(folder)
            if self._rank == 0:
                with storage_errors(f"setting damaged checkpoints in {self._job.work} aside"):
                    for number in damaged:
                        _rename_over(self._folder(number), _beside(self._folder(number), _DAMAGED))
            return iteration
        if damaged:
            raise CorruptInput(
                f"run {self._job.name}: no checkpoint in {self._job.work} is sound: {'; '.join(damaged.values())}. "
                "Restore one from a copy, or delete the folder to train again from the start."
            )
        return 0

    def finish(self) -> None:
        """Remove every checkpoint but the newest keep_at_end and those of job.keep, and what killed runs left."""
        last = self._job.train_iters
        if self._rank == 0:
            others = [i for i in iterations_in(self._job.work) if i not in self._job.keep or i == last]
            self._drop(others[: -self._job.keep_at_end])
            for name in (_UNFINISHED, _DAMAGED, _OLD):
                for left in self._job.work.glob(f"{name}*"):
                    shutil.rmtree(left, ignore_errors=True)
            write_atomic(self._job.work / TRACKER, str(last))
        torch.distributed.barrier()

    def _folder(self, iteration: int) -> Path:
        return self._job.work / iteration_folder(iteration)

    def _drop(self, iterations: list[int]) -> None:
        """Renamed first: killed in the middle, a folder without its checksums would look like another program's."""
        for iteration in iterations:
            folder = self._folder(iteration)
            if _is_of_this_trainer(folder):
                with suppress(OSError):
                    _rename_over(folder, _beside(folder, _OLD))
                shutil.rmtree(_beside(folder, _OLD), ignore_errors=True)

    def _state(self, iteration: int, *, loading: bool = False) -> dict[str, Any]:
        """What a checkpoint holds, under the names Megatron-LM uses."""
        model = self._model.sharded_state_dict(metadata=torch_dist.content())
        state = {
            "args": megatron_args(self._job, iteration, self._blend, self._start),
            "checkpoint_version": 3.0,
            "iteration": iteration,
            "num_floating_point_operations_so_far": 0,
            "model": model,
            "optimizer": self._optimizer.sharded_state_dict(
                {"model": model}, is_loading=loading, metadata=torch_dist.content()
            ),
            "opt_param_scheduler": self._schedule.state_dict(),
            "rng_state": rng_state(),
        }
        return without_identity(state)

    def _load(self, folder: Path) -> None:
        with loading(self._optimizer):
            common = dist_checkpointing.load_common_state_dict(str(folder))
            saved = common["args"]
            # Nothing that it began with is named, or it is gone: it is no longer needed.
            if self._start is None or self._job.init_checkpoint is None:
                self._start = getattr(saved, "demix_start", None)
            state = self._state(0, loading=True)
            if said := changed_settings(saved, state["args"]):
                raise IncompatibleInputs(
                    f"run {self._job.name}: {folder} was trained with {said}. Resuming it would be neither run: set that back, "
                    f"choose another folder, or delete {self._job.work} to train again from the start."
                )
            self._check_optimizer(folder, common["optimizer"])
            self._check_schedule(folder, common["opt_param_scheduler"])
            if saved.train_iters != self._job.train_iters and self._rank == 0:
                logger.warning(
                    "run %s: %s was trained with train_iters %s, and goes on with %s. A source that is read for more than one "
                    "epoch is in another order from here on: samples it has seen may come again early, others late or never.",
                    *(self._job.name, folder, saved.train_iters, self._job.train_iters),
                )
            same_layout = same_rng_layout(saved, state["args"])
            if not same_layout:
                del state["rng_state"]
            try:
                loaded = torch_dist.read(state, folder)
            except (CheckpointException, CheckpointingException) as e:
                raise IncompatibleInputs(f"run {self._job.name}: cannot resume from {folder}: {first_line(e)}") from e
            self._model.load_state_dict(loaded["model"], strict=True)
            self._optimizer.load_state_dict(loaded["optimizer"])
        use_fused_kernel(self._optimizer)
        self._schedule.load_state_dict(loaded["opt_param_scheduler"])
        if same_layout:
            set_rng_state(loaded["rng_state"][0])

    def _check_optimizer(self, folder: Path, saved: Mapping[str, Any]) -> None:
        """Raises IncompatibleInputs where megatron.core made the optimizer of another package when this was saved: it takes
        Transformer Engine's or apex's AdamW where one can be imported, and torch's keeps its steps elsewhere."""
        before, now = ("amsgrad" in group for group in (_a_group(saved), self._optimizer.param_groups[0]))
        if before != now:
            te = "Transformer Engine (or apex)"
            raise IncompatibleInputs(
                f"run {self._job.name}: {folder} was trained with the AdamW of {'torch' if before else te}, and this process "
                f"has that of {'torch' if now else te}, which cannot go on from its state. Run where {te} is "
                f"{'not ' if before else ''}installed, choose another folder, or delete {self._job.work} to train again from "
                "the start."
            )

    def _check_schedule(self, folder: Path, saved: Mapping[str, Any]) -> None:
        """Raises IncompatibleInputs where the schedule that was saved has another length, and the learning rate would jump."""
        if self._job.override_opt_param_scheduler:
            return
        batch = self._job.train.global_batch_size
        now, before = copy.copy(self._schedule), copy.copy(self._schedule)
        now.num_steps = before.num_steps = saved["num_steps"]
        before.lr_warmup_steps, before.lr_decay_steps = saved["lr_warmup_steps"], saved["lr_decay_steps"]
        before.wsd_decay_steps = wsd_decay_iters(before.lr_decay_steps // batch) * batch
        if not math.isclose(before.get_lr({}), now.get_lr({}), rel_tol=1e-6):
            lengths = [
                f"{s.lr_decay_steps // batch} iterations, {s.lr_warmup_steps // batch} of warm-up" for s in (before, now)
            ]
            raise IncompatibleInputs(
                f"run {self._job.name}: {folder} was trained on a schedule of {lengths[0]}, and this one has {lengths[1]}: the "
                f"next learning rate would be {now.get_lr({}):.3g}, not {before.get_lr({}):.3g}. Set train_iters back, choose "
                "another folder, or go on with --override-opt-param-scheduler."
            )

    def _checksums(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Size and digest of every file, as a Manifest holds them. Each rank reads, and makes durable, its share.

        Shares of what all ranks see together: another node's view of a network file system may lag, and each would leave out
        other files.
        """
        mine = {}
        seen = set().union(*self._gather([path.name for path in folder.iterdir()]))
        for name in sorted(seen)[self._rank :: self._num_ranks]:
            path = folder / name
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            mine[name] = {"bytes": path.stat().st_size, "blake2b": hash_file(path)}
        return dict(sorted((name, facts) for part in self._gather(mine) for name, facts in part.items()))

    def _problem(self, folder: Path) -> str | None:
        """The first thing wrong with a checkpoint on disk, found by all ranks together; None if it is sound. Raises StageFailed
        where the disk does not say: a network file system may be back in a minute."""
        damaged, unreadable = [], []
        try:
            files = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
            mine = dict(sorted(files.items())[self._rank :: self._num_ranks])
            for name in mine:
                with suppress(FileNotFoundError, NotADirectoryError):
                    (folder / name).stat()  # some versions of Python take what cannot be looked at for missing
            damaged = Manifest("", "checkpoint", {}, mine).problems(folder, digests=True)
        except OSError as e:
            unreadable = [f"{e.filename or folder} ({e.strerror or e})"]
        except (ValueError, AttributeError, KeyError, TypeError) as e:
            damaged = [f"{folder / CHECKSUMS}: not readable as JSON ({e})"]
        found = self._gather((damaged, unreadable))
        if said := next((text for _, part in found for text in part), None):
            raise StageFailed(
                f"run {self._job.name}: {said} cannot be read, so nobody knows whether it is damaged. Run again when it "
                f"can; or delete {folder}, and the run goes on from the one before."
            )
        return next((problem for part, _ in found for problem in part), None)

    def _agreed_iterations(self) -> list[int]:
        """Rank 0's listing: another node's view of a network file system may lag. Raises ConfigError where another program has
        saved here."""
        found, release = iterations_in(self._job.work), self._job.work / "release"
        iterations = [i for i in found if _is_of_this_trainer(self._folder(i)) or (self._folder(i) / METADATA).exists()]
        if self._rank == 0 and len(iterations) < len(found):
            unfinished = [str(self._folder(i)) for i in found if i not in iterations]
            logger.warning("run %s: %s: half of a checkpoint, passed over.", self._job.name, ", ".join(unfinished))
        foreign = [str(folder) for i in iterations if not _is_of_this_trainer(folder := self._folder(i))]
        foreign += [str(release)] if release.exists() else []
        iterations, foreign = self._gather((iterations, foreign))[0]
        if foreign:
            raise ConfigError(
                f"run {self._job.name}: {foreign[0]} was not written by this trainer, whose checkpoints have a "
                f"{CHECKSUMS}. Choose another folder to save in (--save); --load may name this one. Or delete it, if this run "
                "was killed while removing it."
            )
        return iterations

    def _gather(self, mine: Any) -> list[Any]:
        if self._num_ranks == 1:
            return [mine]
        everyone: list[Any] = [None] * self._num_ranks
        torch.distributed.all_gather_object(everyone, mine)
        return everyone


def _a_group(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """A parameter group of an optimizer's common state, which may be that of several optimizers."""
    inner = saved.get("optimizer", saved)
    return inner["param_groups"][0] if "param_groups" in inner else _a_group(inner[min(inner)])


def _is_of_this_trainer(folder: Path) -> bool:
    """Whether a checkpoint holds what this trainer puts into each, or cannot be looked at now."""
    try:
        (folder / CHECKSUMS).stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def _beside(folder: Path, prefix: str) -> Path:
    """A hidden name for a checkpoint that is none, or none any more."""
    return folder.with_name(f"{prefix}{folder.name}")


def _rename_over(folder: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    os.rename(folder, target)
