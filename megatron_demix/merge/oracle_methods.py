"""The oracle of each merge method: its definition in float64 and NumPy, from whole logical tensors read slab by slab.

Shares with what it checks the bytes' addresses (Payload), the methods' options, and for spherical means the step from inner
products to coefficients (tests hold that against vectors). Which elements belong together, what is kept and what is summed is
found anew.
"""

from __future__ import annotations

import itertools
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import translate
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np

from megatron_demix.checkpoint.metadata import Shape
from megatron_demix.merge.components import Components
from megatron_demix.merge.methods import BoundMethod, Linear
from megatron_demix.merge.oracle import (
    Expectation,
    Expected,
    component_box,
    component_values,
    error_bound,
    linear,
    rounded_bound,
)
from megatron_demix.merge.sparse import Sparse
from megatron_demix.merge.spherical import COEFFICIENTS, Spherical

_SLAB = 1 << 20  # elements read at a time
_EPS32 = 2.0**-24


class Oracle(ABC):
    """What the elements of merges of these components by one method should be."""

    def __init__(self, components: Components, dtypes: Mapping[str, str]) -> None:
        """dtypes: of what is written, by tensor."""
        self.components = components
        self.dtypes = dtypes

    @abstractmethod
    def mixture(self, weights_K: np.ndarray, name: str) -> Expectation:
        """For the mixture of this name. Whole tensors that its elements belong to are read when they are asked for."""


def make_oracle(components: Components, bound: BoundMethod, dtypes: Mapping[str, str]) -> Oracle:
    """The oracle of a method that was bound to the components. dtypes: of what is written, by tensor."""
    method, fused = bound.method, bound.describe().get("fused", {})
    if isinstance(method, Spherical):
        return _SphericalOracle(components, dtypes, method, fused)
    if isinstance(method, Sparse):
        return _SparseOracle(components, dtypes, method, fused)
    assert isinstance(method, Linear)
    return _LinearOracle(components, dtypes, method)


