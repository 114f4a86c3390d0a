"""Locks on files (flock): the kernel frees them when the last process that holds them has ended, however it ended."""

from __future__ import annotations

import errno
import fcntl
import logging
import math
import os
import time
from pathlib import Path
from typing import IO

from megatron_demix.errors import Incomplete

_POLL_S = 0.2
_SILENT_S = 5.0
logger = logging.getLogger(__name__)


def open_lock(path: Path) -> IO:
    """A lock file, open to be read and written, made where it is absent and left as it is where it is not. Raises OSError where
    a link stands there: in a folder that others may write, it could lead to any file of this user."""
    # Read, too: NFSv4 shares locks only on files that may be.
    return open(path, "a+", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))


def look_at_lock(path: Path) -> IO:
    """A lock file that is there, open to be asked for its holder. Raises FileNotFoundError where there is none."""
    try:
        return open(path, "r+")  # NFS asks for the right to write of those who ask for a lock
    except OSError as e:
        if e.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        return open(path)  # another person's, or on a disk that is read alone


def take_lock(file: IO, holder: str, *, wait_s: float = math.inf, shared: bool = False) -> None:
    """Lock an open file, for this process and those that inherit it. A lock it has already becomes the one asked for.

    shared: together with others that ask for a shared one. Raises Incomplete, which names `holder`, where others have it for
    longer than `wait_s`. A wait of more than seconds is said, in a warning. Where the file system has no locks (Lustre mounted
    without flock) there is a warning instead of a lock.
    """
    deadline = time.monotonic() + wait_s
    silent_until = time.monotonic() + _SILENT_S
    while True:
        try:
            return fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                waited = f" after {wait_s:g} s" if wait_s >= 1 else ""
                raise Incomplete(f"{holder}: still running{waited}. Let it finish or stop it, then run again.") from None
            if time.monotonic() >= silent_until:
                logger.warning("waiting for %s ...", holder)
                silent_until = math.inf
            time.sleep(_POLL_S)
        except OSError as e:
            where = Path(file.name).parent
            return logger.warning("%s cannot be locked (%s): start nothing else that works there now.", where, e.strerror)


def is_locked(file: IO) -> bool:
    """Whether another process has a lock on an open file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    fcntl.flock(file, fcntl.LOCK_UN)
    return False
