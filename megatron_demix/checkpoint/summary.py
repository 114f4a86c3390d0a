"""What a checkpoint holds, as plain data and as text; nothing of it is unpickled or loaded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from megatron_demix.checkpoint.common_state import missing_files
from megatron_demix.checkpoint.dtypes import ITEM_BYTES
from megatron_demix.checkpoint.metadata import TensorInfo
from megatron_demix.checkpoint.reader import Checkpoint, is_model_key
from megatron_demix.checkpoint.run_config import saved_arguments
from megatron_demix.units import format_bytes, format_count

_SHOWN_ARGUMENTS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "seq_length",
    "padded_vocab_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "consumed_train_samples",
)


def summarize(path: Path) -> dict[str, Any]:
    """JSON-able facts: location, iteration, kind, totals, the model's tensors and objects, what else is there, saved arguments.

    Raises as Checkpoint does. Everything that .metadata lists is located (truncated files are found), nothing of it is read.
    """
    checkpoint = Checkpoint(path, read_ahead=False)  # of each chunk, what describes it
    model = checkpoint.model_tensors
    checkpoint.touch_frames(chunk for info in model.values() for chunk in info.chunks)
    for info in model.values():
        for chunk in info.chunks:
            checkpoint.payload(info, chunk)
    objects = checkpoint.model_objects
    for key, location in checkpoint.metadata.objects.items():
        checkpoint.harmless_blob(location, key) if key in objects else checkpoint.blob(location, key)
    others = [info for key, info in checkpoint.metadata.tensors.items() if not is_model_key(key)]
    for info in others:
        for chunk in info.chunks:
            checkpoint.blob(chunk.location, info.key)
    arguments = saved_arguments(checkpoint)
    return {
        "path": str(checkpoint.location.path),
        "kind": checkpoint.location.kind,
        "iteration": checkpoint.location.iteration,
        "parameters": sum(info.elements for info in model.values()),
        "model_bytes": sum(_bytes(info) for info in model.values()),
        "other_tensors": len(others),
        "other_bytes": sum(_bytes(info) for info in others),
        "files": len({c.location.file for info in checkpoint.metadata.tensors.values() for c in info.chunks}),
        "tensors": [_describe(info) for info in model.values()],
        "objects": sorted(checkpoint.metadata.objects),
        "missing": missing_files(checkpoint),
        "arguments": {k: arguments[k] for k in _SHOWN_ARGUMENTS if isinstance(arguments.get(k), (int, float, str))},
    }


def format_summary(facts: dict[str, Any]) -> str:
    """The facts of summarize() as a table."""
    at = "" if facts["iteration"] is None else f", iteration {facts['iteration']}"
    model, beside = format_bytes(facts["model_bytes"]), format_bytes(facts["other_bytes"])
    lines = [
        f"{facts['path']} ({facts['kind']}{at})",
        f"{format_count(facts['parameters'])} parameters in {len(facts['tensors'])} tensors, {model}",
        f"beside the model: {facts['other_tensors']} tensors, {beside}; {len(facts['objects'])} objects",
    ]
    if facts["missing"]:
        lines.append(f"missing: {', '.join(facts['missing'])}; Megatron does not load it like this")
    if facts["arguments"]:
        lines.append(", ".join(f"{k} {v}" for k, v in facts["arguments"].items()))
    keys = [t["key"] if t["key"].isprintable() else ascii(t["key"]) for t in facts["tensors"]]
    width = max(map(len, keys), default=0)
    for key, t in zip(keys, facts["tensors"], strict=True):
        cut = " x ".join(map(str, t["grid"]))
        lines.append(f"{key:{width}}  {t['dtype']:9} {t['shape']!s:24} {t['chunks']} chunks ({cut})")
    return "\n".join(lines)


def _describe(info: TensorInfo) -> dict[str, Any]:
    grid = [len({c.offset[axis] for c in info.chunks}) for axis in range(len(info.shape))]
    return {"key": info.key, "dtype": info.dtype, "shape": list(info.shape), "chunks": len(info.chunks), "grid": grid}


def _bytes(info: TensorInfo) -> int:
    return math.prod(info.shape) * ITEM_BYTES[info.dtype]
