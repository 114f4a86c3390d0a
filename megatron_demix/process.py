"""Child processes that run the same software, do not outlive the one that started them, and leave a signal to it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PYTHON_M = (sys.executable, "-P", "-m")
"""Starts a module of ours. -P: not of the folder that this process is in, which may be a checkout, and one of Megatron has a
megatron.core of its own."""


def leave_usr1_to_parent() -> None:
    """As subprocess's preexec_fn: the child, and all it starts, ignore SIGUSR1 unless they set a handler of their own.

    SLURM delivers a signal that is meant for a task to every process the task has started, and most would die of it.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def die_with_parent(signum: int = signal.SIGTERM) -> None:
    """Ask the kernel to send this process `signum` when its parent dies, even by SIGKILL. Linux only; elsewhere nothing.

    For use in a child (subprocess's preexec_fn, or the start of a worker): an orphaned trainer would go on writing into the
    folder that the resumed run works in.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signum, 0, 0, 0)
    if os.getppid() != parent:  # it died before the request took effect
        os.kill(os.getpid(), signum)
