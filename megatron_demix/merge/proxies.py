"""Proxies in memory: mixtures of the components written straight into a live model's parameters, without touching disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_demix.checkpoint.live import LiveTensor
from megatron_demix.errors import CorruptInput, IncompatibleInputs
from megatron_demix.merge.components import MERGEABLE, Components
from megatron_demix.merge.methods import Linear, Method, Recipe
from megatron_demix.merge.plan import Box, BytePlan
from megatron_demix.merge.resident import ResidentComponents, fits_on_device
from megatron_demix.merge.weights import Normalize, weight_matrix


class ProxyMerger:
    """Turns a live model into the proxy of any weights, in place. The components stay mapped; what goes where is planned once.

    Each rank of a parallel model has its own merger and reads only what its own parameters need. Parameters that are shared
    (tied embeddings) are given once. Elements are accumulated in float32 and rounded once to the parameter's type.
    """

    def __init__(
        self,
        components: Mapping[str, Path],
        live: Sequence[LiveTensor],
        *,
        threads: int | None = None,
        method: Method | None = None,
    ) -> None:
        """method: what the weights mean; None: a plain weighted average.

        Raises IncompatibleInputs where a parameter is not in the components, or has another shape.
        """
        method = method or Linear()
        self._names = list(components)
        self.components = Components(method.sources(components))
        self._method = method.bind(self.components)
        self._plan = BytePlan(self.components, self._method.partition)
        self._threads = threads
        self._live = list(live)
        self._checked = False
        self._resident: ResidentComponents | None = None
        for tensor in self._live:
            self._plan.add(self._box(tensor))

    @property
    def num_bytes(self) -> int:
        """Bytes of parameters that one merge writes on this rank."""
        return sum(self._plan.native.target_bytes)

    def merge(self, weights: Mapping[str, float], *, normalize: Normalize = "error") -> None:
        """Write the mixture of these weights into the parameters. Raises MixtureError; CorruptInput on damaged components.

        The first merge compares the components' checksums too; a file that changes later is not noticed. On a GPU with room for
        them, the components move there in the first merge, and later ones do not leave the device.
        """
        weights_MK = weight_matrix({"proxy": weights}, self._names, normalize)
        if not self._checked:
            if (name := self._plan.damaged(self._threads)) is not None:
                raise CorruptInput(f"{name}: its bytes differ from their checksum. Copy or save the component again.")
            self._method.prepare(self._plan, self._threads)
        recipe = self._method.recipe(weights_MK)
        if not self._checked:
            # Coefficients that differ between tensors, and deltas, are the CPU's work: the device holds whole parameters.
            if self._method.partition is None and fits_on_device(self.components, self._live):
                self._resident = ResidentComponents(self.components, self._live, self._threads)
                self._check_resident(recipe)
            self._checked = True
        if self._resident is not None:
            self._resident.merge(recipe.weights_SMK[0, 0])
            return
        staged = self._merge_staged(recipe)
        for s in staged:
            s.finish()

    def _merge_staged(self, recipe: Recipe) -> list[_Staged]:
        staged = [_Staged(tensor.tensor) for tensor in self._live]
        addresses_TM = np.array([[s.address] for s in staged], np.int64).reshape(len(staged), 1)
        self._plan.native.run(recipe.weights_SMK, deltas=recipe.deltas, addresses_TM=addresses_TM, threads=self._threads)
        return staged

    def _check_resident(self, recipe: Recipe) -> None:
        """Once for each merger, every tensor: the device must give the bits of the CPU."""
        assert self._resident is not None
        self._resident.merge(recipe.weights_SMK[0, 0])
        for index, s in enumerate(self._merge_staged(recipe)):
            self._resident.check(s.written, index)

    def _box(self, live: LiveTensor) -> Box:
        held = self.components.tensors.get(live.key)
        first = self.components.names[0]
        if held is None:
            raise IncompatibleInputs(
                f"the live model has parameter {live.key!r}, the components (first: {first!r}) do not. Build the model with "
                "the arguments they were trained with."
            )
        if held.shape != tuple(live.global_shape):
            raise IncompatibleInputs(
                f"parameter {live.key!r} has global shape {tuple(live.global_shape)} in the live model and {held.shape} in "
                f"component {first!r}."
            )
        dtype = str(live.tensor.dtype).removeprefix("torch.")
        if dtype not in MERGEABLE:
            raise IncompatibleInputs(
                f"parameter {live.key!r} is {dtype} in the live model, expected one of {', '.join(MERGEABLE)}."
            )
        return Box(live.key, tuple(live.global_offset), live.box_shape, dtype)


class _Staged:
    """Where the merge writes a parameter: the parameter itself, or (on a GPU, or not contiguous) a copy that is then moved."""

    def __init__(self, tensor: Any) -> None:
        self._target = tensor.data  # not a view that autograd watches: writing in place is the point
        direct = self._target.device.type == "cpu" and self._target.is_contiguous()
        self.written = self._target
        if not direct:
            import torch

            pin = self._target.device.type == "cuda"
            self.written = torch.empty(self._target.shape, dtype=self._target.dtype, pin_memory=pin)

    @property
    def address(self) -> int:
        return self.written.data_ptr()

    def finish(self) -> None:
        if self.written is not self._target:
            self._target.copy_(self.written)
