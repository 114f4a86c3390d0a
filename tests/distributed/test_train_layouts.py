"""Every layout trains the same model: real torchrun, four gloo ranks, each launch under a hard time limit."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_demix.artifact import hash_file
from megatron_demix.checkpoint.reader import is_model_key
from megatron_demix.train.job import TrainJob
from megatron_demix.train.losses import read_losses
from megatron_demix.train.trainer import train

TIME_LIMIT_S = 600
ITERATIONS = 6
LAYOUTS = {
    "tp2pp2": {"tensor": 2, "pipeline": 2},
    "tp2dp2": {"tensor": 2, "data": 2},
    "pp2dp2": {"pipeline": 2, "data": 2},
}
MODEL = {"qk_layernorm": True}


def losses_of(job: TrainJob) -> list[float]:
    return [row["lm loss"] for row in read_losses(job.work / "losses.jsonl")]


def torchrun(plan: dict, folder: Path) -> str:
    path = folder / "plan.json"
    path.write_text(json.dumps(plan))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    command += [str(Path(__file__).with_name("run_train_jobs.py")), str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    process = subprocess.run(
        command, env=environment, timeout=TIME_LIMIT_S, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert process.returncode == 0, process.stdout[-6000:]
    return process.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory, make_train_job):
    """One rank's base and reference in this process, then all layouts in one launch."""
    folder = tmp_path_factory.mktemp("layouts")
    base = make_train_job(folder / "base", name="base", model=MODEL, train_iters=2)
    train(base)
    # A constant rate: the runs that go on beyond ITERATIONS below are to learn something there.
    settings = {"lr_decay_style": "constant"}
    common = {"model": MODEL, "train": settings, "train_iters": ITERATIONS, "init_checkpoint": base.work}
    jobs = {"reference": make_train_job(folder / "reference", name="reference", **common)}
    train(jobs["reference"])
    for name, parallel in LAYOUTS.items():
        own = settings | ({"recompute_granularity": "full"} if name == "tp2dp2" else {})
        jobs[name] = make_train_job(folder / name, name=name, parallel=parallel, **common | {"train": own})
    jobs["sharded_optimizer"] = make_train_job(
        folder / "sharded_optimizer",
        name="sharded_optimizer",
        parallel={"data": 4},
        **common | {"train": settings | {"use_distributed_optimizer": True}},
    )
    moe = {"num_experts": 4, "moe_ffn_hidden_size": 32}
    jobs["experts"] = make_train_job(
        folder / "experts", name="experts", parallel={"data": 4, "expert": 2}, model=moe, train_iters=ITERATIONS
    )
    live = folder / "live"
    live.mkdir()
    spread = [job for name, job in jobs.items() if name != "reference"]
    plan = {
        "jobs": [job.model_dump(mode="json") for job in spread],
        "stop": {"pp2dp2": 4, "sharded_optimizer": 4, "experts": 4},
        "live": {"tp2pp2": str(live)},
        "slow": "tp2dp2",
    }
    return jobs, live, torchrun(plan, folder)


@pytest.mark.parametrize("name", [*LAYOUTS, "sharded_optimizer"])
def test_layouts_have_the_loss_curve_of_one_rank(runs, name):
    """Three of them were stopped and resumed on the way. float32: only the order of additions differs."""
    jobs = runs[0]
    assert losses_of(jobs[name]) == pytest.approx(losses_of(jobs["reference"]), abs=2e-5)
    assert [p.name for p in jobs[name].work.glob("iter_*")] == [f"iter_{ITERATIONS:07d}"]


def test_the_replica_that_makes_the_others_wait_is_named(runs):
    """Rank 3 sleeps; rank 2, which shares its tensors, is as late."""
    said = next(line for line in runs[2].splitlines() if f"tp2dp2 iteration {ITERATIONS}/" in line)
    assert re.search(r"\| rank [23] on \S+ takes [\d.]+ x the median", said), said


def test_experts_train_when_spread_over_ranks(runs):
    losses = losses_of(runs[0]["experts"])
    assert len(losses) == ITERATIONS
    assert losses[-1] < losses[0] - 0.1


