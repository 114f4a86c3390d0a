"""Did the base branch late enough? Models trained on the centroid mixture, against the merge that stands for it.

What forms only after branching forms differently in each component and does not survive averaging; the merged centroid is then
worse than a trained one, and the proxies of the search are wrong in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_demix.mixture import Mixture
from megatron_demix.pipeline import train_stages
from megatron_demix.pipeline.foundation import Foundation
from megatron_demix.pipeline.merging import merge_settings
from megatron_demix.pipeline.scoring import MERGED_CENTROID, TRAINED_CENTROID, scoring
from megatron_demix.pipeline.stage import Stage
from megatron_demix.pipeline.task_inputs import ScoredTasks

BASE = "base"


@dataclass(frozen=True)
class Maturity:
    """trained: by row of the scores, "seed0", ... scores: the stage whose scores.json has them, MERGED_CENTROID and BASE."""

    trained: dict[str, Stage]
    scores: Stage


def maturity(foundation: Foundation) -> Maturity:
    study, run, base, components = foundation.study, foundation.run, foundation.base, foundation.components
    tokenizer, data = foundation.tokenizer, foundation.data
    centroid = Mixture.uniform(data)
    trained = {
        f"{TRAINED_CENTROID}{seed}": train_stages.averaged(
            study,
            run,
            train_stages.on_merge_weights(
                study, f"maturity/centroid-seed{seed}", run, tokenizer, data, base, centroid, seed=study.seed + seed
            ),
        )
        for seed in range(study.component.maturity_seeds)
    }

    def models() -> dict[str, Any]:
        return {
            "components": {n: train_stages.checkpoint_of(c) for n, c in components.items()},
            "mixtures": {MERGED_CENTROID: dict(centroid)},
            "merge": study.merge,
            "base": train_stages.checkpoint_of(base),
            "seed": study.seed,
            "checkpoints": {name: train_stages.checkpoint_of(stage) for name, stage in {BASE: base, **trained}.items()},
        }

    needs = (base, *components.values(), *trained.values())
    # By losses alone: the noise of the comparison is pooled over all scores, which therefore have one unit.
    none = ScoredTasks()
    scores = scoring(foundation, "maturity/scores", "valid", none, needs, models, merge_settings(study))
    return Maturity(trained, scores)
