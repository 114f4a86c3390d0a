"""The compiled core, and what this machine can do. The only importer of megatron_demix._core.

Everything that crosses into C++ is checked here: dtype, contiguity, size, and that the memory outlives its use.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megatron_demix.errors import ConfigError

try:
    from megatron_demix import _core
except ImportError as e:
    raise ConfigError(
        f"the compiled core of megatron_demix cannot be loaded ({e}). Build it with `make`, or `pip install .` where a C++17 "
        "compiler is installed."
    ) from e


# --- this machine ---------------------------------------------------------------------------------------------------


def instruction_sets() -> list[str]:
    """The instruction sets with kernels that this processor has, the fastest last."""
    return _core.instruction_sets()


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


# --- checksums ------------------------------------------------------------------------------------------------------


def crc32(buffer: Any) -> int:
    """The CRC-32 of zip files, of any contiguous buffer (bytes, memoryview, array)."""
    return _core.crc32(np.frombuffer(buffer, np.uint8) if memoryview(buffer).nbytes else b"")


# --- merging --------------------------------------------------------------------------------------------------------

_DTYPES = {
    "float32": _core.DType.f32,
    "bfloat16": _core.DType.bf16,
    "float16": _core.DType.f16,
    "raw8": _core.DType.raw8,
}
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "raw8": 1}


class MergePlan:
    """Which bytes of K sources make which bytes of which targets: built once, run for any weights (csrc/merge.hpp).

    A target is a contiguous box of elements; its regions tile it; in a region each source is one strided view of a record
    (the payload of one chunk of one checkpoint). dtype names: float32, bfloat16, float16, and raw8 for bytes that are copied
    from the first source.
    """

    def __init__(self, num_sources: int) -> None:
        self.num_sources = num_sources
        self._plan = _core.MergePlan(num_sources)
        self._records: list[np.ndarray] = []
        self._targets: list[tuple[int, str]] = []

    @property
    def target_bytes(self) -> list[int]:
        """[T] size of each target, in its output dtype."""
        return [n * _ITEM_BYTES[dtype] for n, dtype in self._targets]

    def add_record(self, data: np.ndarray, crc: int) -> int:
        """data: contiguous uint8, kept alive by the plan. crc: the CRC-32 its container promises. Returns its index."""
        if data.dtype != np.uint8 or not data.flags.c_contiguous:
            raise ValueError("a record is a contiguous uint8 array")
        self._records.append(data)
        return self._plan.add_record(data.ctypes.data, data.nbytes, crc)

    def add_target(self, shape: Sequence[int], dtype_in: str, dtype_out: str) -> int:
        """A box of 1 to 8 dimensions. Returns its index."""
        index = self._plan.add_target(list(shape), _DTYPES[dtype_in], _DTYPES[dtype_out])
        self._targets.append((int(np.prod(shape, dtype=np.int64)), dtype_out))
        return index

    def add_region(
        self,
        target: int,
        lo: Sequence[int],
        hi: Sequence[int],
        records: Sequence[int],
        byte_offsets: Sequence[int],
        strides: Sequence[Sequence[int]],
        *,
        weight_set: int = 0,
    ) -> None:
        """[lo, hi) of a target. records, byte_offsets: [K] where the source's element at `lo` lies; strides: [K][dims], elements."""
        self._plan.add_region(
            target, list(lo), list(hi), weight_set, list(records), list(byte_offsets), [s for row in strides for s in row]
        )

    def run(
        self,
        weights_SMK: np.ndarray,
        *,
        addresses_TM: np.ndarray | None = None,
        descriptors_TM: np.ndarray | None = None,
        offsets_T: Sequence[int] = (),
        threads: int | None = None,
        tile_bytes: int = 256 << 10,
        check_sources: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> dict[str, Any]:
        """Write all M mixtures of all targets, to memory or to files (at offsets_T of descriptors_TM), in one read.

        A weight of exactly 0 leaves its source out and a lone weight of 1 copies bits, so a one-hot mixture is its component.
        progress: called with the bytes done so far, about ten times a second. Returns {"crcs": [T * M], "damaged": [record
        indices whose bytes differ from their CRC, if check_sources]}. Raises OSError when a write fails, and passes on
        KeyboardInterrupt after the threads have stopped.
        """
        weights = np.ascontiguousarray(weights_SMK, np.float32)
        if not np.isfinite(weights).all():
            raise ValueError("merge weights must be finite in float32")
        num_results = (len(self._targets), weights.shape[1])
        for name, given in (("addresses", addresses_TM), ("descriptors", descriptors_TM)):
            if given is not None and given.shape != num_results:
                raise ValueError(f"{name} have shape {given.shape}, expected {num_results}")
        if (addresses_TM is None) == (descriptors_TM is None):
            raise ValueError("give either addresses or descriptors")
        arguments = (
            weights,
            [] if addresses_TM is None else addresses_TM.ravel().tolist(),
            [] if descriptors_TM is None else descriptors_TM.ravel().tolist(),
            list(offsets_T),
            threads or default_threads(),
            instruction_set(),
            tile_bytes,
            check_sources,
        )
        outcome = self._watched(arguments, progress) if progress else self._plan.run(*arguments)
        if outcome["error"]:
            raise OSError(outcome["error"], os.strerror(outcome["error"]), f"target {outcome['failed_target']}")
        return outcome

    def _watched(self, arguments: tuple, progress: Callable[[int], None]) -> dict[str, Any]:
        outcome: dict[str, Any] = {}

        def work() -> None:
            try:
                outcome.update(self._plan.run(*arguments))
            except BaseException as e:  # handed to the waiting thread below
                outcome["exception"] = e

        worker = threading.Thread(target=work)
        worker.start()
        try:
            while worker.is_alive():
                worker.join(0.1)
                progress(self._plan.done_bytes())
        except BaseException:
            self._plan.cancel()
            worker.join()
            raise
        if "exception" in outcome:
            raise outcome["exception"]
        return outcome
