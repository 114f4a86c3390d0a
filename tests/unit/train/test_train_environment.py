"""What is in the environment of a rank when torch is imported, and which GPU it takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_demix.errors import ConfigError
from megatron_demix.study.training import ParallelSpec
from megatron_demix.train.compat import cpu_compat

TOOL = Path(__file__).parents[3] / "tools" / "train_component.py"
SEEN = """
import os, runpy, sys

class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("seen", os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Stop())
kind, *sys.argv[1:] = sys.argv[1:]
if kind == "worker":
    runpy.run_module("megatron_demix.pipeline.worker", run_name="__main__", alter_sys=True)
else:
    runpy.run_path(kind, run_name="__main__")
"""


@pytest.mark.parametrize("kind", ["worker", str(TOOL)], ids=["worker", "tool"])
def test_kernels_of_ranks_that_talk_meanwhile_begin_in_order(tmp_path, make_train_job, kind):
    def seen(parallel, **own):
        path = tmp_path / "job.json"
        path.write_text(make_train_job(tmp_path, parallel=parallel).model_dump_json())
        environment = {k: v for k, v in os.environ.items() if k != "CUDA_DEVICE_MAX_CONNECTIONS"} | own
        command = [sys.executable, "-c", SEEN, kind, *([] if kind == "worker" else ["--job"]), str(path)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True).stdout

    assert seen({"data": 2}) == "seen None\n"
    assert seen({"tensor": 2}) == seen({"context": 2}) == "seen 1\n"
    assert seen({"tensor": 2}, CUDA_DEVICE_MAX_CONNECTIONS="8") == "seen 8\n"


def test_a_rank_without_a_gpu_of_its_own_is_refused(monkeypatch):
    with cpu_compat():
        from megatron_demix.train import model

        monkeypatch.setattr(model, "on_cpu", lambda: False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("LOCAL_RANK", "1")
        with pytest.raises(ConfigError, match="rank 1 of this machine has no GPU of its own: 1 are visible"):
            model.initialize_parallel(ParallelSpec(data=2), seed=1, timeout_s=60)