# --- logical tensors ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Logical:
    """One logical tensor: which runs of rows [first, end) of which entry of a stack. rows: None where a scalar is stacked."""

    key: str
    stack: Shape
    rows: tuple[tuple[int, int], ...] | None
    inner: Shape
    name: str

    @property
    def size(self) -> int:
        return 1 if self.rows is None else math.prod(self.inner[1:]) * sum(end - first for first, end in self.rows)

    def number(self, index: Shape) -> int:
        """An element's place in the tensor's own order."""
        if self.rows is None:
            return 0
        row, *rest = index[len(self.stack) :]
        number = sum(max(0, min(row, end) - first) for first, end in self.rows)
        for at, size in zip(rest, self.inner[1:], strict=True):
            number = number * size + at
        return number

    def slabs(self) -> Iterator[tuple[Shape, Shape]]:
        """Boxes [lo, hi) of the stored tensor that make it up, in order."""
        above = tuple(i + 1 for i in self.stack)
        if self.rows is None:
            yield self.stack, above
            return
        most = max(1, _SLAB // max(1, math.prod(self.inner[1:])))
        for begin, end in self.rows:
            for first in range(begin, end, most):
                last = min(first + most, end)
                yield (*self.stack, first, *(0 for _ in self.inner[1:])), (*above, last, *self.inner[1:])


def _projection(key: str, num_rows: int, row: int, fused: dict[str, Any]) -> str:
    """Which fused projection a row belongs to; "" where nothing is fused."""
    *_, module, what = key.split(".")[-2:] if "." in key else ("", key)
    if what not in ("weight", "bias"):
        return ""
    if module == "linear_fc1" and fused.get("swiglu"):
        return "gate" if row < num_rows // 2 else "up"
    if module == "linear_kv_up_proj" and "qk_head_dim" in fused:
        return "k" if row % (fused["qk_head_dim"] + fused["v_head_dim"]) < fused["qk_head_dim"] else "v"
    if module == "linear_kv_down_proj" and "kv_lora_rank" in fused:
        return "kv" if row < fused["kv_lora_rank"] else "k_pos"
    if module == "linear_qkv" and "num_query_groups" in fused:
        period = num_rows // fused["num_query_groups"]
        left = period - row % period
        return "v" if left <= fused["kv_channels"] else "k" if left <= 2 * fused["kv_channels"] else "q"
    return ""


@lru_cache(maxsize=4096)
def _runs(key: str, num_rows: int, fused: tuple[tuple[str, Any], ...]) -> dict[str, tuple[tuple[int, int], ...]]:
    """The runs of rows of each projection."""
    if not _projection(key, num_rows, 0, dict(fused)):
        return {"": ((0, num_rows),)}
    runs: dict[str, tuple[tuple[int, int], ...]] = {}
    for label, group in itertools.groupby(range(num_rows), lambda row: _projection(key, num_rows, row, dict(fused))):
        rows = list(group)
        runs[label] = (*runs.get(label, ()), (rows[0], rows[-1] + 1))
    return runs


def _logical(key: str, shape: Shape, index: Shape, fused: tuple[tuple[str, Any], ...]) -> _Logical:
    """The logical tensor that an element belongs to."""
    name, depth = key, 0
    if re.search(r"(^|\.)layers\.[^0-9]", key):
        name, depth = re.sub(r"(^|\.)layers\.", rf"\g<1>layers.{index[0]}.", name, count=1), 1
    if re.search(r"\.experts\.experts\.[^0-9]", key):
        name, depth = name.replace(".experts.experts.", f".experts.experts.{index[depth]}."), depth + 1
    stack, inner = index[:depth], shape[depth:]
    if not inner:
        return _Logical(key, stack, None, (), name)
    label = _projection(key, inner[0], index[depth], dict(fused))
    return _Logical(key, stack, _runs(key, inner[0], fused)[label], inner, name + (f"[{label}]" if label else ""))


class _ByTensor(Oracle):
    """An oracle that looks at whole logical tensors."""

    def __init__(self, components: Components, dtypes: Mapping[str, str], fused: dict[str, Any]) -> None:
        super().__init__(components, dtypes)
        self._fused = tuple(sorted(fused.items()))

    def groups(self, key: str, indices: np.ndarray) -> Iterator[tuple[_Logical, np.ndarray]]:
        """The logical tensors of some elements, and which of the elements belong to each."""
        shape = self.components.tensors[key].shape
        found: dict[_Logical, list[int]] = {}
        for i, index in enumerate(indices.tolist()):
            found.setdefault(_logical(key, shape, tuple(index), self._fused), []).append(i)
        for logical, members in found.items():
            yield logical, np.array(members)


class _LinearOracle(_ByTensor):
    def __init__(self, components: Components, dtypes: Mapping[str, str], method: Linear) -> None:
        super().__init__(components, dtypes, {})
        self._method = method

    def mixture(self, weights_K: np.ndarray, name: str) -> Expectation:
        def expect(key: str, indices: np.ndarray) -> list[Expected]:
            values = component_values(self.components, key, indices)
            results, bounds = np.zeros(len(indices)), np.zeros(len(indices))
            groups = self.groups(key, indices) if self._method.rules else [(None, np.arange(len(indices)))]
            for logical, members in groups:
                coefficients = self._coefficients(weights_K, logical.name if logical else "", name)
                results[members] = linear(coefficients, values[:, members])
                bounds[members] = error_bound(coefficients, values[:, members], self.dtypes[key])
            return [Expected(results, bounds)]

        return expect

    def _coefficients(self, weights_K: np.ndarray, name: str, mixture: str) -> np.ndarray:
        scale = self._method.scale
        for rule in self._method.rules:
            layer = None if name.startswith("mtp.") else re.search(r"\blayers\.([0-9]+)\.", name)
            inside = rule.layers is None or (layer and rule.layers[0] <= int(layer[1]) <= rule.layers[1])
            named = re.fullmatch(translate(rule.tensors), name) and re.fullmatch(translate(rule.mixtures), mixture)
            if not inside or not named:
                continue
            if rule.weights is not None:
                weights_K = np.array([dict(rule.weights).get(n, 0.0) for n in self.components.names[: len(weights_K)]])
            if rule.scale is not None:
                scale = rule.scale
        if self._method.base is None:
            return weights_K
        rest = 1 - math.fsum(scale * weights_K)
        return np.append(scale * weights_K, rest if abs(rest) >= 1e-12 else 0.0)


class _SphericalOracle(_ByTensor):
    def __init__(self, components: Components, dtypes: Mapping[str, str], method: Spherical, fused: dict[str, Any]) -> None:
        super().__init__(components, dtypes, fused)
        self._method = method
        self._products: dict[_Logical, np.ndarray] = {}

    def mixture(self, weights_K: np.ndarray, name: str) -> Expectation:
        def expect(key: str, indices: np.ndarray) -> list[Expected]:
            values, bounds = np.zeros(len(indices)), np.zeros(len(indices))
            for logical, members in self.groups(key, indices):
                coefficients = COEFFICIENTS[self._method.name](weights_K, self.products(logical))
                if self._method.base is not None:
                    coefficients = np.append(coefficients, 1 - math.fsum(coefficients))
                parts = component_values(self.components, key, indices[members])
                values[members] = linear(coefficients, parts)
                bounds[members] = error_bound(coefficients, parts, self.dtypes[key])
            return [Expected(values, bounds)]

        return expect

    def products(self, logical: _Logical) -> np.ndarray:
        """[K, K] inner products of the components, or of their differences from the base."""
        if logical not in self._products:
            num = len(self.components.checkpoints) - (self._method.base is not None)
            total = np.zeros((num, num))
            for lo, hi in logical.slabs():
                boxes = np.stack(
                    [component_box(self.components, k, logical.key, lo, hi).ravel() for k in range(len(self.components.names))]
                )
                inputs = boxes[:num] - boxes[-1] if self._method.base is not None else boxes
                total += inputs @ inputs.T
            self._products[logical] = total
        return self._products[logical]


class _SparseOracle(_ByTensor):
    def __init__(self, components: Components, dtypes: Mapping[str, str], method: Sparse, fused: dict[str, Any]) -> None:
        super().__init__(components, dtypes, fused)
        self._method = method
        self._kept: dict[tuple[str, bytes], np.ndarray] = {}

    def mixture(self, weights_K: np.ndarray, name: str) -> Expectation:
        def expect(key: str, indices: np.ndarray) -> list[Expected]:
            parts = component_values(self.components, key, indices)
            at = (key, indices.tobytes())
            if at not in self._kept:  # the same for all mixtures
                self._kept = {at: self._thinned(key, indices, parts)}
            return self._sums(weights_K, self._kept[at], parts[-1], self.dtypes[key])

        return expect

    def _sums(self, weights_K: np.ndarray, thinned_KN: np.ndarray, base: np.ndarray, dtype: str) -> list[Expected]:
        scale, used = self._method.scale, weights_K != 0
        weights_K, thinned_KN = weights_K[used], thinned_KN[used]
        terms_KN = weights_K[:, np.newaxis] * thinned_KN
        size = np.abs(terms_KN).sum(axis=0)
        slack = (len(weights_K) + 2) * _EPS32 * size
        total = terms_KN.sum(axis=0)
        if not self._method.thinning.elect:
            outcomes = [(total, slack)]
        else:
            # Near zero the sign of a float32 sum may be either.
            positive = [total >= -slack, total > slack]
            outcomes = [self._elected(weights_K, terms_KN, up, slack) for up in positive]
        result = []
        for delta, error in outcomes:
            values = base + scale * delta
            sums = abs(scale) * error + 2 * _EPS32 * (np.abs(values) + np.abs(scale * delta))
            result.append(Expected(values, rounded_bound(values, sums, np.abs(base) + abs(scale) * size, dtype)))
        return result

    def _elected(
        self, weights_K: np.ndarray, terms_KN: np.ndarray, positive: np.ndarray, slack: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        agree = np.where(positive, terms_KN > 0, terms_KN < 0) | np.isnan(terms_KN)
        delta = np.where(agree, terms_KN, 0).sum(axis=0)
        if not self._method.thinning.average:
            return delta, slack
        used = np.where(agree, weights_K[:, np.newaxis], 0).sum(axis=0)
        used[used == 0] = 1
        return delta / used, slack / np.abs(used) + (len(weights_K) + 2) * _EPS32 * np.abs(delta / used)

    def _thinned(self, key: str, indices: np.ndarray, parts: np.ndarray) -> np.ndarray:
        """[K, n] what is left of the deltas of some elements, in float64."""
        deltas_KN = parts[:-1].astype(np.float32) - parts[-1].astype(np.float32)
        result = deltas_KN.astype(np.float64)
        if self._method.density == 1:
            return result
        for logical, members in self.groups(key, indices):
            for k in range(len(deltas_KN)):
                if self._method.thinning.keep in ("largest", "middle"):
                    result[k, members] *= self._within(logical, k, deltas_KN[k, members])
                    continue
                for i in members.tolist():
                    p = self._probability(logical, k, tuple(indices[i].tolist()), deltas_KN[k, i])
                    kept = self._random(logical, k, tuple(indices[i].tolist())) < p * 2.0**32
                    factor = np.float32(1 / p)
                    result[k, i] = float(deltas_KN[k, i] * factor) if kept else 0.0
        return result

    def _within(self, logical: _Logical, k: int, deltas: np.ndarray) -> np.ndarray:
        """Whether each of some deltas of a tensor is among those that stay: by counting all that are smaller or larger."""
        wanted = _magnitudes(deltas)
        order = np.argsort(wanted)
        smaller, larger = np.zeros(len(deltas), np.int64), np.zeros(len(deltas), np.int64)
        for lo, hi in logical.slabs():
            found = np.sort(_magnitudes(self._deltas(logical.key, k, lo, hi).ravel()))
            smaller[order] += np.searchsorted(found, wanted[order], "left")
            larger[order] += len(found) - np.searchsorted(found, wanted[order], "right")
        n = logical.size
        most = int(self._method.density * n)
        if self._method.thinning.keep == "largest":
            return larger < max(1, most)
        if most == 0:
            return np.zeros(len(deltas), bool)
        lowest = max(0, n - most - int(self._method.gamma * n))
        return (n - larger > lowest) & (smaller < lowest + most)

    def _deltas(self, key: str, k: int, lo: Shape, hi: Shape) -> np.ndarray:
        base = component_box(self.components, len(self.components.names) - 1, key, lo, hi).astype(np.float32)
        return component_box(self.components, k, key, lo, hi).astype(np.float32) - base

    def _probability(self, logical: _Logical, k: int, index: Shape, delta: np.float32) -> float:
        density, epsilon = self._method.density, self._method.epsilon
        if self._method.thinning.keep == "random":
            return density
        if logical.rows is None:
            return density
        if len(logical.inner) == 1:
            row = np.concatenate([self._deltas(logical.key, k, lo, hi).ravel() for lo, hi in logical.slabs()])
        else:
            lo = (*index[:-1], 0)
            row = self._deltas(logical.key, k, lo, (*(i + 1 for i in index[:-1]), logical.inner[-1])).ravel()
        if len(row) == 1:
            return density
        magnitudes, this = _magnitudes(row), _magnitudes(np.array([delta], np.float32))[0]
        mean_rank = float((magnitudes < this).sum()) + (float((magnitudes == this).sum()) - 1) / 2
        return (density - epsilon) + 2 * epsilon * (mean_rank / (len(row) - 1))

    def _random(self, logical: _Logical, k: int, index: Shape) -> int:
        """SplitMix64's output number `index`, upper half, by Python's integers."""
        text = f"{self._method.seed}\0{logical.name}\0{k}".encode()
        state = int.from_bytes(blake2b(text, digest_size=8).digest(), "little")
        mask = (1 << 64) - 1
        z = (state + (logical.number(index) + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return (z ^ (z >> 31)) >> 32


def _magnitudes(deltas: np.ndarray) -> np.ndarray:
    """As integers in the order of the magnitudes; every NaN is the same, above infinity."""
    bits = deltas.astype(np.float32).view(np.uint32) & np.uint32(0x7FFFFFFF)
    return np.minimum(bits, np.uint32(0x7F800001))
