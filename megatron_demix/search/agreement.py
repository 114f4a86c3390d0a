"""How two scorings of the same mixtures agree. Every metric takes both scorings with lower = better, and weighs mixture m by
counts_BM[b, m] in resample b, so that a whole bootstrap is one pass over matrices. Undefined values are NaN."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_TOP_SHARE = 0.25
_TOP_AT_LEAST = 3


def spearman(proxy_M: np.ndarray, reference_M: np.ndarray, counts_BM: np.ndarray) -> np.ndarray:
    """Spearman's rho, ties at their mean rank; NaN where one side is constant."""
    total_B1 = counts_BM.sum(axis=1, keepdims=True)
    left_BM, right_BM = (_ranks(values_M, counts_BM) - (total_B1 + 1) / 2 for values_M in (proxy_M, reference_M))
    scale_B = np.sqrt((counts_BM * left_BM**2).sum(axis=1) * (counts_BM * right_BM**2).sum(axis=1))
    return _ratio((counts_BM * left_BM * right_BM).sum(axis=1), scale_B)


def _ranks(values_M: np.ndarray, counts_BM: np.ndarray) -> np.ndarray:
    """Mean rank of each mixture among all its copies and ties, in each resample."""
    _, group_M = np.unique(values_M, return_inverse=True)
    order_M = np.argsort(group_M, kind="stable")
    starts = np.flatnonzero(np.diff(group_M[order_M], prepend=-1))
    counts_BG = np.add.reduceat(counts_BM[:, order_M], starts, axis=1)
    return (np.cumsum(counts_BG, axis=1) - (counts_BG - 1) / 2)[:, group_M]


def _ratio(above_B: np.ndarray, below_B: np.ndarray) -> np.ndarray:
    return np.divide(above_B, below_B, out=np.full(len(above_B), np.nan), where=below_B > 0)


def _pairs(signs_MM: np.ndarray, counts_BM: np.ndarray) -> np.ndarray:
    """The sum over ordered pairs of each resample. Copies of one mixture have sign 0: they are no pair."""
    return ((counts_BM @ signs_MM) * counts_BM).sum(axis=1)


def _signs(values_M: np.ndarray) -> np.ndarray:
    return np.sign(values_M[:, None] - values_M)


def kendall(proxy_M: np.ndarray, reference_M: np.ndarray, counts_BM: np.ndarray) -> np.ndarray:
    """Kendall's tau-b; NaN where one side is constant."""
    left_MM, right_MM = _signs(proxy_M), _signs(reference_M)
    scale_B = np.sqrt(_pairs(np.abs(left_MM), counts_BM) * _pairs(np.abs(right_MM), counts_BM))
    return _ratio(_pairs(left_MM * right_MM, counts_BM), scale_B)


def pairwise_accuracy(proxy_M: np.ndarray, reference_M: np.ndarray, counts_BM: np.ndarray) -> np.ndarray:
    """The part of the pairs that the references tell apart and the proxies order alike; a proxy's tie counts one half."""
    left_MM, right_MM = _signs(proxy_M), _signs(reference_M)
    return (_ratio(_pairs(left_MM * right_MM, counts_BM), _pairs(np.abs(right_MM), counts_BM)) + 1) / 2


def top_spearman(proxy_M: np.ndarray, reference_M: np.ndarray, counts_BM: np.ndarray) -> np.ndarray:
    """Spearman's rho among the best 25 % by the references, and those that are equal to the last of them; NaN where those are
    fewer than 3 (below 12 mixtures)."""
    best = np.argsort(reference_M, kind="stable")
    sorted_BM = counts_BM[:, best]
    count = int(counts_BM[0].sum() * _TOP_SHARE)
    if count < _TOP_AT_LEAST:
        return np.full(len(counts_BM), np.nan)
    before_BM = np.cumsum(sorted_BM, axis=1) - sorted_BM
    last_B1 = np.where((before_BM < count) & (sorted_BM > 0), reference_M[best], -np.inf).max(axis=1, keepdims=True)
    return spearman(proxy_M[best], reference_M[best], sorted_BM * (reference_M[best] <= last_B1))


def recovery(proxy_M: np.ndarray, reference_M: np.ndarray, counts_BM: np.ndarray) -> np.ndarray:
    """How much of the trained models' scores the proxies keep, 1 = all: the mean ratio of proxy to reference, or of
    reference to proxy for losses. NaN where the scores are not all of one sign."""
    signs = np.unique(np.sign(np.concatenate([proxy_M, reference_M])))
    if len(signs) > 1 or signs[0] == 0:
        return np.full(len(counts_BM), np.nan)
    # Scores of which more is better arrive negated.
    ratios_M = reference_M / proxy_M if signs[0] > 0 else proxy_M / reference_M
    return counts_BM @ ratios_M / counts_BM.sum(axis=1)


def regret(proxy_M: np.ndarray, reference_M: np.ndarray, counts_BM: np.ndarray) -> np.ndarray:
    """What picking the proxies' best mixture costs: its reference score less the best reference score, in the score's unit.
    Among several that the proxies call best, any is picked alike."""
    drawn_BM = counts_BM > 0
    best_BM = counts_BM * (proxy_M == np.where(drawn_BM, proxy_M, np.inf).min(axis=1, keepdims=True))
    picked_B = (best_BM @ reference_M) / best_BM.sum(axis=1)
    return picked_B - np.where(drawn_BM, reference_M, np.inf).min(axis=1)


METRICS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "spearman": spearman,
    "kendall": kendall,
    "top_spearman": top_spearman,
    "pairwise_accuracy": pairwise_accuracy,
    "recovery": recovery,
    "regret": regret,
}
