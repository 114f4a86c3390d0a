"""Where proxies are summed: on the GPU, from components that live there or are streamed to it, or on the CPU."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_demix.checkpoint.live import LiveTensor
from megatron_demix.errors import ConfigError, VerificationFailed
from megatron_demix.merge import cuda
from megatron_demix.merge.components import Components
from megatron_demix.merge.resident import ResidentComponents, fits_on_device
from megatron_demix.merge.streamed import StreamedComponents

if TYPE_CHECKING:
    import torch


class DeviceMerge:
    """The choice for one set of live tensors, made in the first merge that sums, with the GPU's bits compared with the CPU's.

    Components that fit are kept on the device. Those that do not are streamed where that is measured to be faster than the CPU
    (which sends one result over the bus instead of K sources). MEGATRON_DEMIX_CUDA=0 is the CPU always, 1 the device always.
    """

    def __init__(self, components: Components, live: Sequence[LiveTensor], threads: int | None, *, allowed: bool) -> None:
        """allowed: whether the sum is one that the kernels make. A device without room leaves it to the CPU, with a warning.

        Raises ConfigError where CUDA is asked for, and is not there or has no room; RuntimeError where CUDA fails otherwise."""
        self._method: ResidentComponents | StreamedComponents | None = None
        self._compared = self._chosen = False
        device = _one_device(live)
        if device is None or not allowed or len(components.checkpoints) > cuda.MAX_SOURCES or not cuda.available():
            return
        if not cuda.runs_on(device):
            return
        self._device = device
        try:
            if fits_on_device(components, live, device):
                self._method = ResidentComponents(components, live, threads)
            else:
                self._method = StreamedComponents(components, live, threads, device)
        except RuntimeError as e:
            if not _no_memory(e):
                raise
            why, _, _ = str(e).partition("\n")
            said = f"{device} has no room to merge proxies ({why})"
            if cuda.required():
                raise ConfigError(f"MEGATRON_DEMIX_CUDA is 1, but {said}. Free memory there, or unset it.") from e
            warnings.warn(f"{said}. They are merged on the CPU.", stacklevel=2)

    def merge(
        self, weights_MK: np.ndarray, models: Sequence[Sequence[torch.Tensor]], on_cpu: Callable[[bool], list[list[Staged]]]
    ) -> bool:
        """Write mixture m into models[m], contiguous tensors, and return True; or False if this is the CPU's to do.

        on_cpu: makes the same results, in page-locked memory if they are to be moved fast. Raises VerificationFailed.
        """
        if self._method is None:
            return False
        self._method.merge(weights_MK, models)
        # Mixtures of one component are copies: they say nothing of the kernels, nor of what K sources over the bus cost.
        summed = len(weights_MK[0]) == 1 or bool((np.count_nonzero(weights_MK, axis=1) > 1).any())
        if self._chosen or (self._compared and not summed):
            return True
        may_be_the_cpus = isinstance(self._method, StreamedComponents) and not cuda.required()
        for tensors, results in zip(models, on_cpu(may_be_the_cpus), strict=True):
            for tensor, result in zip(tensors, results, strict=True):
                _compare(tensor, result.written)
        self._compared, self._chosen = True, summed
        if summed and may_be_the_cpus:
            # Both for the second time, when their buffers exist, and until the results are where they belong.
            method = self._method
            if self._seconds(lambda: finish(on_cpu(True))) < self._seconds(lambda: method.merge(weights_MK, models)):
                self._method = None
        return True

    def _seconds(self, run: Callable[[], object]) -> float:
        import torch

        started = time.perf_counter()
        run()
        torch.cuda.synchronize(self._device)
        return time.perf_counter() - started


class Staged:
    """Where the CPU writes a parameter: the parameter itself, or (on a GPU, or not contiguous) a copy that is then moved."""

    def __init__(self, target: torch.Tensor, *, pinned: bool) -> None:
        self._target = target
        direct = target.device.type == "cpu" and target.is_contiguous()
        self.written = target
        if not direct:
            import torch

            try:
                self.written = torch.empty(target.shape, dtype=target.dtype, pin_memory=pinned and target.device.type == "cuda")
            except RuntimeError as e:
                if not _no_memory(e):
                    raise
                # No more may be pinned: the copy takes longer.
                self.written = torch.empty(target.shape, dtype=target.dtype)

    @property
    def address(self) -> int:
        return self.written.data_ptr()

    def finish(self) -> None:
        if self.written is not self._target:
            self._target.copy_(self.written)


def finish(staged: Sequence[Sequence[Staged]]) -> None:
    for result in (result for results in staged for result in results):
        result.finish()


def _one_device(live: Sequence[LiveTensor]) -> torch.device | None:
    devices = {tensor.tensor.device for tensor in live}
    one = next(iter(devices)) if len(devices) == 1 else None
    return one if one is not None and one.type == "cuda" else None


def _no_memory(e: RuntimeError) -> bool:
    """Whether the device, or what may be pinned of the host's memory, is full. torch has a class for the device's alone."""
    said = str(e).lower()
    return "out of memory" in said or "can't allocate memory" in said


def _compare(found: torch.Tensor, expected: torch.Tensor) -> None:
    import torch

    if not torch.equal(found.cpu().reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)):
        raise VerificationFailed(
            "the CUDA merge and the CPU merge of one tensor differ. Set MEGATRON_DEMIX_CUDA=0 to merge on the CPU, and report "
            "the GPU, driver and CUDA version."
        )
