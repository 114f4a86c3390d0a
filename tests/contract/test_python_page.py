"""The examples of docs/PYTHON.md, run in their order, on real checkpoints and data."""

import re
from pathlib import Path

import numpy as np
import pytest

from megatron_demix.checkpoint.reader import Checkpoint
from megatron_demix.indexed.reader import read_index
from megatron_demix.indexed.writer import IndexedWriter
from megatron_demix.train.compat import cpu_compat

PAGE = (Path(__file__).parents[2] / "docs" / "PYTHON.md").read_text(encoding="utf-8")
DOMAINS = ("general", "code", "math")


@pytest.fixture
def place(tmp_path, monkeypatch, make_train_job) -> Path:
    """What the page names: a checkpoint and indexed data of every domain, and three score tables."""
    with cpu_compat():
        from megatron_demix.train.trainer import train

        for seed, name in enumerate(DOMAINS):
            train(make_train_job(tmp_path, work=tmp_path / "ckpt" / name, seed=seed, train_iters=1))
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for name in DOMAINS:
        with IndexedWriter(tmp_path / "data" / name, np.dtype(np.uint16)) as writer:
            writer.add(rng.integers(0, 256, 10_000).astype(np.uint16), np.full(100, 100))
    for name in ("proxies", "references", "reseeded"):
        np.savez(tmp_path / f"{name}.npz", code=rng.random(8), math=rng.random(8))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_examples_run(place, make_train_job):
    job = make_train_job(place)
    with cpu_compat():
        from megatron_demix.train.model import build_model, parallel_groups

        with parallel_groups(job.parallel, seed=1, timeout_s=60):
            model = [build_model(job.model, job.train, job.parallel, job.vocab_size)]
            shown = {"model": model, "evaluate": first_norm, "measure": measure}
            for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
                exec(code, shown)
    # What was merged in place is what was merged on disk.
    for name in shown["mixtures"]:
        key = "decoder.final_layernorm.weight"
        on_disk = Checkpoint(place / "proxies" / name)
        (chunk,) = on_disk.model_tensors[key].chunks
        saved = on_disk.payload(on_disk.model_tensors[key], chunk)
        assert np.frombuffer(saved.record, np.float32, 1, saved.offset_bytes)[0] == np.float32(shown["losses"][name])
    assert shown["further_MD"].shape == (32, 3)
    assert shown["found"]["weights"]["code"] > 0.5
    assert read_index(place / "blend" / "found").num_tokens >= 20_000
    assert set(shown["report"]["ceiling"]["scores"]) == {"code", "math"}


def first_norm(model) -> float:
    return model[0].decoder.final_layernorm.weight[0].item()


def measure(mixtures: list[dict[str, float]]) -> dict[str, np.ndarray]:
    """Losses that fall with a domain's own share."""
    return {name: np.array([-np.log(0.1 + mixture[name]) for mixture in mixtures]) for name in ("code", "math")}
