"""Components to measure merges with: Megatron-like checkpoints of any size, in the format torch writes."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)


def model_shapes(parameters: float) -> dict[str, tuple[int, ...]]:
    """Shapes of a Qwen3-like model (SwiGLU, GQA, untied) of about this many parameters, layers stacked as [L, ...]."""
    layers = max(2, round((parameters / 1.7e9) ** (1 / 3) * 28))
    hidden = max(64, round((parameters / (layers * 15.5)) ** 0.5 / 64) * 64)
    vocabulary = max(1024, round(parameters * 0.1 / hidden / 128) * 128)
    return {
        "embedding.word_embeddings.weight": (vocabulary, hidden),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (layers, hidden),
        "decoder.layers.self_attention.linear_qkv.weight": (layers, 2 * hidden, hidden),
        "decoder.layers.self_attention.linear_proj.weight": (layers, hidden, hidden),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": (layers, hidden),
        "decoder.layers.mlp.linear_fc1.weight": (layers, 6 * hidden, hidden),
        "decoder.layers.mlp.linear_fc2.weight": (layers, hidden, 3 * hidden),
        "decoder.final_layernorm.weight": (hidden,),
        "output_layer.weight": (vocabulary, hidden),
    }


def write_component(folder: Path, shapes: dict[str, tuple[int, ...]], seed: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """One chunk a layer (two for fc1), as a data-parallel run saves them, in two files. Returns the bytes of all elements."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    files = [open(folder / f"__0_{n}.distcp", "wb") for n in range(2)]  # noqa: SIM115
    entries, stored, total = {}, {}, 0
    for key, shape in shapes.items():
        boxes = [((0,) * len(shape), shape)]
        if key.startswith("decoder.layers."):
            halves = 2 if key.endswith("fc1.weight") else 1
            rows = shape[1] // halves
            boxes = [
                ((layer, half * rows, *[0] * (len(shape) - 2)), (1, rows, *shape[2:]))
                for layer in range(shape[0])
                for half in range(halves)
            ]
        chunks = []
        for offset, size in boxes:
            # A drawn block, repeated: what is measured does not depend on the values, and drawing them all takes longer.
            count = torch.Size(size).numel()
            drawn = torch.randn(min(count, 1 << 20), generator=generator).to(dtype)
            tensor = drawn.repeat(-(-count // drawn.numel()))[:count].clone().view(size)
            buffer = io.BytesIO()
            torch.save(tensor, buffer)
            file = files[len(stored) % 2]
            stored[MetadataIndex(key, offset)] = _StorageInfo(Path(file.name).name, file.tell(), buffer.tell())
            file.write(buffer.getbuffer())
            chunks.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(size)))
            total += tensor.numel() * tensor.element_size()
        entries[key] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), chunks)
    for file in files:
        file.close()
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(entries, storage_data=stored)))
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    torch.save({"iteration": 0, "checkpoint_version": 3.0}, folder / "common.pt")
    return total
