"""Whether boxes cover their tensor: each element once, none left out."""

from __future__ import annotations

import random
from functools import lru_cache

import numpy as np

from megatron_demix.checkpoint.metadata import Shape

_PRIME = 2**31 - 1


@lru_cache(maxsize=1024)  # tensors of one shape, and components, are mostly cut alike
def tile(shape: Shape, boxes: tuple[tuple[Shape, Shape], ...]) -> bool:
    """True if the boxes (offset, shape), which lie within the shape, hold each of its elements exactly once.

    Every interval between two cuts of an axis gets a random length: the boxes' volumes then add up to the shape's only if they
    tile it, but for a chance of dims / 2^31 (the Schwartz-Zippel lemma). A sum takes no comparing of all pairs of boxes.
    """
    if len(boxes) == 1:
        return boxes[0][1] == shape
    draw = random.Random(0)
    volumes, whole = np.ones(len(boxes), np.uint64), 1
    for axis, size in enumerate(shape):
        lo = np.array([offset[axis] for offset, _ in boxes], np.int64)
        hi = lo + np.array([size[axis] for _, size in boxes], np.int64)
        edges = np.array(sorted({0, size, *lo.tolist(), *hi.tolist()}), np.int64)
        places = np.array([draw.randrange(_PRIME) for _ in edges], np.uint64)
        first, last = (places[np.searchsorted(edges, at)] for at in (lo, hi))
        volumes = volumes * ((last + np.uint64(_PRIME) - first) % _PRIME) % _PRIME
        whole = whole * int((int(places[-1]) - int(places[0])) % _PRIME) % _PRIME
    return int(volumes.sum()) % _PRIME == whole
