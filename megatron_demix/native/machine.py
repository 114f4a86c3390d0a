"""What this machine can do."""

from __future__ import annotations

import os

from megatron_demix.errors import ConfigError
from megatron_demix.native.core import core


def instruction_sets() -> list[str]:
    """The instruction sets with kernels that this processor has, the fastest last."""
    return core.instruction_sets()


def instruction_set() -> str:
    """The one in use: the fastest here, or what MEGATRON_DEMIX_ISA names. Raises ConfigError if it is not available."""
    wanted = os.environ.get("MEGATRON_DEMIX_ISA", "")
    if wanted and wanted not in instruction_sets():
        raise ConfigError(
            f"MEGATRON_DEMIX_ISA is {wanted!r}; this processor has {', '.join(instruction_sets())}. Unset it or choose one."
        )
    return wanted or instruction_sets()[-1]


def default_threads() -> int:
    """The processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
