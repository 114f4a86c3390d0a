"""The command of one run with stock Megatron-LM: what its ranks are told, and the same as a shell script to read."""

from __future__ import annotations

import importlib.util
import math
import os
import shlex
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

from megatron_demix.artifact import write_json
from megatron_demix.checkpoint.layout import TRACKER, find_checkpoint
from megatron_demix.errors import ConfigError
from megatron_demix.study.training import ModelSpec, TrainerSpec
from megatron_demix.train.job import TrainJob
from megatron_demix.train.megatron_lm.arguments import data_arguments, own_arguments, pretrain_arguments
from megatron_demix.train.megatron_lm.checkout import Checkout
from megatron_demix.train.megatron_lm.run import StockJob

FROM_DATA = ("vocab-size", "null-tokenizer-eod-id", "mid-level-dataset-surplus")
"""Arguments that are known when the tokenizer and the data are there."""
_UNKNOWN = "..."


def prepare(job: TrainJob, trainer: TrainerSpec, files: Path, metrics: Path) -> StockJob:
    """All that a run needs, written beside `files` (of which the suffix is replaced): its data and, for reading, its script.

    Raises ConfigError where this machine cannot run it.
    """
    assert job.heartbeat is not None
    check_kept(job)
    transformer_engine = _transformer_engine(job.model, trainer)
    write_json(files.with_suffix(".data.json"), data_arguments(job))
    start, target = _start(job.init_checkpoint, files)
    if start and target:
        start.mkdir(parents=True, exist_ok=True)
        (start / "release").unlink(missing_ok=True)
        (start / "release").symlink_to(target, target_is_directory=True)
        (start / TRACKER).write_text("release")
    command, environment = _command(job, trainer, files, start, transformer_engine=transformer_engine)
    files.with_suffix(".sh").write_text(_as_script(job, command, environment))
    return StockJob(
        name=job.name,
        command=command,
        environment=environment,
        train=job.train,
        train_iters=job.train_iters,
        keep=job.keep,
        work=job.work,
        metrics=metrics,
        heartbeat=job.heartbeat,
    )


def check_kept(job: TrainJob) -> None:
    """Raises ConfigError where a checkpoint has to stay that Megatron-LM would not save."""
    for iteration in job.keep:
        if iteration % job.train.save_interval:
            raise ConfigError(
                f"run {job.name}: the checkpoint of iteration {iteration} has to stay (component.average or "
                f"search.extrapolate), but Megatron-LM "
                f"saves every {job.train.save_interval}. Set train.save_interval to {math.gcd(*job.keep)}, or train with "
                "trainer.backend: megatron_core."
            )


def shown_command(job: TrainJob, trainer: TrainerSpec, files: Path, *, unknown: Collection[str] = ()) -> str:
    """What prepare() will write as a script; nothing is written. unknown: options whose values are shown as three dots."""
    check_kept(job)
    start = job.init_checkpoint if unknown else _start(job.init_checkpoint, files)[0]
    engine = job.model.transformer_impl != "local"
    return _as_script(job, *_command(job, trainer, files, start, transformer_engine=engine), unknown=unknown)


def _command(
    job: TrainJob, trainer: TrainerSpec, files: Path, start: Path | None, *, transformer_engine: bool
) -> tuple[list[str], dict[str, str]]:
    """(command of every rank, what it needs in the environment)."""
    assert trainer.checkout is not None
    checkout = Checkout.open(trainer.checkout)
    arguments = pretrain_arguments(
        job,
        own_arguments(trainer.args),
        data=files.with_suffix(".data.json"),
        start=start,
        version=checkout.version,
        transformer_engine=transformer_engine,
    )
    environment = {
        "PYTHONPATH": os.pathsep.join([str(checkout.path), *filter(None, [os.environ.get("PYTHONPATH")])]),
        # Megatron-LM refuses tensor and context parallelism without it, on devices before Blackwell.
        "CUDA_DEVICE_MAX_CONNECTIONS": os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "1"),
    }
    return [sys.executable, str(checkout.script(trainer.script)), *arguments], environment


def _as_script(job: TrainJob, command: list[str], environment: Mapping[str, str], *, unknown: Collection[str] = ()) -> str:
    _, script, *arguments = command
    lines: list[str] = []
    hidden = False
    for word in arguments:
        if word.startswith("--"):
            lines.append(word)
            hidden = word[2:] in unknown
        else:
            lines[-1] += f" {_UNKNOWN if hidden else shlex.quote(word)}"
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    torchrun = f"torchrun --nproc-per-node {job.parallel.world_size} {shlex.quote(script)}"
    return "\n".join(["#!/bin/bash", f"# {job.name}", *exports, " \\\n    ".join([f"exec {torchrun}", *lines]), ""])


def _transformer_engine(model: ModelSpec, trainer: TrainerSpec) -> bool:
    """Which layers `transformer_impl` means on this machine. Raises ConfigError where stock Megatron-LM cannot run at all."""
    import torch

    if not torch.cuda.is_available() and not trainer.script.is_absolute():
        raise ConfigError(
            "trainer.backend is megatron_lm, which needs a CUDA device, and there is none. Submit the study to a machine that "
            "has one, or set trainer.backend: megatron_core, which trains small models on CPUs."
        )
    if model.transformer_impl != "auto":
        return model.transformer_impl == "transformer_engine"
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def _start(checkpoint: Path | None, files: Path) -> tuple[Path | None, Path | None]:
    """(what --pretrained-checkpoint takes, target): the checkpoint's root, if the tracker there names it; else a folder of our
    own that needs a tracker and, as its release, a link to the target."""
    if checkpoint is None:
        return None, None
    found = find_checkpoint(checkpoint)
    tracker = found.root / TRACKER
    name = "release" if found.kind == "release" else str(found.iteration)
    if tracker.is_file() and tracker.read_text(errors="replace").strip() == name:
        return found.root.resolve(), None
    return files.with_suffix(".start"), found.path.resolve()
