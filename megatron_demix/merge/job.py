"""What all outputs of a merge on disk have in common: what they hold, where in their files, and what is said of it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_demix.artifact import fingerprint
from megatron_demix.checkpoint.common_state import merged_common_state
from megatron_demix.checkpoint.layout import CheckpointDir, iteration_folder
from megatron_demix.checkpoint.metadata import TensorInfo
from megatron_demix.checkpoint.output import Output, is_published
from megatron_demix.checkpoint.pickles import write_pickle
from megatron_demix.checkpoint.run_config import RUN_CONFIG, merged_run_config
from megatron_demix.checkpoint.writer import CopiedItem, Placement, TensorItem, metadata_files, place
from megatron_demix.errors import ConfigError
from megatron_demix.merge.chunks import cut_anew
from megatron_demix.merge.components import Components
from megatron_demix.merge.methods import BoundMethod
from megatron_demix.merge.oracle_methods import Oracle, make_oracle
from megatron_demix.merge.plan import Box, BytePlan
from megatron_demix.merge.weights import Normalize

Layout = Literal["release", "iter"]
Dtype = Literal["bf16", "fp16", "fp32"]
DTYPES: dict[Dtype, str] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
PROVENANCE = "demix_merge.json"
_NAMED = 4  # in a warning; demix_merge.json has all


class Job:
    """What all outputs of a merge have in common: targets, placement, copied items, common state."""

    def __init__(
        self,
        parts: Components,
        layout: Layout,
        method: BoundMethod,
        max_chunk: int | None,
        dtype: Dtype | None = None,
        *,
        shared: bool = False,
    ) -> None:
        """dtype: what is written; None: what the components are, all of them.

        shared: other processes write parts of it, so that most of the components' files are of no use to this one."""
        self.parts = parts
        self.dtype = dtype
        if dtype is None:
            parts.check_one_precision()
        self.written_as = {key: self._written_as(info) for key, info in parts.tensors.items()}
        self._shared = shared
        self.max_chunk = max_chunk
        self.method = method
        first = parts.checkpoints[0]
        self.common_state = parts.common_states[0]
        self.iteration = _iteration(first.location, self.common_state) if layout == "iter" else 0
        self.folder = iteration_folder(self.iteration) if layout == "iter" else "release"
        self.tracker = str(self.iteration) if layout == "iter" else "release"
        self.placements = place(self._items())
        stored = None if dtype is None else DTYPES[dtype]
        run_config = merged_run_config(first.location, stored)
        self.carried = {} if run_config is None else {RUN_CONFIG: run_config}
        self.common, self.left_out = merged_common_state(self.common_state, self.iteration, stored)
        self.unknown_objects = _unknown_objects(parts)
        self.mine = self.placements

    def output(self, target: Path, provenance: Mapping[str, Any], worker: tuple[int, int] | None) -> Output:
        return Output(
            target,
            self.folder,
            PROVENANCE,
            shared_key=None if worker is None else fingerprint({"folder": self.folder, **_identity(provenance)}),
        )

    def is_published(self, target: Path, provenance: Mapping[str, Any]) -> bool:
        """Whether this very merge is there, whatever its components were called. Raises OutputExists if anything else is."""
        return is_published(target, self.folder, provenance, PROVENANCE, _identity)

    def take(self, worker: tuple[int, int] | None, outputs: Sequence[Output]) -> None:
        """Leave out the files that other workers write, and those that are finished in all outputs."""
        if worker is None:
            return
        files = sorted({p.file for p in self.placements}, key=lambda file: (len(file), file))
        mine = {f for f in files[worker[0] :: worker[1]] if any(out.finished(f) is None for out in outputs)}
        self.mine = [p for p in self.placements if p.file in mine]

    @property
    def bytes_each(self) -> int:
        """That this process writes for each output."""
        return sum(p.length for p in self.mine)

    @cached_property
    def beside(self) -> dict[str, bytes]:
        """Files that all outputs have, but for those with tensors."""
        return metadata_files(self.placements) | self.carried

    @cached_property
    def oracle(self) -> Oracle:
        return make_oracle(self.parts, self.method, self.written_as)

    @property
    def tensor_placements(self) -> list[Placement]:
        """Of the files that this process writes."""
        return [p for p in self.mine if isinstance(p.item, TensorItem)]

    @cached_property
    def plan(self) -> BytePlan:
        """The byte plan, with one target for each tensor item in order."""
        plan = BytePlan(self.parts, self.method.partition)
        for p in self.tensor_placements:
            plan.add(Box(p.item.key, p.item.offset or (), p.item.shape, p.item.dtype or ""))
        return plan

    def provenance(self, name: str, weights: np.ndarray, normalize: Normalize) -> dict[str, Any]:
        """Plain facts that do not depend on when, where or by how many threads the merge was made."""
        carried = {file: blake2b(data, digest_size=16).hexdigest() for file, data in self.carried.items()}
        return {
            "format": 3,
            "mixture": name,
            "method": self.method.describe(name),
            "normalize": normalize,
            "max_chunk": self.max_chunk,
            **({"dtype": self.dtype} if self.dtype else {}),
            "weights": dict(zip(self.parts.names[: len(weights)], weights.tolist(), strict=True)),
            "components": {
                part: {"model": self._digests[k], "iteration": self.parts.checkpoints[k].location.iteration}
                for k, part in enumerate(self.parts.names)
            },
            "order": self.parts.names,  # sums, random streams and what is copied depend on it
            "copied_from_first": sorted({item.key for item in self._copied}),
            "copied_digest": self._copied_digest,
            "left_out": self.left_out,
            **({"carried": carried} if carried else {}),
            **({"unknown_objects": self.unknown_objects} if self.unknown_objects else {}),
        }

    @property
    def _copied(self) -> list[CopiedItem]:
        return [p.item for p in self.placements if isinstance(p.item, CopiedItem)]

    @cached_property
    def _copied_digest(self) -> str:
        """Of what no weights decide: the common state, and the items copied from the first component."""
        hashed = blake2b(write_pickle(dict(self.common)), digest_size=16)
        for item in self._copied:
            hashed.update(f"{item.key} {item.offset} {len(item.data)}".encode())
            hashed.update(item.data)
        return hashed.hexdigest()

    @cached_property
    def _digests(self) -> list[str]:
        # The first one's files stay in any case: what is copied lies there.
        return [self.parts.digest(k, keep=k == 0 or not self._shared) for k in range(len(self.parts.names))]

    def _written_as(self, info: TensorInfo) -> str:
        return info.dtype if self.dtype is None else "float32" if self.parts.kept_in_float32(info.key) else DTYPES[self.dtype]

    def _items(self) -> list[TensorItem | CopiedItem]:
        """In the order the first component stores them, so that reading it is sequential; what is cut anew lies together."""
        first = self.parts.checkpoints[0]
        located: list[tuple[tuple, TensorItem | CopiedItem]] = []
        for info in self.parts.tensors.values():
            dtype = self.written_as[info.key]
            if self.max_chunk is None:
                for chunk in info.chunks:
                    item = TensorItem(info.key, dtype, info.shape, chunk.offset, chunk.shape)
                    located.append(((chunk.location.file, chunk.location.position), item))
            else:
                first_place = min((chunk.location.file, chunk.location.position) for chunk in info.chunks)
                for offset, shape in cut_anew(replace(info, dtype=dtype), self.max_chunk):
                    located.append((first_place, TensorItem(info.key, dtype, info.shape, offset, shape)))
        for info in self.parts.copied.values():
            for chunk in info.chunks:
                data = first.sound_blob(chunk.location, info.key).data
                copied = CopiedItem(info.key, data, info.dtype, info.shape, chunk.offset, chunk.shape)
                located.append(((chunk.location.file, chunk.location.position), copied))
        for key, location in first.model_objects.items():
            located.append(((location.file, location.position), CopiedItem(key, first.harmless_blob(location, key).data)))
        return [item for _, item in sorted(located, key=lambda entry: entry[0])]


