"""Did the base branch late enough? Models trained on the centroid mixture, against the merge that stands for it.

What forms only after branching forms differently in each component and does not survive averaging; the merged centroid is then
worse than a trained one, and the proxies of the search are wrong in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_demix.errors import ConfigError
from megatron_demix.mixture import Mixture
from megatron_demix.pipeline import train_stages
from megatron_demix.pipeline.foundation import Foundation
from megatron_demix.pipeline.merging import merge_settings, second_order
from megatron_demix.pipeline.scoring import MERGED_CENTROID, TRAINED_CENTROID, merges, scoring
from megatron_demix.pipeline.stage import Stage

BASE = "base"


@dataclass(frozen=True)
class Maturity:
    """trained: by row of the scores, "seed0", ... scores: the stage whose scores.json has them, MERGED_CENTROID and BASE.

    Where the first trained centroid is a mixed component, the merged one is that of the other components.
    """

    trained: dict[str, Stage]
    scores: Stage


def maturity(foundation: Foundation, as_merged: Callable[[Stage], Stage]) -> Maturity:
    """as_merged: the stage that stands for what was trained as components are."""
    study, base, data = foundation.study, foundation.base, foundation.data
    centroid = Mixture.uniform(data)
    known = study.mixed_centroid

    def trained_with(number: int) -> Stage:
        if known and number == 0:
            return foundation.mixed[known]
        name, seed = f"components/centroid/seed{number}", study.seed + number
        return as_merged(train_stages.on_merge_weights(foundation, name, centroid, seed=seed))

    mixed_in = [n for n, rule in enumerate(study.merge.rules or ()) if set(rule.weights or ()) & set(foundation.mixed)]
    if known and mixed_in:
        raise ConfigError(
            f"component.maturity_seeds: where {known!r} is trained anyway, the check merges the components of single domains, "
            f"and merge.rules.{mixed_in[0]} gives a weight to a mixed one. Take one of both out."
        )
    trained = {f"{TRAINED_CENTROID}{number}": trained_with(number) for number in range(study.maturity_seeds)}
    components = foundation.components if known else foundation.merged

    def models() -> dict[str, Any]:
        weights = dict(centroid) if known else second_order(study).of(centroid)
        checkpoints = {name: train_stages.checkpoint_of(stage) for name, stage in {BASE: base, **trained}.items()}
        return merges(foundation, components, {MERGED_CENTROID: weights}) | {"checkpoints": checkpoints}

    needs = (base, *components.values(), *trained.values())
    tasks, num_models = foundation.tasks.search, 2 + len(trained)
    scores = scoring(foundation, "maturity/scores", "valid", tasks, needs, models, lambda: num_models, merge_settings(study))
    return Maturity(trained, scores)
