"""What resuming a run gives, and what it accepts; on one rank, in this process."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from folders import contents
from train_runs import FAMILIES, stop_in_iteration

from megatron_demix.artifact import read_json
from megatron_demix.errors import ConfigError, IncompatibleInputs, Incomplete
from megatron_demix.train.losses import read_losses
from megatron_demix.train.trainer import train


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_stopped_and_resumed_run_ends_with_the_same_bytes(tmp_path, make_train_job, family, precision):
    """Loss, optimizer, generators (dropout), data order: everything. Also that the loss falls."""
    options = {"model": FAMILIES[family], "train": {"precision": precision, "lr": 1e-2}, "train_iters": 8}
    whole = make_train_job(tmp_path / "whole", **options)
    train(whole)
    parts = make_train_job(tmp_path / "parts", **options)
    with stop_in_iteration(4), pytest.raises(Incomplete, match=r"stopped by SIGUSR1 after iteration 4 of 8, saved in"):
        train(parts)
    train(parts)
    assert contents(whole.work) == contents(parts.work)
    assert sorted(p.name for p in whole.work.iterdir()) == ["iter_0000008", "latest_checkpointed_iteration.txt", "losses.jsonl"]
    losses = [row["lm loss"] for row in read_losses(whole.work / "losses.jsonl")]
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.3


def test_checkpoints_hold_what_megatron_lm_looks_up_and_no_paths(tmp_path, make_train_job):
    from megatron.core import dist_checkpointing

    job = make_train_job(tmp_path, valid={"b": tmp_path / "nowhere"}, train_iters=2)
    with pytest.raises(ConfigError, match=r"nowhere.idx is missing; the blend names the prefix"):
        train(job)
    train(job.model_copy(update={"valid": {}}))
    folder = job.work / "iter_0000002"
    common = dist_checkpointing.load_common_state_dict(str(folder))
    assert common["iteration"] == 2
    assert common["args"].consumed_train_samples == 16
    assert common["args"].padded_vocab_size == 384
    assert common["checkpoint_version"] == 3.0
    # Megatron-LM compares it with train_iters x global_batch_size when it goes on with the run.
    assert common["opt_param_scheduler"]["wd_incr_steps"] == 16
    assert read_json(folder / "metadata.json")["sharded_backend"] == "torch_dist"
    for path in folder.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path


def test_checkpoints_on_the_way_stay_and_a_run_may_end_before_its_schedule(tmp_path, make_train_job):
    style = {"lr_decay_style": "linear", "save_interval": 4}
    whole = make_train_job(tmp_path / "whole", train=style, train_iters=5, schedule_iters=10, keep=[1, 3, 5])
    train(whole)
    assert sorted(p.name for p in whole.work.glob("iter_*")) == ["iter_0000001", "iter_0000003", "iter_0000005"]
    assert (whole.work / "latest_checkpointed_iteration.txt").read_text() == "5"
    rates = [row["learning-rate"] for row in read_losses(whole.work / "losses.jsonl")]
    assert rates == pytest.approx([3e-3 * (1 - n / 10) for n in range(5)])
    stopped = make_train_job(tmp_path / "stopped", train=style, train_iters=5, schedule_iters=10, keep=[1, 3, 5])
    with stop_in_iteration(4), pytest.raises(Incomplete):
        train(stopped)
    train(stopped)
    assert contents(stopped.work) == contents(whole.work)
    with pytest.raises(ValueError, match="schedule_iters 4 is below train_iters 5"):
        make_train_job(tmp_path, train_iters=5, schedule_iters=4)


def test_a_run_that_goes_on_to_more_iterations_follows_their_schedule_if_told_to(tmp_path, make_train_job, caplog):
    style = {"lr_decay_style": "linear"}
    train(make_train_job(tmp_path, train=style, train_iters=4))
    longer = make_train_job(tmp_path, train=style, train_iters=8)
    said = (
        "iter_0000004 was trained on a schedule of 4 iterations, 0 of warm-up, and this one has 8 iterations, 0 of warm-up: "
        "the next learning rate would be 0.0015, not 0. Set train_iters back, choose another folder, or go on with "
        "--override-opt-param-scheduler."
    )
    with pytest.raises(IncompatibleInputs, match=re.escape(said)):
        train(longer)
    assert "train_iters" not in caplog.text
    train(longer.model_copy(update={"override_opt_param_scheduler": True}))
    assert "iter_0000004 was trained with train_iters 4, and goes on with 8. A source that is read for more than" in caplog.text
    rates = [row["learning-rate"] for row in read_losses(longer.work / "losses.jsonl")]
    assert rates == pytest.approx([3e-3 * (1 - n / 4) for n in range(4)] + [3e-3 * (1 - n / 8) for n in range(4, 8)])


def test_a_plateau_goes_on_to_more_iterations(tmp_path, make_train_job):
    constant = {"lr_decay_style": "constant", "lr_warmup_fraction": 0.25}
    train(make_train_job(tmp_path / "constant", train=constant, train_iters=4))
    train(make_train_job(tmp_path / "constant", train=constant, train_iters=8))
    wsd = {"lr_decay_style": "WSD", "save_interval": 1}
    with stop_in_iteration(6), pytest.raises(Incomplete):
        train(make_train_job(tmp_path / "wsd", train=wsd, train_iters=10))
    with stop_in_iteration(11), pytest.raises(Incomplete):
        train(make_train_job(tmp_path / "wsd", train=wsd, train_iters=12))
    with pytest.raises(IncompatibleInputs, match=r"the next learning rate would be 0.003, not 0.00"):
        train(make_train_job(tmp_path / "wsd", train=wsd, train_iters=20))


def test_another_start_is_another_run(tmp_path, make_train_job):
    bases = [make_train_job(tmp_path / f"base{seed}", seed=seed, train_iters=1) for seed in (1, 2)]
    for base in bases:
        train(base)
    job = make_train_job(tmp_path, init_checkpoint=bases[0].work, train_iters=3)
    train(job)
    weights = "the weights [0-9a-f]{12}"
    with pytest.raises(
        IncompatibleInputs, match=rf"was trained with a start from {weights} \(now {weights}; without --load it goes on\)\."
    ):
        train(job.model_copy(update={"init_checkpoint": bases[1].work}))
    before = contents(job.work)
    train(job.model_copy(update={"init_checkpoint": None}))
    train(job.model_copy(update={"init_checkpoint": job.work}))  # as Megatron-LM is told to resume: --save X --load X
    bases[0].work.rename(tmp_path / "moved")
    train(job)  # without it
    train(job.model_copy(update={"init_checkpoint": tmp_path / "moved"}))
    assert contents(job.work) == before


def test_a_checkpoint_beyond_the_end_is_refused(tmp_path, make_train_job):
    job = make_train_job(tmp_path, train_iters=3)
    train(job)
    with pytest.raises(ConfigError, match=r"holds a checkpoint of iteration 3, beyond train_iters 2. Choose another folder"):
        train(job.model_copy(update={"train_iters": 2}))


def test_another_job_does_not_resume_this_one(tmp_path, make_train_job):
    train(make_train_job(tmp_path, train_iters=3))
    other = make_train_job(tmp_path, train={"lr": 1e-3}, model={"num_layers": 3})
    said = r"iter_0000003 was trained with num_layers 2 \(now 3\), lr 0.003 \(now 0.001\). Resuming it would be neither run"
    with pytest.raises(IncompatibleInputs, match=said):
        train(other)


def test_settings_that_no_weight_shows_are_compared_too(tmp_path, make_train_job, byte_corpus):
    job = make_train_job(tmp_path, train_iters=3)
    train(job)
    bytes_a, bytes_b = (Path(f"{byte_corpus[name]}.bin").stat().st_size for name in "ab")
    changes = {
        f"a blend of 0.75 x {bytes_a} bytes + 0.25 x {bytes_b} bytes (now 1 x {bytes_a} bytes)": {
            "blend": [(byte_corpus["a"], 1.0), (byte_corpus["b"], 0.0)]
        },
        "lr_warmup_fraction 0.01 (now 0.5)": {"train": {"lr_warmup_fraction": 0.5}},
        "hidden_dropout 0.0 (now 0.1)": {"model": {"hidden_dropout": 0.1}},
        "attention_dropout 0.0 (now 0.1)": {"model": {"attention_dropout": 0.1}},
        "moe_aux_loss_coeff 0.01 (now 0.5)": {"model": {"moe_aux_loss_coeff": 0.5}},
        "global_batch_size 8 (now 4), bf16 False (now True), use_distributed_optimizer False (now True), seed 5 (now 6)": {
            "train": {"global_batch_size": 4, "precision": "bf16", "use_distributed_optimizer": True},
            "seed": 6,
        },
        "min_lr 0.0 (now 0.001), lr_decay_style cosine (now linear), weight_decay 0.1 (now 0.2), adam_beta1 0.9 (now 0.8), "
        "adam_beta2 0.95 (now 0.9), adam_eps 1e-08 (now 1e-07), clip_grad 1.0 (now 2.0)": {
            "train": {
                "min_lr": 1e-3,
                "lr_decay_style": "linear",
                "weight_decay": 0.2,
                "adam_beta1": 0.8,
                "adam_beta2": 0.9,
                "adam_eps": 1e-7,
                "clip_grad": 2.0,
            }
        },
    }
    advice = f"set that back, choose another folder, or delete {job.work} to train again from the start."
    for said, change in changes.items():
        with pytest.raises(
            IncompatibleInputs, match=re.escape(f"was trained with {said}. Resuming") + ".*" + re.escape(advice)
        ):
            train(make_train_job(tmp_path, train_iters=3, **change))

    moved = tmp_path / "moved"
    for suffix in (".idx", ".bin"):
        shutil.copy(f"{byte_corpus['a']}{suffix}", f"{moved}{suffix}")
    train(make_train_job(tmp_path, train_iters=3, blend=[(moved, 0.75), (byte_corpus["b"], 0.25)]))


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("chained", [True, False])
def test_another_packages_optimizer_is_named(tmp_path, make_train_job, monkeypatch, distributed, chained):
    """What megatron.core saves where Transformer Engine is installed: groups as its AdamW makes them."""
    from megatron.core import dist_checkpointing

    settings = {"use_distributed_optimizer": distributed, "precision": "bf16", "lr_decay_style": "constant"}
    train(make_train_job(tmp_path, train=settings, train_iters=1))
    load = dist_checkpointing.load_common_state_dict

    def saved_with_transformer_engine(folder):
        common = load(folder)
        group = {"lr": 3e-3, "bias_correction": True, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "step": 1}
        parts = {"optimizer": {"param_groups": [group]}}
        return common | {"optimizer": {0: parts, 1: parts} if chained else parts}

    with monkeypatch.context() as patched:
        patched.setattr(dist_checkpointing, "load_common_state_dict", saved_with_transformer_engine)
        said = (
            r"iter_0000001 was trained with the AdamW of Transformer Engine \(or apex\), and this process has that of torch, "
            r"which cannot go on from its state. Run where Transformer Engine \(or apex\) is installed, choose another folder"
        )
        with pytest.raises(IncompatibleInputs, match=said):
            train(make_train_job(tmp_path, train=settings, train_iters=2))
    train(make_train_job(tmp_path, train=settings, train_iters=2))
