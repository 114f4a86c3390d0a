"""Proxies in memory: mixtures of the components written straight into a live model's parameters, without touching disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_demix.checkpoint.collector import without_collector
from megatron_demix.checkpoint.layers import known_as
from megatron_demix.checkpoint.live import LiveTensor
from megatron_demix.errors import CorruptInput, IncompatibleInputs
from megatron_demix.merge.components import MERGEABLE, Components
from megatron_demix.merge.device import DeviceMerge, Staged, finish
from megatron_demix.merge.methods import Linear, Method, Recipe
from megatron_demix.merge.plan import Box, BytePlan
from megatron_demix.merge.weights import Normalize, weight_matrix

if TYPE_CHECKING:
    import torch


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
        with without_collector():
            method = method or Linear()
            self._names = list(components)
            self.components = Components(method.sources(components))
            self._method = method.bind(self.components)
            self._plan = BytePlan(self.components, self._method.partition)
            self._threads = threads
            keys, stored = {tensor.key for tensor in live}, self.components.tensors
            self._live = [replace(tensor, key=known_as(tensor.key, keys, stored)) for tensor in live]
            self._device: DeviceMerge | None = None  # chosen in the first merge
            for tensor in self._live:
                self._plan.add(self._box(tensor))

    @property
    def num_bytes(self) -> int:
        """Bytes of parameters that one merge writes on this rank."""
        return sum(self._plan.native.target_bytes)

    def merge(self, weights: Mapping[str, float], *, normalize: Normalize = "error") -> None:
        """Write the mixture of these weights into the parameters. Raises MixtureError; CorruptInput on damaged components.

        The first merge compares the components' checksums too; of what happens to a file later, only that it cannot be read any
        more is noticed. On a GPU with room for them, the components move there in the first merge, and later ones do not leave
        the device.
        """
        self.merge_all({"proxy": weights}, [[tensor.tensor for tensor in self._live]], normalize=normalize)

    def merge_all(
        self,
        mixtures: Mapping[str, Mapping[str, float]],
        models: Sequence[Sequence[torch.Tensor]],
        *,
        normalize: Normalize = "error",
    ) -> None:
        """Write M mixtures into M models at once, from one read of the components.

        models: [M] tensors in the order, shapes, types and on the device of the live ones. Raises as merge(), ValueError where
        they are not like the live ones, VerificationFailed where a GPU's first result is not the CPU's.
        """
        weights_MK = weight_matrix(mixtures, self._names, normalize)
        targets = [[tensor.data for tensor in model] for model in models]  # not what autograd watches
        pattern = [(t.tensor.shape, t.tensor.dtype, t.tensor.device) for t in self._live]
        if len(models) != len(mixtures) or any([(t.shape, t.dtype, t.device) for t in model] != pattern for model in targets):
            raise ValueError(f"{len(mixtures)} mixtures need as many models, with tensors like the live ones in their order")
        contiguous = all(tensor.is_contiguous() for model in targets for tensor in model)
        if self._device is None:
            self.components.start_read_ahead()
            damaged = self._plan.damaged(self._threads)
            self.components.check_still_there()
            if damaged is not None:
                raise CorruptInput(f"{damaged}: its bytes differ from their checksum. Copy or save the component again.")
            self._method.prepare(self._plan, self._threads)
            recipe = self._method.recipe(weights_MK, list(mixtures))
            # Coefficients that differ between tensors, deltas, and components of several types are the CPU's work: the device
            # sums whole parameters that are stored alike.
            linear = self._method.partition is None and recipe.deltas is None and self.components.in_one_precision
            self._device = DeviceMerge(self.components, self._live, self._threads, allowed=linear and contiguous)
        else:
            recipe = self._method.recipe(weights_MK, list(mixtures))
        if not contiguous or not self._device.merge(recipe.weights_SMK[0], targets, partial(self._on_cpu, recipe, targets)):
            finish(self._on_cpu(recipe, targets, True))
        self.components.check_still_there()

    def _on_cpu(self, recipe: Recipe, targets: Sequence[Sequence[torch.Tensor]], pinned: bool) -> list[list[Staged]]:
        """[M][T] the results, where the CPU can write them."""
        staged = [[Staged(tensor, pinned=pinned) for tensor in model] for model in targets]
        addresses_TM = np.array([[s.address for s in model] for model in staged], np.int64).reshape(len(staged), -1).T
        self._plan.native.run(recipe.weights_SMK, deltas=recipe.deltas, addresses_TM=addresses_TM, threads=self._threads)
        return staged

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
