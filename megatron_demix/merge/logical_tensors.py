"""The logical tensors inside a checkpoint's stored ones: each layer, each expert, and q, k, v, gate and up.

Megatron stacks layers as [L, ...] and experts as [E, ...], and fuses projections along the rows of what is stacked:

    linear_qkv            for each of num_query_groups groups: the group's query heads, then its key and its value head,
                          kv_channels rows each
    linear_fc1            with SwiGLU: all gate rows, then all up rows (under one key; newer versions may store
                          linear_fc1.weight_w and _v)
    linear_kv_down_proj   of multi-latent attention: kv_lora_rank rows for the latent, then those for the keys' positions
    linear_kv_up_proj     for each head: qk_head_dim rows of its key, then v_head_dim rows of its value

What a method decides per tensor must be decided per logical tensor: a norm or a threshold over a stack of layers, or over q,
k and v together, is another method. Sums of the same coefficients everywhere need none of this.
"""

from __future__ import annotations

import itertools
import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_demix.checkpoint.metadata import Shape, TensorInfo
from megatron_demix.errors import ConfigError, IncompatibleInputs

_STACKED_LAYERS = re.compile(r"(?:^|\.)layers\.(?!\d)")
_STACKED_EXPERTS = re.compile(r"\.experts\.experts\.(?!\d)")
_QKV = re.compile(r"(?:^|\.)linear_qkv\.(?:weight|bias)$")
_KV = re.compile(r"(?:^|\.)linear_kv_(up|down)_proj\.(?:weight|bias)$")
_FC1 = re.compile(r"(?:^|\.)linear_fc1\.(?:weight|bias)$")


@dataclass(frozen=True)
class FusedLayout:
    """What the shapes of fused projections do not say. None: unknown."""

    num_query_groups: int | None = None
    kv_channels: int | None = None
    swiglu: bool | None = None
    # Of multi-latent attention, as Megatron calls them.
    qk_head_dim: int | None = None
    v_head_dim: int | None = None
    kv_lora_rank: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_query_groups", "kv_channels"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} is {value}, expected at least 1.")

    @classmethod
    def of_arguments(cls, arguments: Mapping[str, Any]) -> FusedLayout:
        """From the arguments Megatron saved with a checkpoint; what they do not say stays unknown."""
        heads, hidden, channels = (_count(arguments, k) for k in ("num_attention_heads", "hidden_size", "kv_channels"))
        # Without grouped-query attention the saved number of groups is the argument's default, and every head is a group.
        groups = _count(arguments, "num_query_groups") if arguments.get("group_query_attention") else heads
        if channels is None and heads and hidden and hidden % heads == 0:
            channels = hidden // heads
        gated = [arguments.get(k) for k in ("swiglu", "gated_linear_unit", "quick_geglu")]
        swiglu = True if any(g is True for g in gated) else False if any(g is False for g in gated) else None
        latent = ("qk_head_dim", "v_head_dim", "kv_lora_rank") if arguments.get("multi_latent_attention") else ()
        return cls(groups, channels, swiglu, **{name: _count(arguments, name) for name in latent})

    def describe(self) -> dict[str, Any]:
        """What is known, by name."""
        return {k: getattr(self, k) for k in self.__dataclass_fields__ if getattr(self, k) is not None}

    def with_known(self, known: FusedLayout) -> FusedLayout:
        """This, with what only `known` says. Raises ConfigError where they contradict each other."""
        ours, theirs = self.describe(), known.describe()
        for name in ours.keys() & theirs.keys():
            if ours[name] != theirs[name]:
                raise ConfigError(f"{name} is {theirs[name]} as given, but the components were saved with {ours[name]}.")
        return FusedLayout(**ours | theirs)


UNKNOWN = FusedLayout()


