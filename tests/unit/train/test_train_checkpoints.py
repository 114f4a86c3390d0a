"""What lies in a run's folder when it is resumed: damaged checkpoints, others' and halves; and what is kept; on one rank."""

from __future__ import annotations

import errno
import os
import re
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
from folders import contents
from train_runs import stop_in_iteration

from megatron_demix.errors import ConfigError, CorruptInput, Incomplete, StageFailed, StorageError
from megatron_demix.train.compat import cpu_compat
from megatron_demix.train.trainer import train


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


def test_half_of_a_checkpoint_is_passed_over(tmp_path, make_train_job, caplog):
    """As a run that was killed while it removed one may have left it."""
    job = make_train_job(tmp_path, train={"save_interval": 1, "keep_checkpoints": 3})
    with stop_in_iteration(3), pytest.raises(Incomplete):
        train(job)
    for name in ("checksums.json", ".metadata"):
        (job.work / "iter_0000001" / name).unlink()
    train(job)
    assert "iter_0000001: half of a checkpoint, passed over" in caplog.text


def test_as_many_checkpoints_are_kept_as_were_asked_for(tmp_path, make_train_job, caplog):
    job = make_train_job(tmp_path, train={"save_interval": 1, "keep_checkpoints": 3})
    with stop_in_iteration(5), pytest.raises(Incomplete):
        train(job)
    assert sorted(p.name for p in job.work.glob("iter_*")) == ["iter_0000003", "iter_0000004", "iter_0000005"]
    (job.work / "iter_0000004" / "metadata.json").unlink()
    torn = job.work / "iter_0000005" / "checksums.json"
    torn.write_text(torn.read_text()[:-9])
    train(job.model_copy(update={"keep_at_end": 2}))
    assert caplog.text.count("is damaged") == 2
    assert f"iter_0000005 is damaged: {torn}: not readable as JSON" in caplog.text
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
        with (
            full_disk_for(name),
            pytest.raises(StorageError, match=r"writing .*iter_0000006: (the disk takes no more|No space left).*Free space or"),
        ):
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
