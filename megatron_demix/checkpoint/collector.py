"""Python's search for reference cycles, off while there are very many objects and none of them is in one."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collector() -> Iterator[None]:
    """No search for reference cycles meanwhile: nothing that is made of chunks has any, and where there are tens of thousands
    of them (experts, an optimizer's shards), looking through all of it again and again takes long."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
