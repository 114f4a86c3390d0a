"""What a run leaves to be resumed, and what resuming accepts; on one rank, in this process."""

from __future__ import annotations

import errno
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
from train_runs import FAMILIES, contents

from megatron_demix.artifact import read_json
from megatron_demix.errors import ConfigError, CorruptInput, IncompatibleInputs, Incomplete, StageFailed, StorageError
from megatron_demix.train.compat import cpu_compat
from megatron_demix.train.losses import read_losses
from megatron_demix.train.trainer import train


def stop_in_iteration(number: int):
    """Send this process SIGUSR1 when step `number` (from 1) begins."""
    import signal

    with cpu_compat():
        from megatron_demix.train.step import Stepper
    step = Stepper.train

    def train_and_signal(self, dataset, iteration, *, stop):
        if iteration == number - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(self, dataset, iteration, stop=stop or iteration == number - 1)

    return mock.patch.object(Stepper, "train", train_and_signal)


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
    assert read_json(folder / "metadata.json")["sharded_backend"] == "torch_dist"
    for path in folder.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path, make_train_job, caplog):
    whole = make_train_job(tmp_path / "whole")
    train(whole)
    job = make_train_job(tmp_path / "damaged")
    with stop_in_iteration(5), pytest.raises(Incomplete):
        train(job)
    newest = job.work / "iter_0000005"
    assert sorted(p.name for p in job.work.glob("iter_*")) == ["iter_0000003", "iter_0000005"]
    shard = newest / "__0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    train(job)
    assert f"checkpoint {newest} is damaged: {shard} has other bytes than when it was published" in caplog.text
    assert contents(job.work) == contents(whole.work)
    train(job)  # finished: nothing to do
    assert contents(job.work) == contents(whole.work)


def damage(folder: Path) -> Path:
    """Flip a bit of a checkpoint's weights; the file."""
    shard = folder / "__0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    return shard


def test_a_damaged_checkpoint_stays_until_there_is_a_newer_one(tmp_path, make_train_job):
    job = make_train_job(tmp_path, train_iters=9)
    with stop_in_iteration(5), pytest.raises(Incomplete):
        train(job)
    damage(job.work / "iter_0000005")
    with stop_in_iteration(4), pytest.raises(Incomplete):
        train(job)
    assert sorted(p.name for p in job.work.iterdir() if p.is_dir()) == [".damaged-iter_0000005", "iter_0000003", "iter_0000004"]
    with stop_in_iteration(7), pytest.raises(Incomplete):
        train(job)
    assert sorted(p.name for p in job.work.iterdir() if p.is_dir()) == ["iter_0000006", "iter_0000007"]


def test_where_no_checkpoint_is_sound_nothing_is_trained_or_removed(tmp_path, make_train_job):
    job = make_train_job(tmp_path)
    with stop_in_iteration(5), pytest.raises(Incomplete):
        train(job)
    shards = [damage(job.work / f"iter_000000{number}") for number in (5, 3)]
    before = contents(job.work)
    said = f"no checkpoint in {job.work} is sound: " + "; ".join(
        f"{s} has other bytes than when it was published" for s in shards
    )
    with pytest.raises(CorruptInput, match=re.escape(said)):
        train(job)
    assert contents(job.work) == before


@pytest.mark.parametrize("where", ["iter_0000003", "release"])
def test_checkpoints_of_others_are_neither_resumed_nor_removed(tmp_path, make_train_job, where):
    job = make_train_job(tmp_path, train_iters=3)
    train(job)
    (job.work / "iter_0000003" / "checksums.json").unlink()  # as Megatron-LM saves
    (job.work / "iter_0000003").rename(job.work / where)
    (job.work / "latest_checkpointed_iteration.txt").write_text(where.removeprefix("iter_000000"))
    before = contents(job.work)
    second = make_train_job(tmp_path, init_checkpoint=job.work)
    with pytest.raises(ConfigError, match=rf"{where} was not written by this trainer, .*Choose another folder to save in"):
        train(second)
    assert contents(job.work) == before


@pytest.mark.parametrize("name", ["checksums.json", "__0_0.distcp"])
def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_damaged(tmp_path, make_train_job, name):
    whole = make_train_job(tmp_path / "whole")
    train(whole)
    job = make_train_job(tmp_path / "stale")
    with stop_in_iteration(5), pytest.raises(Incomplete):
        train(job)
    before = contents(job.work)
    path = job.work / "iter_0000005" / name

    def stale(method):
        def called(self, *arguments, **options):
            if self == path:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(self))
            return method(self, *arguments, **options)

        return called

    said = f"{path} (Stale file handle) cannot be read, so nobody knows whether it is damaged. Run again"
    with (
        mock.patch.object(Path, "stat", stale(Path.stat)),
        mock.patch.object(Path, "read_text", stale(Path.read_text)),
        pytest.raises(StageFailed, match=re.escape(said)),
    ):
        train(job)
    assert contents(job.work) == before
    train(job)
    assert contents(job.work) == contents(whole.work)


