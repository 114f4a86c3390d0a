"""Models for tests of merge methods: a base and components a little away from it, and their logical tensors cut out by hand."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from dist_checkpoints import Cuts, parallel_cuts, small_model, write_checkpoint

HEADS, GROUPS, CHANNELS = 4, 2, 3  # of small_model's fused attention: 2 groups of (2 + 2) heads of 3 channels are 24 rows
NAMES = ("a", "b", "c")


def model(seed: int | None, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The base (None), or a component: base + .1 * noise of its own."""
    base = {key: value.to(dtype) for key, value in small_model(1000, torch.float32).items()}
    if seed is None:
        return base
    noise = small_model(seed, torch.float32)
    return {key: (value.float() + 0.1 * noise[key]).to(dtype) for key, value in base.items()}


def saved_arguments() -> dict:
    arguments = argparse.Namespace(
        num_attention_heads=HEADS, group_query_attention=True, num_query_groups=GROUPS, kv_channels=CHANNELS, swiglu=True
    )
    return {"args": arguments, "checkpoint_version": 3.0, "iteration": 100}


def write_components(
    root: Path,
    dtype: torch.dtype = torch.float32,
    *,
    layouts: tuple[int, ...] = (1, 2, 4, 1),
    common: dict | None = None,
    change=lambda tensors: tensors,
) -> tuple[dict[str, Path], Path]:
    """(three components by name, their base), cut for the given tensor parallelism each."""
    folders = {}
    for seed, name in enumerate((*NAMES, "origin")):
        tensors = change(model(None if name == "origin" else seed, dtype))
        cuts: dict[str, Cuts] = {k: v for k, v in parallel_cuts(layouts[seed]).items() if k in tensors}
        folders[name] = write_checkpoint(root / name, tensors, cuts, odd=True, common=common or saved_arguments())
    return folders, folders.pop("origin")


def per_layer(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same model with each layer under a key of its own."""
    apart = {}
    for key, value in tensors.items():
        if "decoder.layers." in key:
            apart |= {key.replace("layers.", f"layers.{i}."): layer for i, layer in enumerate(value)}
        else:
            apart[key] = value
    return apart


def logical_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each logical tensor by a name of its own: views, so that writing them writes the model."""
    found = {}
    for key, layer in per_layer(tensors).items():
        if key.endswith("linear_qkv.weight"):
            groups = layer.view(GROUPS, HEADS // GROUPS + 2, CHANNELS, -1)
            found |= {f"{key}[q]": groups[:, :-2], f"{key}[k]": groups[:, -2], f"{key}[v]": groups[:, -1]}
        elif key.endswith("linear_fc1.weight"):
            gate, up = layer.chunk(2)
            found |= {f"{key}[gate]": gate, f"{key}[up]": up}
        else:
            found[key] = layer
    return found
