"""The GPU benchmark's plumbing, on the CPU: every step runs, and without a GPU it measures nothing."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setenv("MEGATRON_DEMIX_CUDA", "auto")  # put back afterwards: the benchmark sets it
    import merge_gpu

    yield merge_gpu
    for name in ("merge_gpu", "merge_inputs"):
        sys.modules.pop(name, None)


def test_every_step_runs(benchmark, tmp_path):
    assert benchmark.main(["--dry-run", "--output", str(tmp_path / "results"), "--work", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "results" / "merge_gpu_dry_run.json").read_text())
    assert "not a measurement" in result["card"]
    assert [(r["components"], r["mixtures"]) for r in result["kernel"]] == [(k, m) for k in (2, 4, 7, 16) for m in (1, 8, 32)]
    assert result["proxies"]["in_place_by"] == "the CPU"
    assert (tmp_path / "results" / "merge_gpu_dry_run.png").stat().st_size > 1000


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(benchmark, tmp_path, capsys, monkeypatch):
    assert benchmark.main(["--output", str(tmp_path / "results")]) == 2
    assert "no CUDA device is visible to torch. Nothing was measured" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
