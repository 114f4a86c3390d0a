"""Surrogates of many scores of the same proxies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from megatron_demix.search.processes import results
from megatron_demix.search.surrogate import Surrogate, check_fit, check_shapes, fit_surrogate


def fit_scores(
    shares_MD: np.ndarray,
    scores: Mapping[str, np.ndarray],
    kind: str = "auto",
    *,
    seed: int = 0,
    num_dropped: int = 0,
) -> Iterator[tuple[str, Surrogate]]:
    """Name and fit_surrogate of each of the scores_M, in their order; NaN where a proxy does not have one.

    In processes where that pays. Raises as fit_surrogate does, before any fit is begun.
    """
    fits: list[Callable[[], Surrogate]] = []
    for name, given in scores.items():
        scores_M = np.asarray(given, np.float64)
        check_shapes(shares_MD, scores_M, name)
        measured_M = np.isfinite(scores_M)
        check_fit(shares_MD[measured_M], scores_M[measured_M], kind, name)
        only: dict[str, Any] = {} if measured_M.all() else {"measured_M": measured_M}
        more = {"seed": seed, "name": name, "num_dropped": num_dropped, **only}
        fits.append(partial(fit_surrogate, shares_MD, scores_M, kind, **more))
    yield from zip(scores, results(fits), strict=True)
