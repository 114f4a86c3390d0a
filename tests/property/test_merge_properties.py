"""Merging over random layouts: however components are cut, stored and merged, the elements are those of the plain sum."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from dist_checkpoints import bits, read_checkpoint, write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_demix.checkpoint.live import LiveTensor
from megatron_demix.merge.engine import merge_checkpoints
from megatron_demix.merge.proxies import ProxyMerger

FEW = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
SPECIAL = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-40, 6e-8])


@st.composite
def cuts(draw, shape):
    """Where chunks end, by axis."""
    ends = []
    for size in shape:
        inner = draw(st.sets(st.integers(1, max(1, size - 1)), max_size=3)) if size > 1 else set()
        ends.append([*sorted(inner), size])
    return ends


@st.composite
def models(draw):
    """(K components of one model: tensors and their cuts, one dtype)."""
    num = draw(st.integers(1, 4))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    shapes = draw(st.lists(st.lists(st.integers(0, 9), max_size=4).map(tuple), min_size=1, max_size=3))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for _ in range(num):
        tensors = {f"w{i}": torch.randn(shape, generator=generator).to(dtype) for i, shape in enumerate(shapes)}
        for tensor in tensors.values():
            if tensor.numel() and draw(st.booleans()):
                at = draw(st.integers(0, tensor.numel() - 1))
                tensor.view(-1)[at] = SPECIAL[draw(st.integers(0, len(SPECIAL) - 1))].to(dtype)
        parts.append((tensors, {f"w{i}": draw(cuts(shape)) for i, shape in enumerate(shapes)}))
    return parts


def write(root, parts, draw):
    folders = {}
    for k, (tensors, where) in enumerate(parts):
        matrices = [key for key, t in tensors.items() if t.dim() >= 2]
        folders[f"c{k}"] = write_checkpoint(
            root / f"c{k}",
            tensors,
            where,
            num_files=draw(st.integers(1, 3)),
            odd=draw(st.booleans()),
            transposed=matrices if draw(st.booleans()) else (),
        )
    return folders


def plain_sum(parts, weights, key):
    """In float32, in order, as fused multiply-adds would give it (float64 products and sums rounded to float32 each step)."""
    total = None
    for (tensors, _), weight in zip(parts, weights, strict=True):
        if weight == 0:
            continue
        term = tensors[key].double() * float(np.float32(weight))
        total = term.float() if total is None else (total.double() + term).float()
    return total


def same(a, b, dtype):
    """Equal bits, any NaN for any NaN. Double rounding through float64 can differ from a fused add by one unit."""
    a, b = a.float(), b.to(dtype).float()
    close = (a == b) | (a.isnan() & b.isnan()) | ((a - b).abs() <= b.abs() * 2.0**-7)
    return bool(close.all())


@FEW
@given(st.data())
def test_one_hot_is_its_component_whatever_the_layouts(data):
    parts = data.draw(models())
    root = Path(tempfile.mkdtemp())
    try:
        folders = write(root, parts, data.draw)
        chosen = data.draw(st.integers(0, len(parts) - 1))
        (path,) = merge_checkpoints(folders, {"m": {f"c{chosen}": 1.0}}, root / "out", progress=False, verify="full")
        merged = read_checkpoint(path / "release")
        assert all(bits(merged[key]) == bits(tensor) for key, tensor in parts[chosen][0].items())
    finally:
        shutil.rmtree(root)


@FEW
@given(st.data())
def test_disk_and_memory_agree_with_the_plain_sum(data):
    parts = data.draw(models())
    dtype = next(iter(parts[0][0].values())).dtype
    raw = data.draw(st.lists(st.integers(0, 8), min_size=len(parts), max_size=len(parts)).filter(any))
    weights = [w / sum(raw) for w in raw]
    named = {f"c{k}": w for k, w in enumerate(weights)}
    root = Path(tempfile.mkdtemp())
    try:
        folders = write(root, parts, data.draw)
        (path,) = merge_checkpoints(
            folders, {"m": named}, root / "out", progress=False, threads=data.draw(st.integers(1, 3)), max_memory=6 << 16
        )
        merged = read_checkpoint(path / "release")
        live = []
        for key, tensor in parts[0][0].items():
            # A rank's part of the tensor: any box, without some of the leading ones.
            lo = [data.draw(st.integers(0, n)) for n in tensor.shape]
            hi = [data.draw(st.integers(a, n)) for a, n in zip(lo, tensor.shape, strict=True)]
            part = torch.full([b - a for a, b in zip(lo, hi, strict=True)], 7.0, dtype=dtype)
            while part.dim() and part.shape[0] == 1 and data.draw(st.booleans()):
                part = part[0]
            live.append(
                (LiveTensor(key, tuple(tensor.shape), tuple(lo), part), tuple(slice(a, b) for a, b in zip(lo, hi, strict=True)))
            )
        ProxyMerger(folders, [tensor for tensor, _ in live], threads=2).merge(named)
        for tensor, box in live:
            assert same(merged[tensor.key], plain_sum(parts, weights, tensor.key), dtype)
            assert bits(tensor.tensor) == bits(merged[tensor.key][box])
    finally:
        shutil.rmtree(root)
