"""A curriculum: several mixtures one after the other, each as a blend of its own, together one walk through every domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_demix.data.blend import build_blend, plan_blend
from megatron_demix.data.pool import Source, open_pool
from megatron_demix.data.quota import OnShortfall
from megatron_demix.errors import ConfigError, MixtureError
from megatron_demix.mixture import Mixture
from megatron_demix.native import default_threads


@dataclass(frozen=True)
class Stage:
    """mixture: actual data shares of this stage; target_tokens: its budget."""

    mixture: Mixture
    target_tokens: int


def build_curriculum(
    pool: Mapping[str, Source],
    stages: Sequence[Stage],
    output: Path,
    *,
    seed: int,
    on_shortfall: OnShortfall = "error",
    threads: int | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Build stage n as the blend `output`-stage<n>, n from 1. Options are build_blend's.

    A stage goes on where the one before left each domain, so no document comes twice before all of its domain came once, and
    max_epochs holds for all stages together. They are separate blends because GPTDataset shuffles within one: train them one
    after the other. All are planned before the first is built. Raises what build_blend raises; stages that were finished
    before stay.
    """
    if not stages:
        raise ConfigError("curriculum: no stages. Give at least one mixture with its tokens.")
    opened = open_pool(pool)
    how: dict[str, Any] = {"seed": seed, "on_shortfall": on_shortfall, "threads": threads or default_threads()}
    used: dict[str, tuple[int, int]] = {}
    begins = []
    for number, stage in enumerate(stages, start=1):
        begins.append(dict(used))
        try:
            plan = plan_blend(opened, stage.mixture, stage.target_tokens, begin=used, **how)
        except MixtureError as e:
            raise MixtureError(f"stage {number} of {len(stages)}: {e} No stage was built.") from e
        again = [part.domain.name for part in plan.parts if part.begin]
        if options.get("mode") == "args" and again:
            raise ConfigError(
                f"stage {number} of {len(stages)}: {again[0]!r} is in an earlier stage, too, and by its arguments Megatron "
                "would begin it anew, with documents that have been read. Build views, or write the stages out (mode "
                "materialise)."
            )
        for part in plan.parts:
            documents, tokens = used.get(part.domain.name, (0, 0))
            used[part.domain.name] = (documents + part.documents, tokens + part.tokens)
    prefixes = [output.with_name(f"{output.name}-stage{number}") for number in range(1, len(stages) + 1)]
    return [
        build_blend(pool, stage.mixture, stage.target_tokens, prefix, begin=begin, **how, **options)
        for stage, prefix, begin in zip(stages, prefixes, begins, strict=True)
    ]
