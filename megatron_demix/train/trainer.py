"""train(job): one training run from start, or from its newest good checkpoint, to end. Every rank calls it."""

from __future__ import annotations

import os

import torch

from megatron_demix.errors import ConfigError, StageFailed
from megatron_demix.train.compat import cpu_compat, on_cpu
from megatron_demix.train.job import TrainJob


def train(job: TrainJob) -> None:
    """Train `job` on the ranks torchrun started (one plain process will do for one rank): gloo on CPUs, nccl on GPUs.

    At the end job.work holds iter_<train_iters>/ (weights and optimizer, torch_dist), the tracker file and losses.jsonl. On a
    CPU their bytes depend on nothing but the job and the layout, however often the run was killed and resumed on the way; on
    GPUs that holds as far as the kernels themselves are deterministic.

    Raises ConfigError for what this machine cannot run, IncompatibleInputs, CorruptInput, StorageError, Diverged, StageFailed
    if another rank is lost, and Incomplete after SIGTERM or SIGUSR1, with everything saved.
    """
    check_machine(job)
    torch.set_num_threads(job.threads_per_rank)
    with cpu_compat():
        # Here and not above: on a CPU these import megatron.core at less than half the cost inside cpu_compat().
        from megatron_demix.train.loop import run
        from megatron_demix.train.model import parallel_groups

        try:
            # Collectives give up a little after the watchdog, which shows where each rank is.
            with parallel_groups(job.parallel, seed=job.seed, timeout_s=job.train.timeout + 60):
                run(job)
        except RuntimeError as e:
            if not (isinstance(e, torch.distributed.DistError) or "gloo" in str(e).lower()):
                raise
            raise StageFailed(
                f"run {job.name}: this rank lost the others ({str(e).splitlines()[0]}). One of them died, or the network: look "
                "for another rank's error. Run again to go on from the last checkpoint."
            ) from e


def check_machine(job: TrainJob) -> None:
    """Raises ConfigError naming the settings that need a GPU, where there is none."""
    if not on_cpu():
        return
    refused = {
        "parallel.context > 1 (needs Transformer Engine's attention)": job.parallel.context > 1,
        "parallel.sequence_parallel (the local layer spec's norms do not support it)": job.parallel.sequence_parallel,
    }
    if found := [what for what, asked in refused.items() if asked]:
        raise ConfigError(f"run {job.name}: there is no CUDA device, and on a CPU these cannot run: {'; '.join(found)}.")
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 and job.parallel.world_size > 1:
        raise ConfigError(f"run {job.name}: needs {job.parallel.world_size} ranks; start it with torchrun.")
