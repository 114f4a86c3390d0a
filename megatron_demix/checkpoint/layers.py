"""Layers by themselves (`decoder.layers.3.mlp...`) or stacked (`decoder.layers.mlp...` as [L, ...]): one seen as the other.

Megatron stacks the layers of a uniform model and stores those of a mixed one (some dense, some with experts) by themselves; the
bytes of a layer are the same. What is changed here is names, shapes and offsets, never a chunk.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from megatron_demix.checkpoint.metadata import TensorInfo

_STACKED = re.compile(r"((?:^|.*\.)layers\.)(?!\d)(.+)")
_SINGLE = re.compile(r"((?:^|.*?\.)layers\.)(\d+)\.(.+)")


def with_keys(tensors: Mapping[str, TensorInfo], keys: Iterable[str]) -> dict[str, TensorInfo]:
    """The tensors, with those of the same layers seen under the names of `keys`. What fits none of them stays as it is."""
    left = dict(tensors)
    found: dict[str, TensorInfo] = {}
    missing = []
    for key in keys:
        if key in left:
            found[key] = left.pop(key)
        else:
            missing.append(key)
    for key in missing:
        if match := _STACKED.fullmatch(key):
            names = [f"{match[1]}{n}.{match[2]}" for n in range(_num_layers(left, match[1], match[2]))]
            if stacked := _stack(key, [left[name] for name in names]):
                found[key] = stacked
                for name in names:
                    del left[name]
    singles: dict[str, list[tuple[int, str]]] = {}
    for key in missing:
        if match := _SINGLE.fullmatch(key):
            singles.setdefault(match[1] + match[3], []).append((int(match[2]), key))
    for stacked_key, layers in singles.items():
        info = left.get(stacked_key)
        if info is not None and info.shape and sorted(n for n, _ in layers) == list(range(info.shape[0])):
            del left[stacked_key]
            found.update({key: _layer(info, n, key) for n, key in layers})
    return found | left


def _num_layers(tensors: Mapping[str, TensorInfo], head: str, tail: str) -> int:
    n = 0
    while f"{head}{n}.{tail}" in tensors:
        n += 1
    return n


def _stack(key: str, layers: list[TensorInfo]) -> TensorInfo | None:
    if not layers or any((info.shape, info.dtype) != (layers[0].shape, layers[0].dtype) for info in layers):
        return None
    chunks = tuple(
        replace(chunk, offset=(n, *chunk.offset), shape=(1, *chunk.shape))
        for n, info in enumerate(layers)
        for chunk in info.chunks
    )
    return TensorInfo(key, layers[0].dtype, (len(layers), *layers[0].shape), chunks)


def _layer(info: TensorInfo, n: int, key: str) -> TensorInfo:
    chunks = [
        replace(chunk, offset=chunk.offset[1:], shape=chunk.shape[1:], layer=n - chunk.offset[0])
        for chunk in info.chunks
        if chunk.offset[0] <= n < chunk.offset[0] + chunk.shape[0]
    ]
    return TensorInfo(key, info.dtype, info.shape[1:], tuple(sorted(chunks, key=lambda c: c.offset)))
