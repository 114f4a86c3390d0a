"""What each rank of a stage runs: `python -m megatron_demix.pipeline.worker JOB.json`, under torchrun where there are several.

Exit codes are those of errors.py; an error is printed once, by the rank that met it.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import IO

from megatron_demix.artifact import read_json
from megatron_demix.exits import rank_exit_code
from megatron_demix.locks import open_lock, take_lock
from megatron_demix.process import die_with_parent

_LOCK_WAIT_S = 30


def main() -> int:
    die_with_parent()
    warnings.filterwarnings("ignore")  # megatron.core warns about every package it can do without
    warnings.filterwarnings("default", module=r"megatron_demix\.")
    path = Path(sys.argv[1])
    held = open_lock(path.with_suffix(".lock"))  # as long as this process works
    return rank_exit_code(lambda: _work(path, held))


def _work(path: Path, held: IO) -> int:
    # If torchrun is killed, ranks that still save keep the next run waiting.
    take_lock(held, f"another process that works on {path}", wait_s=_LOCK_WAIT_S, shared=True)
    job = read_json(path)
    if job["kind"] == "train":
        from megatron_demix.train.derived import order_kernels
        from megatron_demix.train.job import TrainJob

        run = TrainJob.model_validate(job)
        order_kernels(run.parallel)
        from megatron_demix.train.trainer import train  # which imports torch

        train(run)
    elif job["kind"] == "megatron_lm":
        from megatron_demix.train.megatron_lm.run import StockJob, run_rank

        return run_rank(StockJob.model_validate(job), held)
    else:
        from megatron_demix.data.tokenizer import load_tokenizer
        from megatron_demix.evaluate.job import EvaluateJob, evaluate
        from megatron_demix.merge.proxies import ProxyMerger
        from megatron_demix.pipeline.merging import method_of

        evaluation = EvaluateJob.model_validate(job)
        method, threads = method_of(evaluation.merge, evaluation.base, evaluation.seed), evaluation.threads_per_rank
        evaluate(
            evaluation, lambda components, live: ProxyMerger(components, live, threads=threads, method=method), load_tokenizer
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
