"""Surrogates of many scores of the same proxies: fitted one by one, or in processes once that is seen to pay."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from megatron_demix.process import die_with_parent
from megatron_demix.search.surrogate import Surrogate, check_fit, check_shapes, fit_surrogate

_PAYS = 10.0
"""Seconds of work left from which processes are started: each takes about 2 to import what it needs."""


def fit_scores(
    shares_MD: np.ndarray,
    scores: Mapping[str, np.ndarray],
    kind: str = "auto",
    *,
    seed: int = 0,
    num_dropped: int = 0,
) -> Iterator[tuple[str, Surrogate]]:
    """Name and fit_surrogate of each of the scores_M, in their order; NaN where a proxy does not have one.

    The numbers depend neither on how many cores this process has, nor on how many threads the libraries would use: each fit has
    one. Raises as fit_surrogate does, before any fit is begun.
    """
    import joblib

    fits: dict[str, dict[str, Any]] = {}
    for name, given in scores.items():
        scores_M = np.asarray(given, np.float64)
        check_shapes(shares_MD, scores_M, name)
        measured_M = np.isfinite(scores_M)
        check_fit(shares_MD[measured_M], scores_M[measured_M], kind, name)
        only = {} if measured_M.all() else {"measured_M": measured_M}
        fits[name] = {"scores_M": scores_M, "seed": seed, "name": name, "num_dropped": num_dropped, **only}
    processes = joblib.cpu_count()
    for done, name in enumerate(scores, start=1):
        started = time.perf_counter()
        surrogate = _fit(shares_MD, kind, fits.pop(name))
        took = time.perf_counter() - started
        yield name, surrogate
        # The first imports libraries, and decomposes for all: it is no measure.
        if done > 1 and min(processes, len(fits)) > 1 and took * len(fits) > _PAYS:
            for name, surrogate in zip(
                list(fits), _in_processes(shares_MD, kind, list(fits.values()), processes), strict=False
            ):
                del fits[name]
                yield name, surrogate
            break
    for name, fit in fits.items():  # of processes that were killed: there may be too little memory for several
        yield name, _fit(shares_MD, kind, fit)


def _fit(shares_MD: np.ndarray, kind: str, fit: Mapping[str, Any]) -> Surrogate:
    import scipy.linalg  # noqa: F401  # brings linear algebra of its own, which is only limited once it is there
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        return fit_surrogate(shares_MD, kind=kind, **fit)


def _fit_apart(shares_MD: np.ndarray, kind: str, fit: Mapping[str, Any]) -> Surrogate:
    die_with_parent()
    return _fit(shares_MD, kind, fit)


def _in_processes(shares_MD: np.ndarray, kind: str, fits: list[dict[str, Any]], processes: int) -> Iterator[Surrogate]:
    import joblib
    from joblib.externals.loky import get_reusable_executor
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    # Arrays are sent, not left in files for the processes to share.
    parallel = joblib.Parallel(min(processes, len(fits)), "loky", return_as="generator", max_nbytes=None, batch_size=1)
    try:
        with suppress(TerminatedWorkerError):
            yield from parallel(joblib.delayed(_fit_apart)(shares_MD, kind, fit) for fit in fits)
    finally:
        # Or they wait for minutes, with all that they have imported, for more to do.
        get_reusable_executor().shutdown(wait=True, kill_workers=True)
