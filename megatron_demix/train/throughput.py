"""What a GPU could do, and what of its memory is in use: None on a CPU."""

from __future__ import annotations

import torch

from megatron_demix.train.compat import on_cpu

# Dense bfloat16 FLOP/s without sparsity, from NVIDIA's data sheets, by a part of the device's name; the first that fits counts.
_PEAK_FLOPS = {
    "B200": 2.25e15,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
}


def device_peak_flops() -> float | None:
    """bfloat16 FLOP/s of this rank's device, None for a CPU or a device that is not in the table."""
    if on_cpu():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in _PEAK_FLOPS.items() if part in name), None)


def device_memory_bytes() -> int | None:
    """Most memory this rank's tensors have taken on its device so far; None for a CPU."""
    return None if on_cpu() else torch.cuda.max_memory_allocated()
