#!/usr/bin/env python3
"""Train one model with megatron.core. Starting the same command again resumes it.

Takes those of Megatron-LM's flags that --help lists, and refuses others, such as --bf16 (the default; --precision fp32 is the
other) and --ckpt-format (always torch_dist). A flag that is left out has this project's default and not Megatron's: adam-beta2
0.95, weight-decay 0.1, cosine decay after 1 % of warm-up, no dropout, RMSNorm, swiglu (its width rounded up to a multiple of
64, not down), rope, no biases, experts balanced by an auxiliary loss times 0.01.

With the same flags the steps are Megatron-LM's, to rounding and to which values dropout drops, but for two flags:
--lr-warmup-fraction is rounded to whole iterations, and --make-vocab-size-divisible-by is not multiplied by the tensor
parallelism, so that layouts agree. WSD decays linearly over the last 20 % (--lr-wsd-decay-style linear, and
--lr-wsd-decay-iters). Every evaluation reads the same samples.

  ranks="python -m megatron_demix.launch.ranks --standalone --nproc-per-node N"
  $ranks tools/train_component.py --job job.json        (a megatron_demix.train.job.TrainJob)
  $ranks tools/train_component.py --num-layers 4 ... --data-path 0.7 code 0.3 text --save runs/a

launch.ranks is torchrun, takes its arguments, and ends with its ranks' exit code; plain torchrun works, too, but ends with 1
whatever its ranks ended with, and kills those that still save 30 s after a signal.

Exit codes: 0 done, 2 configuration, 3 incompatible inputs, 4 malformed blend, 7 corrupt input, 8 hung, or a checkpoint cannot
be read now (run again), 9 diverged, 74 disk full, 75 stopped by a signal and saved, or another run still writes into the same
folder (run again).
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from pathlib import Path

from megatron_demix.errors import storage_errors
from megatron_demix.exits import rank_exit_code
from megatron_demix.locks import open_lock, take_lock
from megatron_demix.process import die_with_parent

_LOCK_WAIT_S = 60


def main() -> int:
    from megatron_demix.train.arguments import add_arguments, job_from_arguments
    from megatron_demix.train.derived import order_kernels
    from megatron_demix.train.job import TrainJob

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", type=Path, help="JSON file of the run, instead of all other flags")
    add_arguments(parser)
    arguments = parser.parse_args()
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if "TORCHELASTIC_RUN_ID" in os.environ:  # one plain process may outlive the shell that started it (nohup)
        die_with_parent()

    warnings.simplefilter("ignore")  # megatron.core warns about every package it can do without
    logging.basicConfig(level=logging.WARNING, format="%(message)s")

    def run() -> int:
        job = TrainJob.read(arguments.job) if arguments.job else job_from_arguments(arguments, world_size=world_size)
        order_kernels(job.parallel)
        # After the flags have been read: this imports torch, and --help should not.
        from megatron_demix.train.trainer import train

        work = job.work.resolve()
        with storage_errors(f"making {work.parent}"):
            work.parent.mkdir(parents=True, exist_ok=True)
            held = open_lock(work.with_name(f".{work.name}.lock"))  # as long as this process works
        if os.environ.get("RANK", "0") == "0":
            # If torchrun is killed, ranks that still save keep the next run waiting.
            take_lock(held, f"another run that writes into {job.work}", wait_s=_LOCK_WAIT_S)
        train(job)
        return 0

    return rank_exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
