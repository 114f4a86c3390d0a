"""The components of a merge, opened together and checked to be versions of one model."""

from __future__ import annotations

import math
import re
import warnings
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

from megatron_demix.checkpoint.common_state import read_common_state
from megatron_demix.checkpoint.dtypes import ARRAY_DTYPES
from megatron_demix.checkpoint.grid import Grid
from megatron_demix.checkpoint.layers import has_singletons, with_keys
from megatron_demix.checkpoint.layout import COMMON
from megatron_demix.checkpoint.metadata import TensorInfo
from megatron_demix.checkpoint.model_function import differing, model_function
from megatron_demix.checkpoint.payload import Payload
from megatron_demix.checkpoint.reader import Checkpoint
from megatron_demix.checkpoint.run_config import saved_arguments
from megatron_demix.checkpoint.tiling import tile
from megatron_demix.errors import ConfigError, CorruptInput, IncompatibleInputs
from megatron_demix.native import MappedFile

MERGEABLE = tuple(ARRAY_DTYPES)

# The balance of experts, in models of any precision.
_ALWAYS_FLOAT32 = ".router.expert_bias"

# LoRA's two factors, as Megatron-Bridge and NeMo save them beside the weights of a layer, or alone.
_ADAPTER = re.compile(r"(.*\.)?adapter\.(.+\.)?linear_(in|out)\.weight")


