"""Locks keep others out; who waits for one says so, once, and not before it matters."""

import errno
import fcntl
import logging
import threading

import pytest

from megatron_demix import locks
from megatron_demix.errors import Incomplete


def test_a_long_wait_is_said_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(locks, "_POLL_S", 0.01)
    monkeypatch.setattr(locks, "_SILENT_S", 0.1)
    with open(tmp_path / "lock", "w") as held, open(tmp_path / "lock") as wanted:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(Incomplete, match="the other one: still running"):
            locks.take_lock(wanted, "the other one", wait_s=0.05)
        assert caplog.messages == []
        threading.Timer(0.5, fcntl.flock, (held, fcntl.LOCK_UN)).start()
        locks.take_lock(wanted, "the other one")
    assert caplog.record_tuples == [("megatron_demix.locks", logging.WARNING, "waiting for the other one ...")]


def test_a_lock_leads_to_no_other_file(tmp_path):
    (tmp_path / "other").write_text("x")
    (tmp_path / "lock").symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="symbolic links"):
        locks.open_lock(tmp_path / "lock")
    assert (tmp_path / "other").read_text() == "x"
    with locks.open_lock(tmp_path / "new") as file:
        locks.take_lock(file, "nobody")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_whether_a_lock_is_held_is_seen_by_those_who_may_only_read_it(tmp_path, monkeypatch, number):
    def opened(path, mode="r"):
        if mode != "r":
            raise OSError(number, "refused", str(path))
        return open(path, mode)

    monkeypatch.setattr(locks, "open", opened, raising=False)
    with open(tmp_path / "lock", "w") as held, locks.look_at_lock(tmp_path / "lock") as file:
        assert not locks.is_locked(file)
        fcntl.flock(held, fcntl.LOCK_SH)
        assert locks.is_locked(file)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        locks.look_at_lock(tmp_path / "nowhere")


def test_shared_locks_keep_out_whoever_wants_it_alone_until_the_last_is_freed(tmp_path):
    path = tmp_path / "lock"
    with locks.open_lock(path) as wanted:
        with locks.open_lock(path) as one:
            locks.take_lock(one, "the other", wait_s=0, shared=True)
            with locks.open_lock(path) as two:
                locks.take_lock(two, "the other", wait_s=0, shared=True)
            assert locks.is_locked(wanted)
            with pytest.raises(Incomplete, match=r"^the other: still running\. Let it finish"):
                locks.take_lock(wanted, "the other", wait_s=0)
        assert not locks.is_locked(wanted)
        locks.take_lock(wanted, "the other", wait_s=0)
        with locks.open_lock(path) as late:
            assert locks.is_locked(late)
            with pytest.raises(Incomplete, match="the other: still running"):
                locks.take_lock(late, "the other", wait_s=0, shared=True)


def test_a_file_system_without_locks_is_said_and_stops_nobody(tmp_path, monkeypatch, caplog):
    def refused(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refused)
    with locks.open_lock(tmp_path / "lock") as file:
        locks.take_lock(file, "nobody")
        assert not locks.is_locked(file)
    (said,) = caplog.messages
    assert said.startswith(f"{tmp_path} cannot be locked (Function not implemented)")
