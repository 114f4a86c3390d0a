"""What a search has to say when it ends: the mixture, how sure it is, what it gives up, and what holds it back."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from megatron_demix.search.binding import binding
from megatron_demix.search.objective import Objective
from megatron_demix.search.optimise import ParetoFront, choose_mixture, pareto_front
from megatron_demix.search.reach import distances
from megatron_demix.search.space import SearchSpace
from megatron_demix.search.uncertainty import OptimumDistribution, optimum_distribution

_AWAY = 0.01
_FRONT_SCORES = 6
UNIT = "weights are actual shares of trained tokens; merge_weights are the proxy's weights over the components"


def outcome(goal: Objective, *, candidates: int = 200_000, top: int = 128, bootstraps: int = 50) -> dict[str, Any]:
    """mixture.json (docs/FORMATS.md) as data. What all of the goal's surrogates predict is in it, also those of no weight."""
    space, aimed = goal.space, goal.aimed
    choice = choose_mixture(goal, candidates=candidates, top=top)
    shares_1D = np.array([[choice.shares[name] for name in space.domains]])
    nearest_1, usual = distances(aimed, shares_1D)
    report: dict[str, Any] = {
        "weights": dict(choice.shares),
        "merge_weights": dict(choice.weights),
        "unit": UNIT,
        "aim": goal.aim,
        "objective": choice.objective,
        "expected_gain": choice.expected_gain,
        "predicted": choice.predicted,
        "natural": choice.natural,
        "natural_distance": float(np.abs(space.shares(space.centre_D) - list(space.natural.values())).sum() / 2),
        "distance": {"nearest": float(nearest_1[0]), "usual": usual},
        "binding": [asdict(bound) for bound in binding(space, choice.weights)],
    }
    again = max(1000, candidates // 10)  # candidates of each repeated search, and of each end of the front
    if bootstraps:
        report["optimum"] = optimum_as_json(optimum_distribution(goal, choice, num=bootstraps, candidates=again))
    if len(aimed) > 1:
        # Of many scores nearly every mixture is best in some combination.
        heaviest = sorted(aimed, key=lambda name: -goal.weights[name])[:_FRONT_SCORES]
        report["pareto"] = _front_as_json(space, pareto_front(goal, heaviest, candidates=again))
    return report


def natural_in_words(distance: float) -> str:
    """What a gain is over: the bounds, or the anchor, may leave nothing as near to the natural mixture as itself. distance: in
    total variation."""
    return (
        "natural"
        if distance <= _AWAY
        else f"the reachable mixture nearest to natural ({distance:.0%} of the data away from it)"
    )


def optimum_as_json(spread: OptimumDistribution) -> dict[str, Any]:
    """The part "optimum" of mixture.json; `samples` has one list of shares a bootstrap, in the order of `shares`."""
    return {
        "shares": {name: {"mean": mean, "std": std} for name, (mean, std) in spread.shares.items()},
        "samples": spread.shares_BD.tolist(),
        "expected_regret": spread.expected_regret,
        "judged_gain": (spread.expected_gain, float(spread.gains_H.std(ddof=1))),
        "judged_probability": spread.probability_of_gain,
        "enough": spread.enough(),
    }


def _front_as_json(space: SearchSpace, front: ParetoFront) -> list[dict[str, Any]]:
    return [
        {
            "weights": dict(zip(space.domains, shares, strict=True)),
            "merge_weights": dict(zip(space.domains, weights, strict=True)),
            "predicted": dict(zip(front.scores, scores, strict=True)),
        }
        for shares, weights, scores in zip(
            front.shares_MD.tolist(), front.weights_MD.tolist(), front.predicted_MT.tolist(), strict=True
        )
    ]
