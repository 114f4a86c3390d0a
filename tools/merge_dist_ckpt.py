#!/usr/bin/env python3
"""Merge Megatron distributed checkpoints (torch_dist) into weighted averages of their parameters.

  merge_dist_ckpt.py PATH:WEIGHT [PATH:WEIGHT ...] --output DIR
  merge_dist_ckpt.py --components name=PATH [name=PATH ...] --weights weights.jsonl --output DIR

The first form writes one checkpoint to DIR. The second reads the components once and writes one checkpoint a line of
weights.jsonl, {"name": "mix_0", "weights": {"general": 0.5, "code": 0.5}}, to DIR/<name>. A PATH is a run's root, an iter_* or
release folder. DIR loads with a plain --load.
"""

import os
import sys

from megatron_demix.merge.command import main

if __name__ == "__main__":
    # numpy is imported later. Nothing here needs its BLAS, whose threads cost as much processor time to start as all imports.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    sys.exit(main(description=__doc__))