def test_tp2_pp2_resumes_at_one_rank_with_its_optimizer(runs, tmp_path):
    """From iteration 6 of TP2 x PP2, four more on one rank, against ten on one rank."""
    jobs = runs[0]
    one_rank = jobs["reference"].parallel
    resumed = jobs["tp2pp2"].model_copy(update={"work": tmp_path / "resumed", "parallel": one_rank})
    shutil.copytree(jobs["tp2pp2"].work, resumed.work)
    reference = jobs["reference"].model_copy(update={"work": tmp_path / "reference"})
    shutil.copytree(jobs["reference"].work, reference.work)
    for job in (resumed, reference):
        train(job.model_copy(update={"train_iters": ITERATIONS + 4}))
    assert losses_of(resumed) == pytest.approx(losses_of(reference), abs=2e-5)
    assert len(losses_of(resumed)) == ITERATIONS + 4
    assert losses_of(resumed)[-1] < losses_of(resumed)[ITERATIONS - 1] - 0.02


def test_live_tensors_of_all_ranks_tile_the_checkpoint(runs):
    """Every element of every stored parameter is held by some rank, at the place its offset says, and nothing else is."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader

    from megatron_demix.train.compat import cpu_compat

    jobs, live, _ = runs
    folder = jobs["tp2pp2"].work / f"iter_{ITERATIONS:07d}"
    with cpu_compat():
        from megatron_demix.train.checkpointing import load_weights
        from megatron_demix.train.model import build_model, destroy_parallel, initialize_parallel, live_tensors

        job = jobs["reference"]
        initialize_parallel(job.parallel, seed=1, timeout_s=60)
        model = build_model(job.model, job.train, job.parallel, job.vocab_size)
        load_weights(model, folder)
        whole = {}
        for t in live_tensors(model):
            box = tuple(slice(o, o + n) for o, n in zip(t.global_offset, t.box_shape, strict=True))
            whole.setdefault(t.key, torch.full(t.global_shape, float("nan")))[box] = t.tensor.detach().view(t.box_shape)
            assert t.tensor.data_ptr() in {p.data_ptr() for p in model.parameters()} or "fc1" in t.key
        assert not any(t.isnan().any() for t in whole.values())
        destroy_parallel()
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    assert set(whole) == {k for k in stored if is_model_key(k) and "_extra_state" not in k}
    seen = {key: torch.zeros(tensor.shape, dtype=torch.int32) for key, tensor in whole.items()}
    for rank in range(4):
        for key, shape, offset, box_shape, tensor in torch.load(live / f"live_{rank}.pt"):
            box = tuple(slice(o, o + n) for o, n in zip(offset, box_shape, strict=True))
            assert shape == tuple(whole[key].shape)
            assert torch.equal(whole[key][box], tensor.view(box_shape)), (rank, key)
            seen[key][box] += 1
    assert all(count.min() >= 1 for count in seen.values())


def test_a_launch_of_the_wrong_size_is_refused(tmp_path, make_train_job):
    job = make_train_job(tmp_path, parallel={"tensor": 2})
    path = tmp_path / "job.json"
    path.write_text(job.model_dump_json())
    tool = Path(__file__).parents[2] / "tools" / "train_component.py"
    process = subprocess.run(
        [sys.executable, tool, "--job", path], timeout=TIME_LIMIT_S, capture_output=True, text=True, check=False
    )
    assert process.returncode == 2
    assert "error (rank 0): run tiny: needs 2 ranks; start it with torchrun" in process.stderr


def test_equal_runs_at_a_layout_write_equal_bytes(runs, tmp_path):
    """The data of equal weights is stored once however many ranks hold it: checksums.json agrees with the files."""
    jobs = runs[0]
    for name in ("tp2pp2", "pp2dp2", "sharded_optimizer", "experts"):
        folder = jobs[name].work / f"iter_{ITERATIONS:07d}"
        facts = json.loads((folder / "checksums.json").read_text())
        assert {p.name for p in folder.iterdir()} == set(facts) | {"checksums.json"}
        assert all(hash_file(folder / file) == fact["blake2b"] for file, fact in facts.items())
