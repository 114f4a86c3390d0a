#!/usr/bin/env python3
"""Train one model with megatron.core. Starting the same command again resumes it.

  torchrun --nproc-per-node N tools/train_component.py --job job.json        (a megatron_demix.train.job.TrainJob)
  torchrun --nproc-per-node N tools/train_component.py --num-layers 4 ... --data-path 0.7 code 0.3 text --save runs/a

Exit codes: 0 done, 2 configuration, 3 incompatible inputs, 4 malformed blend, 7 corrupt input, 8 diverged or hung, 74 disk
full, 75 stopped by a signal and saved (run again). torchrun itself ends with 1 whatever its ranks ended with.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from pathlib import Path

from megatron_demix.errors import DemixError


def main() -> int:
    from megatron_demix.train.arguments import add_arguments, job_from_arguments
    from megatron_demix.train.job import TrainJob

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", type=Path, help="JSON file of the run, instead of all other flags")
    add_arguments(parser)
    arguments = parser.parse_args()
    world_size = int(os.environ.get("WORLD_SIZE", 1))

    warnings.simplefilter("ignore")  # megatron.core warns about every package it can do without
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        job = TrainJob.read(arguments.job) if arguments.job else job_from_arguments(arguments, world_size=world_size)
        # After the flags have been read: this imports torch, and --help should not.
        from megatron_demix.train.trainer import train

        train(job)
    except DemixError as e:
        print(f"error (rank {os.environ.get('RANK', '0')}): {e}", file=sys.stderr, flush=True)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