def _iteration(first: CheckpointDir, common_state: Mapping[str, Any]) -> int:
    """Of a merge in the iteration layout. Raises ConfigError where the first component has none that Megatron-LM loads."""
    iteration = common_state.get("iteration") if first.iteration is None else first.iteration
    if not isinstance(iteration, int):
        raise ConfigError(f"layout iter: {first.path} does not say its iteration. Use --layout release.")
    if iteration < 1:
        raise ConfigError(
            f"layout iter: {first.path} is of iteration {iteration}, and Megatron-LM loads no folder of an iteration below 1. "
            "Use --layout release."
        )
    return iteration


def _unknown_objects(parts: Components) -> list[str]:
    """Of all components. Warns of them: no weights say what is to become of them."""
    holders: dict[str, str] = {}
    for part, checkpoint in zip(parts.names, parts.checkpoints, strict=True):
        for name in checkpoint.unknown_objects:
            holders.setdefault(name, part)
    names = sorted(holders)
    if names:
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        warnings.warn(
            f"component {holders[names[0]]!r} holds objects that are not known as a part of models or of training, and are not "
            f"merged: {', '.join(map(repr, names[:_NAMED]))}{more}. A model that computes with them needs them from elsewhere.",
            stacklevel=4,
        )
    return names


def _identity(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance with the components' places in their order for their names. These are paths in the PATH:WEIGHT form, each
    spelled in many ways, and the bytes do not depend on them."""
    order = provenance.get("order")
    names = order if isinstance(order, list) else []
    places = {name: f"component {k}" for k, name in enumerate(names) if isinstance(name, str)}

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {places.get(key, key): replaced(part) for key, part in value.items()}
        return [replaced(part) for part in value] if isinstance(value, list) else value

    counted = {key: value for key, value in provenance.items() if key != "unknown_objects"}  # nothing was made of them
    return {key: len(names) if key == "order" else replaced(value) for key, value in counted.items()}
