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
from dist_checkpoints import bits, read_checkpoint

from megatron_demix.artifact import hash_file
from megatron_demix.checkpoint.reader import is_model_key
from megatron_demix.merge.engine import merge_checkpoints
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
    common |= {"valid": {"b": base.blend[1][0]}, "eval_interval": 4}
    jobs = {"reference": make_train_job(folder / "reference", name="reference", **common)}
    train(jobs["reference"])
    for name, parallel in LAYOUTS.items():
        own = settings | ({"recompute_granularity": "full"} if name == "tp2dp2" else {})
        jobs[name] = make_train_job(folder / name, name=name, parallel=parallel, **common | {"train": own})
    sharded = common | {"train": settings | {"use_distributed_optimizer": True}}
    for name in ("sharded_optimizer", "undisturbed", "grown"):
        jobs[name] = make_train_job(folder / name, name=name, parallel={"data": 4}, **sharded)
    train(jobs["grown"].model_copy(update={"parallel": jobs["reference"].parallel, "train_iters": 3}))
    moe = {"num_experts": 4, "moe_ffn_hidden_size": 32}
    start = make_train_job(folder / "start", name="start", model=moe, train_iters=1)
    train(start)
    jobs["experts"] = make_train_job(
        folder / "experts",
        name="experts",
        parallel={"data": 4, "expert": 2},
        model=moe,
        train_iters=ITERATIONS,
        init_checkpoint=start.work,
    )
    live = folder / "live"
    for name in ("tp2pp2", "sharded_optimizer"):
        (live / name).mkdir(parents=True)
    spread = [job for name, job in jobs.items() if name != "reference"]
    plan = {
        "jobs": [job.model_dump(mode="json") for job in spread],
        "stop": {"pp2dp2": 4, "sharded_optimizer": 4, "experts": 4},
        "live": {name: str(live / name) for name in ("tp2pp2", "sharded_optimizer")},
        "slow": "tp2dp2",
    }
    return jobs, live, torchrun(plan, folder)


@pytest.mark.parametrize("name", [*LAYOUTS, "sharded_optimizer", "grown"])
def test_layouts_have_the_loss_curve_of_one_rank(runs, name):
    """Some of them were stopped and resumed on the way, one begun on one rank. float32: only the order of additions differs."""
    jobs = runs[0]
    assert losses_of(jobs[name]) == pytest.approx(losses_of(jobs["reference"]), abs=2e-5)
    assert [p.name for p in jobs[name].work.glob("iter_*")] == [f"iter_{ITERATIONS:07d}"]


@pytest.mark.parametrize("name", [*LAYOUTS, "sharded_optimizer", "grown"])
def test_layouts_evaluate_as_one_rank(runs, name):
    """Those that were stopped after iteration 4 are evaluated when they go on."""
    found, expected = (read_losses(runs[0][n].work / "validation.jsonl") for n in (name, "reference"))
    evaluated = [3] if name == "grown" else []  # its end on one rank
    assert [row["iteration"] for row in found] == [*evaluated, 4, ITERATIONS]
    for row, other in zip(found[-2:], expected, strict=True):
        assert row["lm loss validation-b"] == pytest.approx(other["lm loss validation-b"], abs=2e-5)


def test_the_replica_that_makes_the_others_wait_is_named(runs):
    """Rank 3 sleeps; rank 2, which shares its tensors, is as late."""
    said = next(line for line in runs[2].splitlines() if f"tp2dp2 iteration {ITERATIONS}/" in line)
    assert re.search(r"\| rank [23] on \S+ takes [\d.]+ x the median", said), said


def test_experts_train_when_spread_over_ranks(runs, tmp_path, capsys):
    job, one_rank = runs[0]["experts"], runs[0]["reference"].parallel
    losses = losses_of(job)
    assert len(losses) == ITERATIONS
    assert losses[-1] < losses[0] - 0.1
    alone = job.model_copy(update={"work": tmp_path / "work", "parallel": one_rank})
    train(alone)
    assert losses == pytest.approx(losses_of(alone), abs=2e-5)
    balances, expected = (
        re.findall(r"^experts .* \| load_balancing_loss (\S+)", said, re.M) for said in (runs[2], capsys.readouterr().out)
    )
    assert len(expected) == ITERATIONS // 2
    assert list(map(float, balances)) == pytest.approx(list(map(float, expected)), abs=2e-4)


