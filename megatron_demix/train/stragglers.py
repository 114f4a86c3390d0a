"""Which replica makes all others wait: a slow machine shows in its time to the gradients, before they are exchanged."""

from __future__ import annotations

import socket
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_demix.train.compat import on_cpu

NOTABLE = 1.5
"""Times the median from which on a rank is a straggler: less is common where machines differ or are shared."""


class StepClock:
    """Measures this rank's own part of each step: from its start to its gradients, before it waits for other replicas."""

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._start: torch.cuda.Event | float = 0.0

    def start(self) -> None:
        self._start = _now()

    def stop(self) -> None:
        begun, ended = self._start, _now()
        if isinstance(begun, float):
            assert isinstance(ended, float)
            self._seconds.append(ended - begun)
        else:
            assert not isinstance(ended, float)
            self._marks.append((begun, ended))  # the device has not come so far yet

    def mean_s(self) -> float:
        """Of the steps since this was last asked; waits for the device."""
        for begun, ended in self._marks:
            ended.synchronize()
            self._seconds.append(begun.elapsed_time(ended) / 1000)
        mean = statistics.fmean(self._seconds) if self._seconds else 0.0
        self._seconds, self._marks = [], []
        return mean


def _now() -> torch.cuda.Event | float:
    if on_cpu():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@dataclass(frozen=True)
class RankTime:
    """One rank's own part of a step. place: what it has in common with the ranks that do the same work on other data."""

    rank: int
    host: str
    place: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class Straggler:
    rank: int
    host: str
    ratio: float
    """Its time over the median of the ranks that do the same work."""

    @property
    def is_notable(self) -> bool:
        return self.ratio >= NOTABLE


def slowest(times: Sequence[RankTime]) -> Straggler | None:
    """The rank that is furthest behind its like; None where no rank has its like."""
    groups = defaultdict(list)
    for t in times:
        groups[t.place].append(t)
    found = [
        Straggler(t.rank, t.host, t.seconds / median)
        for group in groups.values()
        if len(group) > 1 and (median := statistics.median_low([t.seconds for t in group])) > 0
        for t in group
    ]
    return max(found, key=lambda s: s.ratio, default=None)


def compare_ranks(clock: StepClock) -> Straggler | None:
    """Called by every rank at the same time: the slowest rank since the last call, on all ranks."""
    from megatron.core import parallel_state

    seconds = clock.mean_s()
    if parallel_state.get_data_parallel_world_size() == 1:
        return None
    place = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
    )
    own = RankTime(torch.distributed.get_rank(), socket.gethostname(), place, seconds)
    times: list[RankTime | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(times, own)
    return slowest([t for t in times if t is not None])
