"""Layers by themselves (`decoder.layers.3.mlp...`) or stacked (`decoder.layers.mlp...` as [L, ...]): one seen as the other.

Megatron stacks the layers of a uniform model and stores those of a mixed one (some dense, some with experts) by themselves; the
bytes of a layer are the same. What is changed here is names, shapes and offsets, never a chunk.

With the metadata flag singleton_local_shards megatron.core stores by itself what it stacks or joins otherwise: layers, experts
(`mlp.experts.experts.5.linear_fc1...`), and the halves of a gated projection (`linear_fc1.weight_w` and `_v`, gate and up).

The norm before a layer's experts has two names: with Transformer Engine `pre_mlp_layernorm.weight`, without it that of a dense
layer, `mlp.linear_fc1.layer_norm_weight`.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace

from megatron_demix.checkpoint.metadata import TensorInfo

_STACKED = re.compile(r"((?:^|.*\.)layers\.)(?!\d)(.+)")
_SINGLE = re.compile(r"((?:^|.*?\.)layers\.)(\d+)\.(.+)")
_SINGLE_EXPERT = re.compile(r"(.*\.experts\.experts\.)(\d+)\.(.+)")
_NORMS = ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
_HALF = re.compile(r"((?:^|.*\.)linear_fc1\.(?:weight|bias))_[wv]")


def known_as(key: str, mine: Container[str], others: Container[str]) -> str:
    """What one of my keys is called among the others': the norm before a layer's experts may have its other name there."""
    for name, other in (_NORMS, _NORMS[::-1]):
        renamed = key.replace(name, other)
        if renamed in others and renamed not in mine and key not in others:
            return renamed
    return key


class _StackedOrNot(Container[str]):
    """Keys, each also in the form the other side may have it in: a layer by itself as the stack, a stack as its layers."""

    def __init__(self, keys: Container[str]) -> None:
        self._keys = keys

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, str):
            return False
        stacked, single = _STACKED.fullmatch(key), _SINGLE.fullmatch(key)
        other = f"{stacked[1]}0.{stacked[2]}" if stacked else single[1] + single[3] if single else key
        return key in self._keys or other in self._keys


def with_keys(tensors: Mapping[str, TensorInfo], keys: Iterable[str]) -> dict[str, TensorInfo]:
    """The tensors, with those of the same layers seen under the names of `keys`. What fits none of them stays as it is.

    Experts and halves by themselves are seen stacked and joined, if `keys` has none; not the other way round.
    """
    keys = list(keys)
    wanted = set(keys)
    mine, others = _StackedOrNot(tensors), _StackedOrNot(wanted)
    left = {name: replace(info, key=name) for key, info in tensors.items() for name in [known_as(key, mine, others)]}
    if not any(map(_HALF.fullmatch, keys)):
        left = _halves_joined(left)
    if not any(map(_SINGLE_EXPERT.fullmatch, keys)):
        left = _experts_stacked(left)
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


def has_singletons(keys: Iterable[str]) -> bool:
    """Whether experts, or the halves of gated projections, are stored by themselves."""
    return any(_HALF.fullmatch(key) or _SINGLE_EXPERT.fullmatch(key) for key in keys)


def _halves_joined(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    found = dict(tensors)
    for key, gate in tensors.items():
        match, up = _HALF.fullmatch(key), tensors.get(f"{key[:-1]}v")
        if match is None or key.endswith("v") or up is None or match[1] in found:
            continue
        axis = len(gate.shape) - (2 if match[1].endswith("weight") else 1)
        if (gate.shape, gate.dtype) != (up.shape, up.dtype) or axis < 0:
            continue
        rows = gate.shape[axis]
        moved = [replace(c, offset=(*c.offset[:axis], c.offset[axis] + rows, *c.offset[axis + 1 :])) for c in up.chunks]
        chunks = tuple(sorted((*gate.chunks, *moved), key=lambda c: c.offset))
        shape = (*gate.shape[:axis], 2 * rows, *gate.shape[axis + 1 :])
        found[match[1]] = TensorInfo(match[1], gate.dtype, shape, chunks)
        del found[key], found[up.key]
    return found


def _experts_stacked(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    found = dict(tensors)
    experts: dict[str, dict[int, TensorInfo]] = {}
    for key, info in tensors.items():
        if match := _SINGLE_EXPERT.fullmatch(key):
            experts.setdefault(match[1] + match[3], {})[int(match[2])] = info
    for key, by_number in experts.items():
        infos = [by_number[n] for n in range(len(by_number)) if n in by_number]
        if key not in found and len(infos) == len(by_number) and (stacked := _stack(key, infos)):
            found[key] = stacked
            for info in infos:
                del found[info.key]
    return found


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