def test_a_removal_that_was_killed_leaves_nothing_that_looks_like_a_checkpoint(tmp_path, make_train_job):
    with cpu_compat():
        from megatron_demix.train.checkpointing import Checkpoints
    job = make_train_job(tmp_path)
    with stop_in_iteration(5), pytest.raises(Incomplete):
        train(job)
    checkpoints = object.__new__(Checkpoints)
    checkpoints._job = job
    with mock.patch("shutil.rmtree", side_effect=[None, KeyboardInterrupt]), pytest.raises(KeyboardInterrupt):
        checkpoints._drop([3])
    assert sorted(p.name for p in job.work.iterdir() if p.is_dir()) == [".old-iter_0000003", "iter_0000005"]
    train(job)
    assert [p.name for p in job.work.iterdir() if p.is_dir()] == ["iter_0000006"]


def test_checkpoints_on_the_way_stay_and_a_run_may_end_before_its_schedule(tmp_path, make_train_job):
    style = {"lr_decay_style": "linear", "save_interval": 4}
    whole = make_train_job(tmp_path / "whole", train=style, train_iters=5, schedule_iters=10, keep=[1, 3])
    train(whole)
    assert sorted(p.name for p in whole.work.glob("iter_*")) == ["iter_0000001", "iter_0000003", "iter_0000005"]
    assert (whole.work / "latest_checkpointed_iteration.txt").read_text() == "5"
    rates = [row["learning-rate"] for row in read_losses(whole.work / "losses.jsonl")]
    assert rates == pytest.approx([3e-3 * (1 - n / 10) for n in range(5)])
    stopped = make_train_job(tmp_path / "stopped", train=style, train_iters=5, schedule_iters=10, keep=[1, 3])
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


def test_half_of_a_checkpoint_is_passed_over(tmp_path, make_train_job, caplog):
    """As a run that was killed while it removed one may have left it."""
    job = make_train_job(tmp_path, train={"save_interval": 1, "keep_checkpoints": 3})
    with stop_in_iteration(3), pytest.raises(Incomplete):
        train(job)
    for name in ("checksums.json", ".metadata"):
        (job.work / "iter_0000001" / name).unlink()
    train(job)
    assert "iter_0000001: half of a checkpoint, passed over" in caplog.text


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


def test_as_many_checkpoints_are_kept_as_were_asked_for(tmp_path, make_train_job, caplog):
    job = make_train_job(tmp_path, train={"save_interval": 1, "keep_checkpoints": 3})
    with stop_in_iteration(5), pytest.raises(Incomplete):
        train(job)
    assert sorted(p.name for p in job.work.glob("iter_*")) == ["iter_0000003", "iter_0000004", "iter_0000005"]
    for number in (4, 5):
        (job.work / f"iter_000000{number}" / "metadata.json").unlink()
    train(job.model_copy(update={"keep_at_end": 2}))
    assert caplog.text.count("is damaged") == 2
    assert sorted(p.name for p in job.work.glob("iter_*")) == ["iter_0000005", "iter_0000006"]
    train(job)  # as a study's runs end
    assert [p.name for p in job.work.glob("iter_*")] == ["iter_0000006"]


def test_a_full_disk_is_named_and_the_last_checkpoint_survives(tmp_path, make_train_job):
    import torch

    job = make_train_job(tmp_path)
    with stop_in_iteration(3), pytest.raises(Incomplete):
        train(job)
    before = contents(job.work)
    # /dev/full in place of the file: every write fails with ENOSPC, as on a full disk. Newer cores write no common.pt.
    files = [".distcp", *(["common.pt"] if (job.work / "iter_0000003" / "common.pt").exists() else [])]
    for name in files:
        with full_disk_for(name), pytest.raises(StorageError, match=r"writing .*iter_0000006: .*Free space or choose another"):
            train(job)
        assert contents(job.work) | {"losses.jsonl": before["losses.jsonl"]} == before  # it may be ahead of the checkpoint
        assert not torch.distributed.is_initialized()
    train(job)
    whole = make_train_job(tmp_path / "whole")
    train(whole)
    assert contents(job.work) == contents(whole.work)


@contextmanager
def full_disk_for(suffix: str):
    """Files of megatron.core's that end so are written to /dev/full."""
    import torch

    def full(path, mode="r", *args, **kwargs):
        return open("/dev/full" if str(path).endswith(suffix) and "w" in mode else path, mode, *args, **kwargs)

    def full_save(value, path, *args, save=torch.save, **kwargs):
        return save(value, "/dev/full" if str(path).endswith(suffix) else path, *args, **kwargs)

    writer = "megatron.core.dist_checkpointing.strategies.filesystem_async.open"
    with mock.patch(writer, full, create=True), mock.patch("torch.save", full_save):
        yield


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


