"""Locks on files (flock): the kernel frees them when the last process that holds them has ended, however it ended."""

from __future__ import annotations

import fcntl
import logging
import math
import time
from pathlib import Path
from typing import IO

from megatron_demix.errors import Incomplete

_POLL_S = 0.2
logger = logging.getLogger(__name__)


def take_lock(file: IO, holder: str, *, wait_s: float = math.inf, shared: bool = False) -> None:
    """Lock an open file, for this process and those that inherit it. A lock it has already becomes the one asked for.

    shared: together with others that ask for a shared one. Raises Incomplete, which names `holder`, where others have it for
    longer than `wait_s`. Where the file system has no locks (Lustre mounted without flock) there is a warning instead.
    """
    deadline = time.monotonic() + wait_s
    while True:
        try:
            return fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                waited = f" after {wait_s:g} s" if wait_s >= 1 else ""
                raise Incomplete(f"{holder}: still running{waited}. Let it finish or stop it, then run again.") from None
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
