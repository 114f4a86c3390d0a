"""Components too large for the GPU, sent through it in batches: while one is on the bus and summed, the next is gathered."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_demix.checkpoint.dtypes import ITEM_BYTES
from megatron_demix.checkpoint.live import LiveTensor
from megatron_demix.merge import cuda
from megatron_demix.merge.components import Components
from megatron_demix.merge.plan import Box, BytePlan

if TYPE_CHECKING:
    import torch

# Of all sources of one batch together. Two such buffers are pinned, and two lie on the device.
BATCH_BYTES = 64 << 20
_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements [start, start + count) of one live tensor, flattened. at: bytes of one source before it in its batch."""

    tensor: int
    start: int
    count: int
    at: int


@dataclass(slots=True)
class Batch:
    """Pieces gathered together. source_bytes: what one source of each takes."""

    plan: BytePlan
    pieces: list[Piece] = field(default_factory=list)
    source_bytes: int = 0

    def addresses(self, base: int, num_sources: int) -> np.ndarray:
        """[pieces, sources] where to gather, in a buffer at `base`: piece after piece, source after source."""
        padded = np.diff([*(p.at for p in self.pieces), self.source_bytes])
        first = base + num_sources * np.array([p.at for p in self.pieces], np.int64)
        return first[:, np.newaxis] + np.arange(num_sources) * padded[:, np.newaxis]


class StreamedComponents:
    """Sums of components that stay on the host (mapped), made by the device; for any number of sets of tensors at once."""

    def __init__(
        self,
        components: Components,
        live: Sequence[LiveTensor],
        threads: int | None,
        device: torch.device,
        *,
        batch_bytes: int = BATCH_BYTES,
        weighted_sum: Callable[..., None] = cuda.weighted_sum,
    ) -> None:
        """live: one set, as a pattern of keys, places and types. weighted_sum: of tensors on `device`.

        Raises RuntimeError as torch does where the device, or what may be pinned, has no room for two batches.
        """
        self._num_components = len(components.checkpoints)
        self._threads, self._device, self._weighted_sum = threads, device, weighted_sum
        self._dtypes = [components.tensors[tensor.key].dtype for tensor in live]
        self._batches = make_batches(components, live, max(1, batch_bytes // self._num_components))
        largest = max((batch.source_bytes for batch in self._batches), default=0)
        with self._on_device() as lanes:
            self._slots = [_Slot(lanes, largest * self._num_components, device) for _ in range(2)]
            self._to_device = lanes.Stream()

    def merge(self, weights_MK: np.ndarray, models: Sequence[Sequence[torch.Tensor]]) -> None:
        """Write mixture m into models[m], contiguous tensors like the live ones: in the device's current stream, as kernels."""
        used = np.flatnonzero(weights_MK.any(axis=0))
        if not used.size:
            for tensor in (tensor for model in models for tensor in model):
                tensor.zero_()
            return
        flat = [[tensor.view(-1) for tensor in model] for model in models]
        with self._on_device() as lanes:
            self._merge(lanes, weights_MK[:, used], used, flat)

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[Any]:
        """The module that has the device's streams and events; torch.cpu's do nothing."""
        import torch

        on_cuda = self._device.type == "cuda"
        with torch.cuda.device(self._device) if on_cuda else contextlib.nullcontext():
            yield torch.cuda if on_cuda else torch.cpu

    def _merge(self, lanes: Any, weights_MK: np.ndarray, used: np.ndarray, flat: Sequence[Sequence[torch.Tensor]]) -> None:
        one_hots = np.eye(self._num_components)[used]
        summing, to_device = lanes.current_stream(), self._to_device
        to_device.wait_stream(summing)  # whatever used this memory before
        for i, batch in enumerate(self._batches):
            slot = self._slots[i % 2]
            slot.copied.synchronize()  # the batch before last has left the pinned buffer
            addresses = batch.addresses(slot.pinned.data_ptr(), len(used))
            batch.plan.native.run(one_hots[np.newaxis], addresses_TM=addresses, threads=self._threads)
            size = batch.source_bytes * len(used)
            with lanes.stream(to_device):
                to_device.wait_event(slot.summed)  # ... and its sums are made
                slot.device[:size].copy_(slot.pinned[:size], non_blocking=True)
                slot.copied.record(to_device)
            summing.wait_event(slot.copied)
            self._sum(batch, slot, weights_MK, flat)
            slot.summed.record(summing)

    def _sum(self, batch: Batch, slot: _Slot, weights_MK: np.ndarray, flat: Sequence[Sequence[torch.Tensor]]) -> None:
        import torch

        offsets = batch.addresses(0, weights_MK.shape[1]).tolist()
        for piece, starts in zip(batch.pieces, offsets, strict=True):
            dtype = self._dtypes[piece.tensor]
            size = piece.count * ITEM_BYTES[dtype]
            sources = [slot.device[at : at + size].view(getattr(torch, dtype)) for at in starts]
            outs = [tensors[piece.tensor][piece.start : piece.start + piece.count] for tensors in flat]
            self._weighted_sum(sources, outs, weights_MK)


class _Slot:
    """The buffers of one of the two batches under way, and the events that say when they are free."""

    def __init__(self, lanes: Any, num_bytes: int, device: torch.device) -> None:
        import torch

        self.pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.device = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.copied, self.summed = lanes.Event(), lanes.Event()


def make_batches(components: Components, live: Sequence[LiveTensor], source_bytes: int) -> list[Batch]:
    """The live tensors, cut into pieces and the pieces put together, so that one source of a batch takes about source_bytes."""
    batches: list[Batch] = []
    for index, tensor in enumerate(live):
        dtype = components.tensors[tensor.key].dtype
        start = 0
        for offset, shape in _cut(tuple(tensor.global_offset), tensor.box_shape, max(1, source_bytes // ITEM_BYTES[dtype])):
            count = math.prod(shape)
            size = _padded(count * ITEM_BYTES[dtype])
            if not batches or batches[-1].source_bytes + size > source_bytes:
                batches.append(Batch(BytePlan(components)))
            batch = batches[-1]
            batch.plan.add(Box(tensor.key, offset, shape, dtype))
            batch.pieces.append(Piece(index, start, count, batch.source_bytes))
            batch.source_bytes += size
            start += count
    return batches


def _cut(offset: tuple[int, ...], shape: tuple[int, ...], most: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Boxes of at most `most` elements that follow one another in a contiguous tensor of this box."""
    if 0 in shape:
        return
    axis = next((d for d, n in enumerate(shape) if n > 1), None)
    if axis is None or math.prod(shape) <= most:
        yield offset, shape
        return
    row = math.prod(shape[axis + 1 :])
    rows = max(1, most // row)
    for at in range(0, shape[axis], rows):
        part = (*shape[:axis], min(rows, shape[axis] - at), *shape[axis + 1 :])
        yield from _cut((*offset[:axis], offset[axis] + at, *offset[axis + 1 :]), part, most)


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
