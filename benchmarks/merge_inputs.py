"""Components to measure merges with: Megatron-like checkpoints of any size, in the format torch writes."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Mapping
from pathlib import Path

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


def write_component(
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    seed: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    beside: Mapping[str, torch.Tensor | bytes] | None = None,
) -> int:
    """One chunk a layer (two for fc1), as a data-parallel run saves them, in two files. Returns the bytes of all elements.

    beside: tensors and objects that are stored with the model, each whole.
    """
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    files = [open(folder / f"__0_{n}.distcp", "wb") for n in range(2)]  # noqa: SIM115
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    stored, total = {}, 0
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
    for key, value in (beside or {}).items():
        file, data, index = files[0], value, MetadataIndex(key)
        if isinstance(value, torch.Tensor):
            buffer = io.BytesIO()
            torch.save(value, buffer)
            data, origin = buffer.getvalue(), torch.Size([0] * value.dim())
            index = MetadataIndex(key, origin)
            chunk = ChunkStorageMetadata(origin, value.shape)
            entries[key] = TensorStorageMetadata(TensorProperties(dtype=value.dtype), value.shape, [chunk])
        else:
            entries[key] = BytesStorageMetadata()
        stored[index] = _StorageInfo(Path(file.name).name, file.tell(), len(data))
        file.write(data)
    for file in files:
        file.close()
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(entries, storage_data=stored)))
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    torch.save({"iteration": 0, "checkpoint_version": 3.0}, folder / "common.pt")
    return total


def write_llama(folder: Path, shapes: dict[str, tuple[int, ...]], names: list[str], weights: dict[str, float]) -> Path:
    """As many parameters as Hugging Face Llama folders, and a mergekit configuration that averages them. Returns its path."""
    import yaml

    layers, _, hidden = shapes["decoder.layers.self_attention.linear_proj.weight"]
    vocabulary = shapes["output_layer.weight"][0]
    per_layer = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (hidden // 2, hidden),
        "self_attn.v_proj.weight": (hidden // 2, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (3 * hidden, hidden),
        "mlp.up_proj.weight": (3 * hidden, hidden),
        "mlp.down_proj.weight": (hidden, 3 * hidden),
    }
    wanted: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }
    for layer in range(layers):
        wanted |= {f"model.layers.{layer}.{name}": shape for name, shape in per_layer.items()}
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 128,
        "vocab_size": vocabulary,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    for seed, name in enumerate(names):
        target = folder / name
        if (target / "model.safetensors").exists():
            continue
        target.mkdir(parents=True, exist_ok=True)
        (target / "config.json").write_text(json.dumps(settings))
        generator = torch.Generator().manual_seed(seed)
        block = torch.randn(1 << 20, generator=generator).to(torch.bfloat16)
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        end = 0
        for key, shape in wanted.items():
            start, end = end, end + 2 * torch.Size(shape).numel()
            header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with open(target / "model.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for shape in wanted.values():
                count = torch.Size(shape).numel()
                tensor = block.repeat(-(-count // block.numel()))[:count].contiguous()
                file.write(tensor.view(torch.uint8).numpy().data)
    config = {
        "merge_method": "linear",
        "dtype": "bfloat16",
        "models": [{"model": str((folder / name).resolve()), "parameters": {"weight": weights[name]}} for name in names],
    }
    path = folder / "merge.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
