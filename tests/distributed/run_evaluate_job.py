"""Scores a job (`run_evaluate_job.py JOB.json`) where only the first rank sees the rows that are there."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from unittest import mock

from megatron_demix.data.tokenizer import load_tokenizer
from megatron_demix.evaluate import job
from megatron_demix.merge.proxies import ProxyMerger
from megatron_demix.process import die_with_parent


def main() -> None:
    die_with_parent()
    with mock.patch.object(job, "_finished_rows", job._finished_rows if os.environ["RANK"] == "0" else lambda job: {}):
        job.evaluate(job.EvaluateJob.model_validate_json(Path(sys.argv[1]).read_text()), ProxyMerger, load_tokenizer)


if __name__ == "__main__":
    main()
