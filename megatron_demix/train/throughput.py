"""What a GPU could do, and what of its memory is in use: None on a CPU."""

from __future__ import annotations

import re

import torch

from megatron_demix.train.compat import on_cpu

# Dense bfloat16 FLOP/s with float32 sums, from NVIDIA's data sheets (half of what they give with sparsity), by the words that
# the device's name holds; the first that fit count. Editions of a card with another peak stand before it, or do not fit.
_PEAK_FLOPS = {
    "GB300": 2.5e15,
    "B300": 2.25e15,
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "GH200": 989e12,
    "(H100|H200) NVL": 835e12,
    "(H100|H800) PCIe": 756e12,
    "H100|H200|H800": 989e12,
    "H20": 148e12,
    "A100|A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "RTX PRO 6000 Blackwell Workstation": 503.8e12,
    "GeForce RTX 4090$": 165.2e12,
}


def device_peak_flops(precision: str) -> float | None:
    """FLOP/s of this rank's device where a model of this precision is trained. None for a CPU, a part of a GPU (MIG), a device
    that is not in the table, and for float32: what that can reach depends on whether torch may round its factors."""
    if on_cpu() or precision != "bf16":
        return None
    name = torch.cuda.get_device_name()
    if "MIG" in name:
        return None
    return next((peak for part, peak in _PEAK_FLOPS.items() if re.search(rf"\b({part})\b", name)), None)


def device_memory_bytes() -> int | None:
    """Most memory this rank's tensors have taken on its device so far; None for a CPU."""
    return None if on_cpu() else torch.cuda.max_memory_allocated()
