"""From the score tables of a study to a surrogate of each score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_demix.artifact import read_json
from megatron_demix.errors import IncompatibleInputs
from megatron_demix.pipeline.scoring import MERGED_CENTROID, TRAINED_CENTROID, component_row, proxy_score_of
from megatron_demix.pipeline.stage import Stage
from megatron_demix.pipeline.train_stages import MIXTURES
from megatron_demix.study.study import Study


def fit_surrogates(
    study: Study, space: Any, scores: Sequence[Stage], proposals: Sequence[Stage], centroid: Stage | None
) -> tuple[dict[str, Any], dict[str, float], set[str], list[dict[str, Any]]]:
    """Of the proxies of all rounds so far: a surrogate of each score; the value of each score that is the same for all, and has
    none; which of the others are better when higher; and the proxies."""
    import numpy as np

    from megatron_demix.evaluate.scores import ScoreTable
    from megatron_demix.search.proxy_score import proxy_scores
    from megatron_demix.search.surrogate import fit_surrogate

    entries = [m for p in proposals for m in read_json(p.folder / MIXTURES)]
    names = [m["name"] for m in entries]
    tables = [ScoreTable.read(s.folder / "scores.json") for s in scores]
    merged = ScoreTable(tables[0].scores, {name: row for table in tables for name, row in table.rows.items()})
    shares_MD, weights_MD = (np.array([[m[kind][d] for d in space.domains] for m in entries]) for kind in ("shares", "weights"))
    centroids = _centroids(centroid)
    alone = [component_row(d) for d in space.domains]
    surrogates, constant = {}, {}
    for s in merged.scores:
        values_M, kind = np.array(merged.column(s.name, names)), proxy_score_of(study)
        if kind != "merged":
            components_K = np.array(merged.column(s.name, alone))
            values_M = proxy_scores(kind, weights_MD, values_M, components_K, centroids.get(s.name))
        if np.ptp(values_M) <= 1e-12 * max(1.0, np.abs(values_M).max()):
            constant[s.name] = float(values_M[0])
        else:
            surrogates[s.name] = fit_surrogate(shares_MD, values_M, study.search.surrogate, seed=study.seed, name=s.name)
    higher = {s.name for s in merged.scores if s.direction == "higher"} - set(constant)
    return surrogates, constant, higher, entries


def usable_objective(objective: Mapping[str, float], constant: Mapping[str, float]) -> dict[str, float]:
    """The objective without the scores that are the same for every proxy, which prefer no mixture."""
    usable = {name: weight for name, weight in objective.items() if name not in constant}
    if not any(usable.values()):
        seen = ", ".join(f"{name} is {value:g}" for name, value in constant.items() if objective.get(name))
        raise IncompatibleInputs(
            f"search.objective: {seen} for every proxy, so that no mixture can be preferred. Give weight to a finer score (a "
            "loss, or a task's bits_per_byte); what was measured is kept."
        )
    return usable


def _centroids(scores: Stage | None) -> dict[str, Any]:
    """By score, the search.proxy_score.Centroid that a maturity check has measured."""
    if scores is None:
        return {}
    from megatron_demix.evaluate.scores import ScoreTable
    from megatron_demix.search.proxy_score import Centroid

    table = ScoreTable.read(scores.folder / "scores.json")
    trained = [name for name in table.rows if name.startswith(TRAINED_CENTROID)]
    means = {s.name: sum(table.column(s.name, trained)) / len(trained) for s in table.scores}
    return {name: Centroid(table.rows[MERGED_CENTROID][name], mean) for name, mean in means.items()}


def fit_facts(surrogate: Any, models: list[str]) -> dict[str, Any]:
    """What the report shows of a surrogate: all out of fold."""
    facts = surrogate.cross_validation
    return {
        "kind": surrogate.kind,
        "rmse": facts["rmse"],
        "spearman": facts["spearman"],
        "rmse_by_kind": facts["kinds"],
        "models": models,
        "measured": facts["measured_M"].tolist(),
        "predicted": facts["predicted_M"].tolist(),
        "std": facts["std_M"].tolist(),
    }
