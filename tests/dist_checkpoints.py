"""Small torch_dist checkpoints for tests, written the way torch and Megatron write them, by none of the code under test.

Elements are whole tensors given with the grid they are cut by; a chunk is torch.save'd, chunks are concatenated unpadded, and
`.metadata` is a pickle of torch's own classes.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

Cuts = Sequence[Sequence[int]]  # one axis each: the positions where chunks end, the size included
Boxes = Sequence[tuple[Sequence[int], Sequence[int]]]  # (offset, shape) of each chunk


def even_cuts(shape: Sequence[int], parts: Sequence[int]) -> list[list[int]]:
    """Cuts into equal parts by axis: even_cuts((4, 8), (1, 2)) == [[4], [4, 8]]."""
    return [[size * (i + 1) // n for i in range(n)] for size, n in zip(shape, parts, strict=True)]


def grid_boxes(axes: Cuts) -> Boxes:
    """The boxes of a grid, in order."""
    spans = [list(itertools.pairwise([0, *ends])) for ends in axes]
    return [([a for a, _ in box], [b - a for a, b in box]) for box in itertools.product(*spans)]


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    cuts: Mapping[str, Cuts] | None = None,
    *,
    objects: Mapping[str, bytes] | None = None,
    num_files: int = 1,
    odd: bool = False,
    transposed: Sequence[str] = (),
    spread: Sequence[str] = (),
    boxes: Mapping[str, Boxes] | None = None,
    common: dict | None = None,
) -> Path:
    """Write a bare torch_dist folder. odd: put 1 to 3 bytes before every chunk, so that payloads lie at any address.
    transposed: keys whose chunks are stored column by column. spread: those whose chunks are every other element of a storage.
    boxes: chunks that are no grid, in place of cuts."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [io.BytesIO() for _ in range(num_files)]
    entries, stored = {}, {}

    def put(data: bytes) -> _StorageInfo:
        n = len(stored) % num_files
        if odd:
            files[n].write(b"x" * (1 + len(stored) % 3))
        at = files[n].tell()
        files[n].write(data)
        return _StorageInfo(f"__{n}_0.distcp", at, len(data))

    for key, value in (objects or {}).items():
        entries[key] = BytesStorageMetadata()
        stored[MetadataIndex(key)] = put(value)
    for key, tensor in tensors.items():
        chunks = []
        axes = (cuts or {}).get(key) or [[n] for n in tensor.shape]
        for offset, size in (boxes or {}).get(key) or grid_boxes(axes):
            part = tensor[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))].clone()
            if key in transposed:
                part = part.transpose(-1, -2).contiguous().transpose(-1, -2)
            if key in spread and part.dim():
                storage = torch.full([2 * n + 1 for n in part.shape], 7.0).to(part.dtype)
                every_other = tuple(slice(1, None, 2) for _ in part.shape)
                storage[every_other] = part
                part = storage[every_other]
            buffer = io.BytesIO()
            torch.save(part, buffer)
            chunks.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(size)))
            stored[MetadataIndex(key, torch.Size(offset))] = put(buffer.getvalue())
        entries[key] = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), tensor.shape, chunks)
    for n, file in enumerate(files):
        (folder / f"__{n}_0.distcp").write_bytes(file.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(entries, storage_data=stored)))
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    args = argparse.Namespace(consumed_train_samples=640, hidden_size=8, params_dtype=torch.bfloat16)
    torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 100} if common is None else common, folder / "common.pt")
    return folder


def read_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor, whole, through torch's own reader."""
    import torch.distributed.checkpoint as dcp

    described = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in described.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def small_model(seed: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Tensors named and shaped as a 2-layer Megatron model's, stacked layers, random values."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "embedding.word_embeddings.weight": (96, 8),
        "decoder.layers.self_attention.linear_qkv.weight": (2, 24, 8),
        "decoder.layers.self_attention.linear_proj.weight": (2, 8, 8),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": (2, 8),
        "decoder.layers.mlp.linear_fc1.weight": (2, 64, 8),
        "decoder.layers.mlp.linear_fc2.weight": (2, 8, 32),
        "decoder.final_layernorm.weight": (8,),
    }
    return {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}


def parallel_cuts(tensor_parallel: int) -> dict[str, Cuts]:
    """How a model of small_model() is cut by layers (pipeline) and tensor parallelism; SwiGLU's fc1 is two chunks a rank."""
    t = tensor_parallel
    return {
        "embedding.word_embeddings.weight": even_cuts((96, 8), (t, 1)),
        "decoder.layers.self_attention.linear_qkv.weight": even_cuts((2, 24, 8), (2, t, 1)),
        "decoder.layers.self_attention.linear_proj.weight": even_cuts((2, 8, 8), (2, 1, t)),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": even_cuts((2, 8), (2, 1)),
        "decoder.layers.mlp.linear_fc1.weight": even_cuts((2, 64, 8), (2, 2 * t, 1)),
        "decoder.layers.mlp.linear_fc2.weight": even_cuts((2, 8, 32), (2, 1, t)),
    }


def saved(value: object) -> bytes:
    """As torch.save writes it, and Megatron's checkpoints hold objects."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def three_components(folder: Path) -> dict[str, Path]:
    """Of one model, by name, cut for different tensor parallelism, at odd addresses."""
    return {
        name: write_checkpoint(
            folder / name,
            small_model(seed),
            parallel_cuts(tp),
            num_files=tp,
            odd=True,
            objects={"x._extra_state/shard_0_1": saved([name])},
        )
        for seed, (name, tp) in enumerate({"a": 1, "b": 2, "c": 4}.items())
    }


def one_large_tensor(folder: Path, seed: int, num: int = 1 << 20) -> Path:
    """A component with a tensor that is read in several pieces."""
    values = torch.randn(num, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return write_checkpoint(folder, {"decoder.final_layernorm.weight": values}, {})


def blob_of(tensor: torch.Tensor) -> np.ndarray:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def edited_metadata(folder, edit):

    metadata: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    edit(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
