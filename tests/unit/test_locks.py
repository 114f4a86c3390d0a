"""Who waits for a lock says so, once, and not before it matters."""

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