def test_settings_that_no_weight_shows_are_compared_too(tmp_path, make_train_job, byte_corpus, monkeypatch):
    with cpu_compat():
        from megatron_demix.train import checkpointing
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

    changed = checkpointing.changed_settings

    def changed_since_earlier_version(saved, now):
        for name in (
            "lr_warmup_fraction",
            "hidden_dropout",
            "attention_dropout",
            "moe_aux_loss_coeff",
            "demix_blend",
            "demix_start",
        ):
            delattr(saved, name)
        return changed(saved, now)

    monkeypatch.setattr(checkpointing, "changed_settings", changed_since_earlier_version)
    train(make_train_job(tmp_path, train_iters=3, train={"lr_warmup_fraction": 0.5}))


def test_a_signal_during_a_step_stops_after_it(tmp_path, make_train_job):
    import signal

    with cpu_compat():
        from megatron_demix.train import step
    forward, passes = step._forward_step, []

    def forward_and_signal(*arguments):
        passes.append(None)
        if len(passes) == 10:  # of four in a step
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(*arguments)

    with (
        mock.patch.object(step, "_forward_step", forward_and_signal),
        pytest.raises(Incomplete, match="stopped by SIGTERM after iteration 3 of 6"),
    ):
        train(make_train_job(tmp_path))


@pytest.mark.parametrize(("train_iters", "evaluation"), [(6, 1), (2, 0)], ids=["on_the_way", "at_the_end"])
def test_a_signal_during_an_evaluation_ends_it_with_all_saved(tmp_path, make_train_job, byte_corpus, train_iters, evaluation):
    """The second of its batches is not run; the evaluation is done when the run goes on, which then has the same bytes."""
    import signal

    with cpu_compat():
        from megatron_demix.train.step import Stepper
    options = {"valid": {"a": byte_corpus["a"], "b": byte_corpus["b"]}, "eval_interval": 2, "train_iters": train_iters}
    whole = make_train_job(tmp_path / "whole", **options)
    train(whole)
    job = make_train_job(tmp_path / "stopped", **options)
    passes, run = [], Stepper._run

    def run_and_signal(self, dataset, first_sample, *, forward_only):
        passes.append(forward_only)
        if sum(passes) == 8 * evaluation + 5:  # four batches of the first set, then one of the second
            os.kill(os.getpid(), signal.SIGTERM)
        return run(self, dataset, first_sample, forward_only=forward_only)

    last = 2 * evaluation + 2
    with (
        mock.patch.object(Stepper, "_run", run_and_signal),
        pytest.raises(Incomplete, match=f"stopped by SIGTERM after iteration {last} of {train_iters}, saved in"),
    ):
        train(job)
    assert sum(passes) == 8 * evaluation + 5
    assert (job.work / "latest_checkpointed_iteration.txt").read_text() == str(last)
    train(job)
    assert contents(job.work) == contents(whole.work)
    assert len(read_losses(job.work / "validation.jsonl")) == train_iters / 2


def test_a_run_that_is_killed_while_it_evaluates_has_saved_before(tmp_path, make_train_job, byte_corpus, capsys):
    with cpu_compat():
        from megatron_demix.train.step import Stepper
    job = make_train_job(tmp_path, valid={"b": byte_corpus["b"]})
    with mock.patch.object(Stepper, "evaluate", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        train(job)
    assert (job.work / "latest_checkpointed_iteration.txt").read_text() == "6"
    train(job)
    assert [row["iteration"] for row in read_losses(job.work / "validation.jsonl")] == [6]
    capsys.readouterr()
    train(job)
    assert capsys.readouterr().out == f"run tiny: all 6 iterations are done and saved in {job.work}.\n"


def test_every_batch_of_an_evaluation_is_progress(tmp_path, make_train_job, byte_corpus, monkeypatch):
    """To the watchdog a long evaluation is no hang."""
    with cpu_compat():
        from megatron_demix.train import loop
    said = []
    monkeypatch.setattr(loop.Watchdog, "progress", lambda self, what: said.append(what))
    train(make_train_job(tmp_path, valid={"b": byte_corpus["b"]}, eval_iters=3, train_iters=1))
    assert said == ["iteration 1", "saving iteration 1", *["evaluating iteration 1"] * 3]


def test_checksums_have_the_files_that_a_rank_does_not_see_yet(tmp_path, monkeypatch):
    """On a network file system another node's listing may lag. Here rank 1's does."""
    with cpu_compat():
        from megatron_demix.train.checkpointing import Checkpoints
    for name in "abcd":
        (tmp_path / name).write_text(name)
    listings = [list("abcd"), list("bcd")]
    found = {}
    for rank, listing in enumerate(listings):
        checkpoints = object.__new__(Checkpoints)
        checkpoints._rank, checkpoints._num_ranks = rank, 2
        monkeypatch.setattr(Path, "iterdir", lambda self, listing=listing: (self / name for name in listing))
        monkeypatch.setattr(checkpoints, "_gather", lambda mine: listings if isinstance(mine, list) else [mine])
        found |= checkpoints._checksums(tmp_path)
    assert sorted(found) == list("abcd")
