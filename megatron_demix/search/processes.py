"""Jobs that do not depend on one another: one by one, or in processes once that is seen to pay."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import TypeVar

from megatron_demix.process import die_with_parent

_PAYS = 10.0
"""Seconds of work left from which processes are started: each takes about 2 to import what it needs."""
_Result = TypeVar("_Result")


def results(jobs: Iterable[Callable[[], _Result]]) -> Iterator[_Result]:
    """What each job returns, in their order. They have to be alike in length, and such that they can be sent to a process.

    The numbers depend neither on how many cores this process has, nor on how many threads the libraries would use: each job has
    one.
    """
    import joblib

    left = deque(jobs)
    processes, done, apart = joblib.cpu_count(), 0, False
    while left:
        started = time.perf_counter()
        result = _here(left.popleft())
        took = time.perf_counter() - started
        done += 1
        yield result
        # The first imports libraries, and decomposes for all: it is no measure.
        if done > 1 and min(processes, len(left)) > 1 and took * len(left) > _PAYS and not apart:
            apart = True  # and what is left of processes that were killed, here: there may be too little memory for several
            for result in _in_processes(list(left), processes):
                left.popleft()
                yield result


def _here(job: Callable[[], _Result]) -> _Result:
    import scipy.linalg  # noqa: F401  # brings linear algebra of its own, which is only limited once it is there
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        return job()


def _apart(job: Callable[[], _Result]) -> _Result:
    die_with_parent()
    return _here(job)


def _in_processes(jobs: list[Callable[[], _Result]], processes: int) -> Iterator[_Result]:
    import joblib
    from joblib.externals.loky import get_reusable_executor
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    # Arrays are sent, not left in files for the processes to share.
    parallel = joblib.Parallel(min(processes, len(jobs)), "loky", return_as="generator", max_nbytes=None, batch_size=1)
    try:
        with suppress(TerminatedWorkerError):
            yield from parallel(joblib.delayed(_apart)(job) for job in jobs)
    finally:
        # Or they wait for minutes, with all that they have imported, for more to do.
        get_reusable_executor().shutdown(wait=True, kill_workers=True)
