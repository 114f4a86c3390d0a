"""Merging over random layouts: however components are cut, stored, named and merged, the bits are those of the plain sum."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from dist_checkpoints import bits, grid_boxes, read_checkpoint, write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from merge_reference import linear_merge

from megatron_demix import native
from megatron_demix.checkpoint import writer
from megatron_demix.checkpoint.live import LiveTensor
from megatron_demix.merge.engine import merge_checkpoints
from megatron_demix.merge.logical_tensors import FusedLayout
from megatron_demix.merge.methods_by_name import OPTIONS, make_method
from megatron_demix.merge.proxies import ProxyMerger
from megatron_demix.merge.sparse import THINNINGS

# DEMIX_EXAMPLES=N: so many layouts of each property, for a long run.
FEW = settings(max_examples=int(os.environ.get("DEMIX_EXAMPLES", "20")), suppress_health_check=list(HealthCheck))
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SPECIAL = [float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-40, -1e-45, 6e-8, 3e-5, 65504.0, 3.3e38, -3.3e38]
# Of any size: a float32 denormal, one that is 0 in float32, and sums that overflow are among them.
WEIGHTS = st.sampled_from([0.0, 0.0, 1.0, 1.0, 0.25, 1 / 3, -0.5, 0.7, 1.75, -1.0, 1e-39, 1e-60, 1e30])
STACKED = "decoder.layers."


@dataclass
class Part:
    """One component: its tensors, and how they are stored. single: stacked layers lie by themselves."""

    tensors: dict[str, torch.Tensor]
    boxes: dict[str, list]
    single: bool = False


@st.composite
def boxes(draw, shape):
    """Chunks that tile a shape: a grid, as ranks cut tensors, with some of its boxes cut once more."""
    ends = []
    for size in shape:
        inner = draw(st.sets(st.integers(1, size - 1), max_size=3)) if size > 1 else set()
        ends.append([*sorted(inner), size])
    found = list(grid_boxes(ends))
    for _ in range(draw(st.integers(0, 2))):
        offset, size = found.pop(draw(st.integers(0, len(found) - 1)))
        long = [axis for axis, n in enumerate(size) if n > 1]
        if not long:
            found.append((offset, size))
            continue
        axis = draw(st.sampled_from(long))
        at = draw(st.integers(1, size[axis] - 1))
        rest_offset, first, rest = list(offset), list(size), list(size)
        rest_offset[axis] += at
        first[axis], rest[axis] = at, size[axis] - at
        found += [(offset, first), (rest_offset, rest)]
    return draw(st.permutations(found))


@st.composite
def models(draw, num=None, alike=False):
    """Components of one model: tensors of any rank, tiny and empty ones among them; some are stacks of layers.

    alike: numbers of one sign, so that every method has a result.
    """
    num, dtype = num or draw(st.integers(1, 4)), draw(DTYPES)
    shapes = {}
    for i, shape in enumerate(draw(st.lists(st.lists(st.integers(0, 9), max_size=4).map(tuple), min_size=1, max_size=3))):
        stacked = shape and shape[0] and draw(st.booleans())
        shapes[f"{STACKED}w{i}" if stacked else f"w{i}"] = shape
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    parts = []
    for _ in range(num):
        tensors = {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}
        tensors = {key: t.abs() + 1 if alike else t for key, t in tensors.items()}
        for tensor in tensors.values():
            for _ in range(0 if alike or not tensor.numel() else draw(st.integers(0, 4))):
                at = draw(st.integers(0, tensor.numel() - 1))
                tensor.view(-1)[at] = torch.tensor(draw(st.sampled_from(SPECIAL)), dtype=torch.float64).to(dtype)
        parts.append(layout(draw, tensors))
    return parts


def layout(draw, tensors, single=None):
    """These tensors, stored in some way."""
    single = draw(st.booleans()) if single is None else single
    stored = single_layers(tensors) if single else tensors
    return Part(tensors, {key: draw(boxes(tuple(t.shape))) for key, t in stored.items()}, single)


def single_layers(tensors):
    found = {}
    for key, tensor in tensors.items():
        stacked = key.startswith(STACKED)
        found |= {f"{STACKED}{n}.{key[len(STACKED) :]}": x for n, x in enumerate(tensor)} if stacked else {key: tensor}
    return found


def write(root, parts, draw):
    folders = {}
    for k, part in enumerate(parts):
        tensors = single_layers(part.tensors) if part.single else part.tensors
        matrices = [key for key, t in tensors.items() if t.dim() >= 2]
        how = draw(st.sampled_from(["plain", "transposed", "spread"]))
        folders[f"c{k}"] = write_checkpoint(
            root / f"c{k}",
            tensors,
            boxes=part.boxes,
            num_files=draw(st.integers(1, 3)),
            odd=draw(st.booleans()),
            transposed=matrices if how == "transposed" else (),
            spread=list(tensors) if how == "spread" else (),
        )
    return folders


@contextlib.contextmanager
def somewhere() -> Iterator[Path]:
    # In memory where that is possible: putting thousands of small files on stable storage would take most of the time.
    root = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    try:
        yield root
    finally:
        shutil.rmtree(root)


def merge_anyhow(draw, folders, mixtures, out, **named):
    """Merge with random chunks, threads, memory, instruction set and number of workers; {mixture: tensors}."""
    how = {
        "threads": draw(st.integers(1, 3)),
        "max_memory": draw(st.integers(10, 40)) << 16,
        "max_chunk": draw(st.none() | st.integers(1, 300)),
        "verify": draw(st.sampled_from(["none", "sample", "full"])),
        "progress": False,
        "normalize": "off",
    }
    workers = draw(st.integers(1, 3))
    order = draw(st.permutations(range(workers)))
    isa = {"MEGATRON_DEMIX_ISA": draw(st.sampled_from(native.instruction_sets()))}
    file_bytes = draw(st.sampled_from([64, 1000, 1 << 20]))
    with mock.patch.dict(os.environ, isa), mock.patch.object(writer, "_FILE_BYTES", file_bytes):
        for i in order:
            paths = merge_checkpoints(folders, mixtures, out, worker=None if workers == 1 else (i, workers), **how, **named)
    assert len(paths) == len(mixtures)
    assert sorted(os.listdir(out)) == sorted(mixtures)  # and nothing temporary
    return {name: read_checkpoint(path / "release") for name, path in zip(mixtures, paths, strict=True)}


@FEW
@given(st.data())
def test_disk_and_memory_hold_the_bits_of_the_plain_sum(data):
    draw = data.draw
    parts = draw(models())
    dtype = next(iter(parts[0].tensors.values())).dtype
    rows = draw(st.lists(st.lists(WEIGHTS, min_size=len(parts), max_size=len(parts)), min_size=1, max_size=6))
    mixtures = {f"m{i}": {f"c{k}": w for k, w in enumerate(row)} for i, row in enumerate(rows)}
    named = single_layers if parts[0].single else dict
    with somewhere() as root:
        folders = write(root, parts, draw)
        merged = merge_anyhow(draw, folders, mixtures, root / "out")
        for row, found in zip(rows, merged.values(), strict=True):
            wanted = {key: linear_merge([p.tensors[key] for p in parts], row) for key in parts[0].tensors}
            assert {key: bits(t) for key, t in found.items()} == {key: bits(t) for key, t in named(wanted).items()}

        live = []
        for key, tensor in named(parts[0].tensors).items():
            # A rank's part of the tensor: any box, without some of the leading ones.
            lo = [draw(st.integers(0, n)) for n in tensor.shape]
            hi = [draw(st.integers(a, n)) for a, n in zip(lo, tensor.shape, strict=True)]
            part = torch.full([b - a for a, b in zip(lo, hi, strict=True)], 7.0, dtype=dtype)
            while part.dim() and part.shape[0] == 1 and draw(st.booleans()):
                part = part[0]
            live.append((LiveTensor(key, tuple(tensor.shape), tuple(lo), part), tuple(map(slice, lo, hi))))
        ProxyMerger(folders, [tensor for tensor, _ in live], threads=2).merge(mixtures["m0"], normalize="off")
        for tensor, box in live:
            assert bits(tensor.tensor) == bits(merged["m0"][tensor.key][box])


@FEW
@given(st.data())
def test_no_method_sees_how_components_are_stored(data):
    """Two layouts of the same numbers, merged in two ways."""
    draw = data.draw
    first = draw(models(num=3, alike=True))
    # The first component names the keys, so its layers stay as they are.
    second = [layout(draw, part.tensors, first[0].single if k == 0 else None) for k, part in enumerate(first)]
    name = draw(st.sampled_from(sorted(OPTIONS)))
    needs_base = name in THINNINGS or name == "linear"
    options = {"density": draw(st.sampled_from([0.2, 0.5, 1.0]))} if "density" in OPTIONS[name] else {}
    mixtures = {"even": {"c0": 0.5, "c1": 0.5}, "uneven": {"c0": 0.9, "c1": 0.1}, "one": {"c1": 1.0}}
    with somewhere() as root:
        merged = []
        for number, parts in enumerate((first, second)):
            folders = write(root / f"in{number}", parts, draw)
            base = folders.pop("c2")
            method = make_method(name, base if needs_base else None, layout=FusedLayout(1, 1, False), **options)
            merged.append(merge_anyhow(draw, folders, mixtures, root / f"out{number}", method=method))
        for mixture in mixtures:
            assert {k: bits(t) for k, t in merged[0][mixture].items()} == {k: bits(t) for k, t in merged[1][mixture].items()}