def _count(arguments: Mapping[str, Any], name: str) -> int | None:
    value = arguments.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a tensor: `width` rows from `begin` on, and again `period` rows later, `count` times in all."""

    name: str
    begin: int
    width: int
    period: int
    count: int


@dataclass(frozen=True, slots=True)
class Part:
    """One logical tensor. stack: its indices in the stored tensor's stacked dimensions; shape: its own, its rows gathered."""

    key: str
    name: str
    stack: Shape
    rows: Rows
    shape: Shape

    def boxes(self) -> Iterator[tuple[Shape, Shape, int]]:
        """Where it lies: (offset, shape) of boxes of the stored tensor, and the first row of the part that each holds."""
        for c in range(self.rows.count):
            begin = (self.rows.begin + c * self.rows.period,) if self.shape else ()
            width = (self.rows.width, *self.shape[1:]) if self.shape else ()
            offset = (*self.stack, *begin, *(0 for _ in self.shape[1:]))
            yield offset, (*(1 for _ in self.stack), *width), c * self.rows.width


@dataclass(frozen=True, slots=True)
class Cut:
    """A piece of a box that lies in one part: [lo, hi) in the stored tensor's coordinates, and the number, in the part's own
    order, of its first element, with the strides by which that number grows along the stored tensor's dimensions."""

    part: int
    lo: Shape
    hi: Shape
    index: int
    index_strides: Shape


class Partition:
    """The parts of some stored tensors, numbered in the order of their keys, stacks and rows."""

    def __init__(self, tensors: Mapping[str, TensorInfo], layout: FusedLayout | None) -> None:
        """layout None: layers and experts are parts, fused projections stay whole.

        Raises ConfigError where a fused projection's layout is needed and unknown, IncompatibleInputs where it does not fit.
        """
        self._tensors: dict[str, _Split] = {}
        self.num_parts = 0
        for key, info in tensors.items():
            split = _Split(key, info.shape, self.num_parts, layout)
            self._tensors[key] = split
            self.num_parts += split.num_parts

    def parts(self, numbers: Iterable[int] | None = None) -> list[Part]:
        """Those with these numbers, in that order; None: all of them."""
        splits = list(self._tensors.values())
        firsts = [split.first for split in splits]
        return [splits[bisect_right(firsts, n) - 1].part(n) for n in (range(self.num_parts) if numbers is None else numbers)]

    def cut(self, key: str, offset: Shape, shape: Shape) -> list[Cut]:
        """A box of a stored tensor, cut where parts end."""
        return self._tensors[key].cut(offset, shape) if math.prod(shape) else []


def num_stacked(key: str, shape: Shape) -> int:
    """How many leading dimensions count layers or experts."""
    return min(bool(_STACKED_LAYERS.search(key)) + bool(_STACKED_EXPERTS.search(key)), len(shape))


