#!/usr/bin/env python3
"""Train one model with megatron.core: torchrun --nproc-per-node N tools/train_component.py --job job.json

job.json is a megatron_demix.train.job.TrainJob. Starting again resumes. Exit codes: 0 done, 2 configuration, 3 incompatible
inputs, 7 corrupt input, 8 diverged or hung, 74 disk full, 75 stopped by a signal and saved (run again).
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", type=Path, required=True, help="JSON file of the run")
    arguments = parser.parse_args()
    from megatron_demix.train.job import TrainJob
    from megatron_demix.train.trainer import train

    warnings.simplefilter("ignore")  # megatron.core warns about every package it can do without
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        train(TrainJob.read(arguments.job))
    except DemixError as e:
        print(f"error (rank {os.environ.get('RANK', '0')}): {e}", file=sys.stderr, flush=True)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
