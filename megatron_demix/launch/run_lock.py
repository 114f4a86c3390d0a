"""The lock of a run's folder: one command at a time makes, or submits, what is in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_demix.artifact import this_place
from megatron_demix.errors import Incomplete
from megatron_demix.locks import is_locked, look_at_lock, open_lock, take_lock


@contextmanager
def only_one(run: Path, *, wait_s: float = 0.5) -> Iterator[None]:
    """Held by the one command that works on a run, or submits it. Raises Incomplete if another has it for longer than wait_s;
    holder() may have it for a moment."""
    with open_lock(run / ".lock") as file:
        take_lock(file, f"another demix process that works on {run}", wait_s=wait_s)
        file.truncate(0)
        file.write(f"{this_place()} {os.getpid()}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def holder(run: Path) -> int | None:
    """The id of the process that works on a run now; None if there is none.

    Raises Incomplete where it is of another machine or container that shares the disk: here its number may be any process's.
    """
    try:
        with look_at_lock(run / ".lock") as file:
            text = file.read() if is_locked(file) else ""
    except FileNotFoundError:
        return None
    where, _, pid = text.rpartition(" ")
    if not pid.isdigit():
        return None
    if where != this_place():
        host = where.rpartition("-")[0] or "another machine"
        raise Incomplete(f"process {pid} on {host} works on {run}: cancel it there.")
    return int(pid)