class _Split:
    """How one stored tensor falls into parts."""

    def __init__(self, key: str, shape: Shape, first: int, layout: FusedLayout | None) -> None:
        self.key, self.first = key, first
        self._stacked = num_stacked(key, shape)
        self.stack, self.inner = shape[: self._stacked], shape[self._stacked :]
        num_rows = self.inner[0] if self.inner else 1
        self.rows = _fused_rows(key, num_rows, layout) if layout is not None and self.inner else []
        self.rows = self.rows or [Rows("", 0, num_rows, max(1, num_rows), 1)]
        self.num_parts = math.prod(self.stack) * len(self.rows)

    def part(self, number: int) -> Part:
        at, rows = divmod(number - self.first, len(self.rows))
        stack: list[int] = []
        for size in reversed(self.stack):
            at, index = divmod(at, size)
            stack.insert(0, index)
        chosen = self.rows[rows]
        shape = (chosen.width * chosen.count, *self.inner[1:]) if self.inner else ()
        return Part(self.key, self._name(stack) + (f"[{chosen.name}]" if chosen.name else ""), tuple(stack), chosen, shape)

    def _name(self, stack: Sequence[int]) -> str:
        """As the key would be if every layer and expert were stored by itself."""
        name, left = self.key, list(stack)
        for pattern in (_STACKED_LAYERS, _STACKED_EXPERTS):
            if left and (found := pattern.search(name)):
                name = f"{name[: found.end()]}{left.pop(0)}.{name[found.end() :]}"
        return name

    def cut(self, offset: Shape, shape: Shape) -> list[Cut]:
        lo = tuple(offset)
        hi = tuple(o + n for o, n in zip(offset, shape, strict=True))
        inner_strides = [math.prod(self.inner[d + 1 :]) for d in range(len(self.inner))]
        strides = (*(0 for _ in self.stack), *inner_strides)
        if strides:
            strides = (*strides[:-1], 1)
        after = sum(o * s for o, s in zip(lo[self._stacked + 1 :], inner_strides[1:], strict=True))
        cuts = []
        for stack in _indices(lo[: self._stacked], hi[: self._stacked]):
            at = 0
            for index, size in zip(stack, self.stack, strict=True):
                at = at * size + index
            for number, rows in enumerate(self.rows, self.first + at * len(self.rows)):
                head = tuple(stack), tuple(i + 1 for i in stack)
                if not self.inner:
                    cuts.append(Cut(number, *head, 0, strides))
                    continue
                row_lo, row_hi = lo[self._stacked], hi[self._stacked]
                c = max(0, (row_lo - rows.begin - rows.width) // rows.period + 1)
                while c < rows.count and (begin := rows.begin + c * rows.period) < row_hi:
                    a, b = max(begin, row_lo), min(begin + rows.width, row_hi)
                    index = (c * rows.width + a - begin) * inner_strides[0] + after
                    tail = lo[self._stacked + 1 :], hi[self._stacked + 1 :]
                    if a < b:
                        cuts.append(Cut(number, (*head[0], a, *tail[0]), (*head[1], b, *tail[1]), index, strides))
                    c += 1
        return cuts


def _indices(lo: Shape, hi: Shape) -> Iterator[Shape]:
    return itertools.product(*(range(a, b) for a, b in zip(lo, hi, strict=True)))


def _fused_rows(key: str, num_rows: int, layout: FusedLayout) -> list[Rows]:
    if _FC1.search(key):
        if layout.swiglu is None:
            raise ConfigError(
                f"{key!r}: whether its rows are SwiGLU's gate and up halves is not known, since the first component does not "
                "hold Megatron's arguments. Say --swiglu or --no-swiglu."
            )
        if layout.swiglu and num_rows % 2:
            raise IncompatibleInputs(f"{key!r} has {num_rows} rows, which are no gate and up halves. Say --no-swiglu.")
        half = num_rows // 2
        return [Rows("gate", 0, half, num_rows, 1), Rows("up", half, half, num_rows, 1)] if layout.swiglu and num_rows else []
    if latent := _KV.search(key):
        return _latent_rows(key, num_rows, layout, up=latent[1] == "up")
    if not _QKV.search(key):
        return []
    groups, channels = layout.num_query_groups, layout.kv_channels
    if groups is None or channels is None:
        raise ConfigError(
            f"{key!r}: how its rows interleave queries, keys and values is not known, since the first component does not hold "
            "Megatron's arguments. Give --num-query-groups (the number of attention heads without grouped-query attention) and "
            "--kv-channels."
        )
    heads_and_two, rest = divmod(num_rows, groups * channels)
    if rest or heads_and_two < 3:
        raise IncompatibleInputs(
            f"{key!r} has {num_rows} rows, which are not {groups} query groups of some query heads, a key and a value of "
            f"{channels} channels each. Correct --num-query-groups or --kv-channels."
        )
    period, queries = heads_and_two * channels, (heads_and_two - 2) * channels
    return [
        Rows("q", 0, queries, period, groups),
        Rows("k", queries, channels, period, groups),
        Rows("v", queries + channels, channels, period, groups),
    ]


def _latent_rows(key: str, num_rows: int, layout: FusedLayout, *, up: bool) -> list[Rows]:
    keys, values, rank = layout.qk_head_dim, layout.v_head_dim, layout.kv_lora_rank
    if keys is None or values is None or rank is None:
        raise ConfigError(
            f"{key!r}: how its rows fuse keys and values is not known, since the first component does not hold Megatron's "
            "arguments of multi-latent attention. Give its whole folder, with common.pt, or use --method linear."
        )
    period = keys + values
    if up and num_rows % period == 0:
        return [Rows("k", 0, keys, period, num_rows // period), Rows("v", keys, values, period, num_rows // period)]
    if not up and num_rows > rank:
        return [Rows("kv", 0, rank, num_rows, 1), Rows("k_pos", rank, num_rows - rank, num_rows, 1)]
    raise IncompatibleInputs(
        f"{key!r} has {num_rows} rows, which do not fit qk_head_dim {keys}, v_head_dim {values} and kv_lora_rank {rank} of the "
        "first component's arguments. Use --method linear."
    )
