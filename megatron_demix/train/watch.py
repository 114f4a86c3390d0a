"""What a run watches for: requests to stop, and the detection of a rank that hangs."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_demix.errors import StageFailed
from megatron_demix.units import format_duration

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""SIGTERM: pre-emption and scancel. SIGUSR1: what sbatch --signal sends before a time limit."""


class StopRequest:
    """Truthy once this process has been asked to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Note STOP_SIGNALS instead of dying from them; the loop asks between two steps. Main thread only."""
    request = StopRequest()

    def note(signum: int, frame: object) -> None:
        request.signal = signal.Signals(signum)

    previous = {s: signal.signal(s, note) for s in STOP_SIGNALS}
    try:
        yield request
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


class Watchdog:
    """Ends this process, after printing the stacks of its threads, when it makes no progress for `timeout_s`.

    A rank that waits in a collective for another that died or hangs would otherwise wait for ever, and hold its machine.
    `kill -USR2 <pid>` prints the stacks at any time.
    """

    def __init__(self, name: str, rank: int, timeout_s: float) -> None:
        self._name, self._rank, self._timeout_s = name, rank, timeout_s
        self._what, self._since = "starting", time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        faulthandler.unregister(signal.SIGUSR2)

    def progress(self, what: str) -> None:
        """The process lives and now begins `what`."""
        self._what, self._since = what, time.monotonic()

    def _watch(self) -> None:
        while not self._stop.wait(min(5.0, self._timeout_s / 4)):
            waited_s = time.monotonic() - self._since
            if waited_s > self._timeout_s:
                print(
                    f"error (rank {self._rank}): run {self._name}: {self._what} has not ended within "
                    f"{format_duration(waited_s)} (train.timeout). A rank hangs or is gone; run again to go on from the last "
                    "checkpoint. Stacks of this rank's threads:",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(file=2, all_threads=True)
                os._exit(StageFailed.exit_code)
