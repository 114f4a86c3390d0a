"""A merge's plan: which bytes of the components make which bytes of the results, and its runs for any weights."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Literal

import numpy as np

from megatron_demix.native.core import core
from megatron_demix.native.machine import default_threads, instruction_set

# The core's name of each type it sums, and the bytes of an element.
_DTYPES = {"float32": (core.DType.f32, 4), "bfloat16": (core.DType.bf16, 2), "float16": (core.DType.f16, 2)}

# A thread of a merge into files fills one tile of every mixture while another is on its way to the disk.
BUFFERS_PER_THREAD: int = core.buffers_per_thread


class MergePlan:
    """Which bytes of K sources make which bytes of which targets: built once, run for any weights (csrc/merge.hpp).

    A target is a contiguous box of elements; its regions tile it; in a region each source is one strided view of a record
    (the payload of one chunk of one checkpoint). dtype names: float32, bfloat16, float16.
    """

    def __init__(self, num_sources: int) -> None:
        self.num_sources = num_sources
        self._plan = core.MergePlan(num_sources)
        self._records: list[np.ndarray] = []
        self._targets: list[tuple[int, str]] = []

    @property
    def records(self) -> list[np.ndarray]:
        return self._records

    @property
    def target_bytes(self) -> list[int]:
        """[T] size of each target, in its output dtype."""
        return [n * _DTYPES[dtype][1] for n, dtype in self._targets]

    def add_record(self, data: np.ndarray, crc: int) -> int:
        """data: contiguous uint8, kept alive by the plan. crc: the CRC-32 its container promises. Returns its index."""
        if data.dtype != np.uint8 or not data.flags.c_contiguous:
            raise ValueError("a record is a contiguous uint8 array")
        self._records.append(data)
        address, _ = data.__array_interface__["data"]  # data.ctypes makes an object of its own for each of very many records
        return self._plan.add_record(address, data.nbytes, crc)

    def add_target(self, shape: Sequence[int], dtype_in: str | Sequence[str], dtype_out: str) -> int:
        """A box of 1 to 8 dimensions. dtype_in: of all sources, or [K] of each. Returns its index."""
        stored = [dtype_in] * self.num_sources if isinstance(dtype_in, str) else dtype_in
        index = self._plan.add_target(list(shape), [_DTYPES[dtype][0] for dtype in stored], _DTYPES[dtype_out][0])
        self._targets.append((math.prod(shape), dtype_out))
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
        index: int = 0,
        index_strides: Sequence[int] = (),
    ) -> None:
        """[lo, hi) of a target. records, byte_offsets: [K] where the element at `lo` lies; strides: [K][dims], in elements.

        index, index_strides: which element of its logical tensor (number weight_set) the one at `lo` is, and how that grows
        along each dimension (the last one: 1). Only DeltaRules ask for it.
        """
        flat = [s for row in strides for s in row]
        self._plan.add_region(
            target, list(lo), list(hi), weight_set, list(records), list(byte_offsets), flat, index, list(index_strides)
        )

    def run(
        self,
        weights_SMK: np.ndarray,
        *,
        addresses_TM: np.ndarray | None = None,
        descriptors_TM: np.ndarray | None = None,
        direct_TM: np.ndarray | None = None,
        offsets_T: Sequence[int] = (),
        threads: int | None = None,
        tile_bytes: int = 256 << 10,
        check_sources: bool = False,
        shows_cached: bool = True,
        deltas: DeltaRules | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> dict[str, Any]:
        """Write all M mixtures of all targets, to memory or to files (at offsets_T of descriptors_TM), in one read.

        A weight of exactly 0 leaves its source out and a lone weight of 1 copies bits, so a one-hot mixture is its component.
        weights_SMK: a set for each weight_set that regions name. deltas: the sum is base + scale * sum_k weights[k] *
        (source_k - base) thinned by these rules; the last source is the base, and its weight must not be 0.
        shows_cached: whether the kernel tells this user which pages of the sources are in memory (mincore(2)); if not, all are
        asked for. direct_TM: the same files opened with O_DIRECT (-1: not), used for what is aligned. progress: called with the
        bytes done so far, about ten times a second.
        Returns {"crcs": [T * M], "damaged": [record indices whose bytes differ from their CRC, if check_sources],
        "not_finite": [targets that hold NaN or infinity in some mixture, if they went to files]}. Raises OSError when a write
        fails, and passes on KeyboardInterrupt after the threads stopped.
        """
        weights = np.ascontiguousarray(weights_SMK, np.float32)
        if not np.isfinite(weights).all():
            raise ValueError("merge weights must be finite in float32")
        num_results = (len(self._targets), weights.shape[1])
        for name, given in (("addresses", addresses_TM), ("descriptors", descriptors_TM), ("direct", direct_TM)):
            if given is not None and given.shape != num_results:
                raise ValueError(f"{name} have shape {given.shape}, expected {num_results}")
        if (addresses_TM is None) == (descriptors_TM is None):
            raise ValueError("give either addresses or descriptors")
        arguments = (
            weights,
            [] if addresses_TM is None else addresses_TM.ravel().tolist(),
            [] if descriptors_TM is None else descriptors_TM.ravel().tolist(),
            [] if direct_TM is None else direct_TM.ravel().tolist(),
            list(offsets_T),
            threads or default_threads(),
            instruction_set(),
            tile_bytes,
            check_sources,
            shows_cached,
            deltas.native if deltas else None,
        )
        outcome = self._stoppable(self._plan.run, *arguments, progress=progress)
        if outcome["error"]:
            raise OSError(outcome["error"], os.strerror(outcome["error"]), f"target {outcome['failed_target']}")
        return outcome

    def gram(self, *, from_base: bool = False, threads: int | None = None) -> np.ndarray:
        """[T, J, J] float64: inner products of the sources over each target; from_base: of their differences from the last one,
        and J is one less. Does not depend on threads or on how the sources are cut."""
        num = self.num_sources - from_base
        found = self._stoppable(core.gram, self._plan, from_base, threads or default_threads(), instruction_set())
        return np.array(found).reshape(len(self._targets), num, num)

    def delta_magnitudes(self, ranks_TQ: np.ndarray, *, threads: int | None = None) -> np.ndarray:
        """[T, K, Q] uint32: |float32(source_k - base)| with these ranks (from 0, ascending) in each target, as float32 bits;
        base: the last source. Exact; NaN counts as larger than any number."""
        num_targets, num_ranks = ranks_TQ.shape
        flat = ranks_TQ.ravel().tolist()
        found = self._stoppable(
            core.delta_magnitudes, self._plan, flat, num_ranks, threads or default_threads(), instruction_set()
        )
        return np.array(found, np.uint32).reshape(num_targets, self.num_sources - 1, num_ranks)

    def _stoppable(self, function: Callable[..., Any], *arguments: Any, progress: Callable[[int], None] | None = None) -> Any:
        """Call into the core from a thread of its own, so that an interrupt stops it. It has ended on return, whatever happens:
        it writes to files and memory that are closed and freed then."""
        result: Future[Any] = Future()

        def work() -> None:
            try:
                result.set_result(function(*arguments))
            except BaseException as e:
                result.set_exception(e)

        self._plan.begin()
        worker = threading.Thread(target=work)
        try:
            worker.start()
        except RuntimeError:  # a limit lets no thread start: then nothing can interrupt it
            return function(*arguments)
        try:
            works = True
            while works:
                worker.join(0.1)
                works = worker.is_alive()
                if progress:  # the last time with all that was done
                    progress(self._plan.done_bytes())
        except BaseException:
            try:
                self._plan.end()
            finally:
                self._plan.end()  # where a second interrupt came before the first one
            raise
        return result.result()


class DeltaRules:
    """How the deltas source_k - base are thinned before they are summed (csrc/delta_sum.hpp). S logical tensors, K sources."""

    def __init__(
        self,
        keep: Literal["window", "random", "row_rank"],
        *,
        elect: bool = False,
        average: bool = False,
        scale: float = 1.0,
        density: float = 1.0,
        epsilon: float = 0.0,
        windows_SK2: np.ndarray | None = None,
        streams_SK: np.ndarray | None = None,
        tensors: MergePlan | None = None,
        target_S: Sequence[int] = (),
    ) -> None:
        """windows_SK2: lowest and highest magnitude that stays, as float32 bits (window). streams_SK: uint64 (the others).

        tensors, target_S: a plan of whole logical tensors, and which of its targets each set is, or -1 (row_rank).
        """
        self.native = core.DeltaRules()
        self.native.keep = getattr(core.DeltaRules.Keep, keep)
        self.native.elect, self.native.average, self.native.scale = elect, average, scale
        self.native.density, self.native.epsilon = density, epsilon
        self.native.windows = [] if windows_SK2 is None else windows_SK2.ravel().tolist()
        self.native.streams = [] if streams_SK is None else streams_SK.ravel().tolist()
        self.native.target = list(target_S)
        self._tensors = tensors  # and with it the records that it points into
        if tensors is not None:
            self.native.set_tensors(tensors._plan)