@pytest.mark.parametrize("name", ["tp2pp2", "sharded_optimizer"])
def test_a_layout_resumes_at_one_rank_with_its_optimizer(runs, tmp_path, name):
    """From iteration 6 of four ranks, four more on one rank, against ten on one rank."""
    jobs = runs[0]
    one_rank = jobs["reference"].parallel
    resumed = jobs[name].model_copy(update={"work": tmp_path / "resumed", "parallel": one_rank})
    shutil.copytree(jobs[name].work, resumed.work)
    reference = jobs["reference"].model_copy(update={"work": tmp_path / "reference"})
    shutil.copytree(jobs["reference"].work, reference.work)
    for job in (resumed, reference):
        train(job.model_copy(update={"train_iters": ITERATIONS + 4}))
    assert losses_of(resumed) == pytest.approx(losses_of(reference), abs=2e-5)
    assert len(losses_of(resumed)) == ITERATIONS + 4
    assert losses_of(resumed)[-1] < losses_of(resumed)[ITERATIONS - 1] - 0.02


@pytest.mark.parametrize("name", ["tp2pp2", "sharded_optimizer"])
def test_live_tensors_of_all_ranks_tile_the_checkpoint(runs, name):
    """Every element of every stored parameter is held by some rank, at the place its offset says, and nothing else is."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader

    from megatron_demix.train.compat import cpu_compat

    jobs, live, _ = runs
    folder = jobs[name].work / f"iter_{ITERATIONS:07d}"
    with cpu_compat():
        from megatron_demix.train.model import build_model, destroy_parallel, initialize_parallel, live_tensors
        from megatron_demix.train.weights import load_weights

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
        for key, shape, offset, box_shape, tensor in torch.load(live / name / f"live_{rank}.pt"):
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


def test_equal_runs_at_a_layout_write_equal_bytes(runs):
    """However many ranks hold the weights, one of them was stopped and resumed; checksums.json agrees with the files."""
    jobs = runs[0]
    for name in ("tp2pp2", "pp2dp2", "sharded_optimizer", "experts"):
        folder = jobs[name].work / f"iter_{ITERATIONS:07d}"
        facts = json.loads((folder / "checksums.json").read_text())
        assert {p.name for p in folder.iterdir()} == set(facts) | {"checksums.json"}
        assert all(hash_file(folder / file) == fact["blake2b"] for file, fact in facts.items())
    stopped, undisturbed = (
        json.loads((jobs[name].work / f"iter_{ITERATIONS:07d}" / "checksums.json").read_text())
        for name in ("sharded_optimizer", "undisturbed")
    )
    assert stopped == undisturbed


def test_replicas_share_the_writing_and_the_reading(runs):
    """Each of four ranks writes about a quarter of what all hold, and asks for a part of the weights that no other reads."""
    jobs, live, _ = runs
    folder = jobs["sharded_optimizer"].work / f"iter_{ITERATIONS:07d}"
    written = [path.stat().st_size for path in sorted(folder.glob("*.distcp"))]
    assert len(written) == 4
    assert max(written) < 1.5 * min(written)
    stored = read_checkpoint(folder)
    read = [json.loads((live / "sharded_optimizer" / f"read_{rank}.json").read_text()) for rank in range(4)]
    assert sum(read) == sum(tensor.numel() for key, tensor in stored.items() if is_model_key(key))
    assert max(read) < sum(read) / 2


def test_what_replicas_wrote_together_merges_with_what_one_rank_wrote(runs, tmp_path):
    jobs = runs[0]
    parts = {"four": jobs["sharded_optimizer"].work, "one": jobs["reference"].work}
    mixtures = {"four": {"four": 1.0}, "one": {"one": 1.0}, "mean": {"four": 0.5, "one": 0.5}}
    merge_checkpoints(parts, mixtures, tmp_path, progress=False, verify="full")
    merged = {name: read_checkpoint(tmp_path / name / "release") for name in mixtures}
    for name, work in parts.items():
        stored = read_checkpoint(work / f"iter_{ITERATIONS:07d}")
        assert all(bits(stored[key]) == bits(tensor) for key, tensor in merged[name].items())
    for key, mean in merged["mean"].items():
        assert bits(mean) == bits((0.5 * merged["four"][key]) + (0.5 * merged["one"][key]))
