"""A curriculum: several mixtures one after the other, each as a blend of its own, together one walk through every domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_demix.data.blend import build_blend
from megatron_demix.data.pool import Source
from megatron_demix.errors import ConfigError
from megatron_demix.mixture import Mixture


@dataclass(frozen=True)
class Stage:
    """mixture: actual data shares of this stage; target_tokens: its budget."""

    mixture: Mixture
    target_tokens: int


def build_curriculum(
    pool: Mapping[str, Source], stages: Sequence[Stage], output: Path, *, seed: int, **options: Any
) -> list[dict[str, Any]]:
    """Build stage n as the blend `output`-stage<n>, n from 1. Options are build_blend's.

    A stage goes on where the one before left each domain, so no document comes twice before all of its domain came once, and
    max_epochs holds for all stages together. They are separate blends because GPTDataset shuffles within one: train them one
    after the other. Raises what build_blend raises; stages that were finished before stay.
    """
    if not stages:
        raise ConfigError("curriculum: no stages. Give at least one mixture with its tokens.")
    used: dict[str, tuple[int, int]] = {}
    manifests = []
    for number, stage in enumerate(stages, start=1):
        prefix = output.with_name(f"{output.name}-stage{number}")
        manifest = build_blend(pool, stage.mixture, stage.target_tokens, prefix, seed=seed, begin=used, **options)
        for name, d in manifest["domains"].items():
            documents, tokens = used.get(name, (0, 0))
            used[name] = (documents + d["documents"], tokens + d["tokens"])
        manifests.append(manifest)
    return manifests