class Components:
    """K checkpoints by name. `tensors`: the float tensors they share, by key. `copied`: those of other types, not averaged.

    Keys are the first component's; where another one has the same layers stacked, or by themselves, it is seen as the first.
    """

    def __init__(self, paths: Mapping[str, Path]) -> None:
        """Raises ConfigError / CorruptInput as Checkpoint does, IncompatibleInputs where the components differ."""
        if not paths:
            raise ConfigError("no components to merge. Give at least one checkpoint.")
        self.names = list(paths)
        self.checkpoints = [
            Checkpoint(Path(path), read_ahead=False, place=k, model_only=True) for k, path in enumerate(paths.values())
        ]
        self._payloads: dict[tuple[int, str, tuple[int, ...]], Payload] = {}
        self._grids: dict[str, list[Grid]] = {}
        self._extents: dict[tuple[int, str], tuple[list[int], int]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self.copied: dict[str, TensorInfo] = {}
        first = self.checkpoints[0].model_tensors
        if not first:
            raise CorruptInput(f"{self.checkpoints[0].location.path}: holds no model tensors.")
        if adapters := sorted(filter(_ADAPTER.fullmatch, first)):
            raise IncompatibleInputs(
                f"component {self.names[0]!r} holds adapters, such as {adapters[0]!r}: the mean of their factors is not the "
                "mean of what they add to the weights. Merge each into its base's weights first (Megatron-Bridge's "
                "examples/peft/merge_lora.py makes a Hugging Face folder, which tools/convert_hf.py imports)."
            )
        self._tensors = [with_keys(checkpoint.model_tensors, first) for checkpoint in self.checkpoints]
        for k in range(len(self.names)):
            self._check_against_first(k)
            self._check_function(k)
        self._warn_without_common_state()
        for key, info in first.items():
            self._check_type(info)
            (self.tensors if info.dtype in MERGEABLE else self.copied)[key] = info

    @cached_property
    def common_states(self) -> list[dict[str, Any]]:
        """[K] as read_common_state reads them."""
        return [read_common_state(checkpoint) for checkpoint in self.checkpoints]

    @cached_property
    def arguments(self) -> list[dict[str, Any]]:
        """[K] Megatron's arguments, as saved_arguments finds them."""
        return [saved_arguments(*each) for each in zip(self.checkpoints, self.common_states, strict=True)]

    def infos(self, key: str) -> list[TensorInfo]:
        """[K] the tensor in each component."""
        return [tensors[key] for tensors in self._tensors]

    def grids(self, key: str) -> list[Grid]:
        """[K] how each component cuts a tensor; made once, since a merge in batches has a plan for each of them."""
        if key not in self._grids:
            self._grids[key] = [Grid(info) for info in self.infos(key)]
        return self._grids[key]

    def payload(self, k: int, info: TensorInfo, index: int) -> Payload:
        """The elements of chunk `index` of a tensor of component k; read once."""
        chunk = info.chunks[index]
        at = (k, info.key, chunk.offset)
        if at not in self._payloads:
            self._payloads[at] = self.checkpoints[k].payload(info, chunk)
        return self._payloads[at]

    def touching(self, k: int, key: str, first: Sequence[int], last: Sequence[int]) -> list[int]:
        """The chunks of component k's tensor that hold some element of the box from `first` to `last`, both within.

        They are in the order of their offsets, and experts make tens of thousands of them: only those that begin in reach along
        the first dimension are looked at.
        """
        chunks = self._tensors[k][key].chunks
        if not first:
            return list(range(len(chunks)))
        if (k, key) not in self._extents:
            self._extents[k, key] = [c.offset[0] for c in chunks], max((c.shape[0] for c in chunks), default=0)
        begins, longest = self._extents[k, key]
        reach = range(bisect_right(begins, first[0] - longest), bisect_right(begins, last[0]))
        return [
            i
            for i in reach
            if all(o <= b and o + n > a for o, n, a, b in zip(chunks[i].offset, chunks[i].shape, first, last, strict=True))
        ]

    def start_read_ahead(self) -> None:
        """The plan is made, for which the beginning of every chunk was read: now comes all of them."""
        for checkpoint in self.checkpoints:
            checkpoint.start_read_ahead()

    def leave_pages(self, threads: int) -> None:
        """All that was read is used."""
        MappedFile.leave_pages([file for checkpoint in self.checkpoints for file in checkpoint.files], threads)

    def check_still_there(self) -> None:
        """Raises CorruptInput if a component's file became unreadable after it was opened: sums made since do not count."""
        for checkpoint in self.checkpoints:
            checkpoint.check_still_there()

    @property
    def num_files(self) -> int:
        """That hold the tensors, of all components together."""
        return sum(
            len({chunk.location.file for info in tensors.values() for chunk in info.chunks}) for tensors in self._tensors
        )

    def digest(self, k: int, *, keep: bool = True) -> str:
        """A fingerprint of component k's model: names, shapes, types, and the CRCs its archives promise for all elements.

        keep: its files stay mapped, for a plan that needs most of them.
        """
        hashed = blake2b(digest_size=16)
        self.checkpoints[k].touch_frames(chunk for info in self.checkpoints[k].model_tensors.values() for chunk in info.chunks)
        for key, info in sorted(self.checkpoints[k].model_tensors.items()):
            if info.dtype not in MERGEABLE:
                continue
            for i, chunk in enumerate(info.chunks):
                hashed.update(
                    repr((key, info.dtype, info.shape, chunk.offset, chunk.shape, self.payload(k, info, i).crc)).encode()
                )
        if not keep:
            self._payloads = {at: payload for at, payload in self._payloads.items() if at[0] != k}
            self.checkpoints[k].unmap()
        return hashed.hexdigest()

    def _check_against_first(self, k: int) -> None:
        first_name, first, name, tensors = self.names[0], self._tensors[0], self.names[k], self._tensors[k]
        pair = f"components {first_name!r} and {name!r}"
        if missing := sorted(first.keys() ^ tensors.keys()):
            key = missing[0]
            has, lacks = (first_name, name) if key in first else (name, first_name)
            raise IncompatibleInputs(
                f"{pair} are not versions of one model: {key!r} is in {has!r} but not in {lacks!r} ({len(missing)} such "
                f"tensors). {self._advice(k)}"
            )
        for key, info in tensors.items():
            if info.shape != first[key].shape:
                padded = key.endswith(("word_embeddings.weight", "output_layer.weight"))
                hint = (
                    "The vocabularies differ (or --make-vocab-size-divisible-by padded them differently)."
                    if padded
                    else "Their architectures differ."
                )
                raise IncompatibleInputs(
                    f"{pair}: {key!r} has shape {first[key].shape} in {first_name!r} and {info.shape} in {name!r}. {hint}"
                )
            if info.dtype != first[key].dtype and not {info.dtype, first[key].dtype} <= set(MERGEABLE):
                raise IncompatibleInputs(f"{self._unlike(k, key)}. Save all components alike.")
            if not tile(info.shape, tuple((chunk.offset, chunk.shape) for chunk in info.chunks)):
                covered = sum(math.prod(chunk.shape) for chunk in info.chunks)
                raise CorruptInput(
                    f"{self.checkpoints[k].location.path}: the {len(info.chunks)} chunks of {key!r} have {covered} elements, "
                    f"its shape {info.shape} {info.elements}. The checkpoint was not saved by all ranks, or saves some "
                    "elements twice."
                )

    def check_one_precision(self) -> None:
        """Raises IncompatibleInputs where a tensor is of different types. All can be read, but what a merge is written as has
        to be said then."""
        for key in self.tensors:
            for k, info in enumerate(self.infos(key)):
                if info.dtype != self.tensors[key].dtype:
                    raise IncompatibleInputs(
                        f"{self._unlike(k, key)}. Say in which type the merge is to be written (--dtype), or save all "
                        "components in one precision."
                    )

    @cached_property
    def in_one_precision(self) -> bool:
        """Whether each tensor has the same type in all components."""
        return all(info.dtype == self.tensors[key].dtype for key in self.tensors for info in self.infos(key))

    def kept_in_float32(self, key: str) -> bool:
        """Whether models of any precision have this tensor in float32: some component does whose other tensors are narrower, or
        it is one that Megatron itself makes float32 before it loads and saves."""
        return key.endswith(_ALWAYS_FLOAT32) or any(
            info.dtype == "float32" and precision != "float32"
            for info, precision in zip(self.infos(key), self._precisions, strict=True)
        )

    @cached_property
    def _precisions(self) -> list[str]:
        """[K] the type of most elements of each."""
        found = []
        for k in range(len(self.names)):
            elements = dict.fromkeys(MERGEABLE, 0)
            for key in self.tensors:
                info = self._tensors[k][key]
                elements[info.dtype] += info.elements
            found.append(max(elements, key=elements.__getitem__))
        return found

    def _unlike(self, k: int, key: str) -> str:
        """That a tensor's type is another one in component k than in the first, in words."""
        first, info = self._tensors[0][key], self._tensors[k][key]
        pair = f"components {self.names[0]!r} and {self.names[k]!r}"
        return f"{pair}: {key!r} is {first.dtype} in {self.names[0]!r} and {info.dtype} in {self.names[k]!r}"

    def _advice(self, k: int) -> str:
        """What to do about a component that has not the first one's keys."""
        if has_singletons(self._tensors[0]) and not has_singletons(self._tensors[k]):
            return (
                f"{self.names[0]!r} was saved with singleton_local_shards (experts and halves of linear_fc1 by themselves), "
                f"{self.names[k]!r} without: give {self.names[k]!r} first, and all are merged as it is saved."
            )
        return "Components must be trained from one base with one architecture."

    def _check_function(self, k: int) -> None:
        first, other = (model_function(self.arguments[i]) for i in (0, k))
        for name, value in differing(first, other).items():
            raise IncompatibleInputs(
                f"components {self.names[0]!r} and {self.names[k]!r}: {name} is {first[name]!r} in the one and {value!r} in "
                "the other: equal weights would be different functions. Components must be trained from one base with one "
                "architecture."
            )

    def _warn_without_common_state(self) -> None:
        lacking = [k for k, state in enumerate(self.common_states) if not state]
        if not lacking:
            return
        names = ", ".join(repr(self.names[k]) for k in lacking)
        warnings.warn(
            f"component{'s' if len(lacking) > 1 else ''} {names}: no {COMMON} in {self.checkpoints[lacking[0]].location.path}"
            f"{', nor in the others' if len(lacking) > 1 else ''}, so that arguments cannot be compared"
            f"{', nor be carried into what is merged' if lacking[0] == 0 else ''}. Copy the whole folder, if it had one.",
            stacklevel=4,
        )

    def _check_type(self, info: TensorInfo) -> None:
        if info.dtype.startswith(("float8", "float4")):
            raise IncompatibleInputs(
                f"{info.key!r} is stored as {info.dtype}: scaled values cannot be averaged. Save the components' weights "
                "in bf16 (Megatron writes them so unless --fp8-param-gather is on)."
            )
        if info.dtype in ("float64", "complex64", "complex128"):
            raise IncompatibleInputs(
                f"{info.key!r} is {info.dtype}; only {', '.join(MERGEABLE)} are merged. Cast the components first."
            )
