"""Every way of rank_consistency.py to predict the scores of the references of one base without training on their mixtures.

Each entry of PREDICTORS takes a Bench and gives a score table: {score name: values_M}, M the references. Those of
TRAINED stand for a whole family of choices; the report picks among them in hindsight, in their favour.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from rank_models import merged
from rank_plan import ANCHOR, AVERAGED, OTHER_ANCHORS, TRAINED_LENGTHS, TRAINED_MORE, Bench, to_weights

from megatron_demix.merge.second_order import SecondOrder
from megatron_demix.search.horizon import Line
from megatron_demix.search.mixing_law import law_through
from megatron_demix.search.proxy_score import part_of_merged
from megatron_demix.search.regressors import REGRESSORS
from megatron_demix.search.surrogate import fit_surrogate

Table = dict[str, np.ndarray]
MERGED_CENTROID = "merged-centroid"


def references(bench: Bench, seed: int) -> Table:
    return _table([bench.reference(m, seed) for m in range(len(bench.references_MD))])


def _table(rows: Sequence[dict[str, float]]) -> Table:
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


# --- merged -----------------------------------------------------------------------------------------------------------


def _scored(bench: Bench, label: str, sources: Callable[[], Sequence[np.ndarray]], coefficients_MK: np.ndarray) -> Table:
    """Scores of sum_k coefficients[m, k] * sources[k]; sources are asked for only where a score is missing."""
    names = [f"{label}-{m}" for m in range(len(coefficients_MK))]
    if any(name not in bench.known for name in names):
        vectors_MN = merged(sources(), coefficients_MK)
        for name, vector_N in zip(names, vectors_MN, strict=True):
            bench.score(name, lambda vector_N=vector_N: vector_N)
    return _table([bench.known[name] for name in names])


def _weights(bench: Bench, share: float = ANCHOR) -> np.ndarray:
    return to_weights(bench.references_MD, bench.uniform_D, share)


def _components(bench: Bench, share: float = ANCHOR, at: float = 1.0) -> list[np.ndarray]:
    return bench.components(bench.uniform_D, share, f"uniform{share}", at)


def merged_at(bench: Bench, share: float = ANCHOR, at: float = 1.0) -> Table:
    label = f"merged-uniform{share}@{at}"
    return _scored(bench, label, lambda: _components(bench, share, at), _weights(bench, share))


def one_domain_anchor(bench: Bench) -> Table:
    """The paper's kind of anchor: half of one general domain. Its merge weight may have to be negative here."""
    anchor_D = np.eye(len(bench.uniform_D))[bench.suite.domains.index("english")]
    weights_MK = to_weights(bench.references_MD, anchor_D, ANCHOR)
    return _scored(bench, "merged-english", lambda: bench.components(anchor_D, ANCHOR, "english"), weights_MK)


def stretched(bench: Bench, scale: float) -> Table:
    weights_MK = _weights(bench)
    coefficients_MK = np.hstack([scale * weights_MK, np.full((len(weights_MK), 1), 1 - scale)])
    return _scored(bench, f"stretched-{scale:.4f}", lambda: [*_components(bench), bench.base], coefficients_MK)


def fitted_scale(bench: Bench) -> float:
    """The stretch that brings the merged centroid closest to the trained one, in weight space."""
    merged_delta_N = np.mean(_components(bench), axis=0) - bench.base
    trained_delta_N = _centroid(bench) - bench.base
    return float(trained_delta_N @ merged_delta_N / (merged_delta_N @ merged_delta_N))


def _centroid(bench: Bench) -> np.ndarray:
    return bench.mixed(range(len(bench.uniform_D)))


def _second_order(bench: Bench, groups: Sequence[Sequence[int]]) -> np.ndarray:
    """Coefficients of the components, then of those that were trained on each group of domains in equal parts."""
    domains = bench.suite.domains
    mixed = {f"mixed-{r}": {domains[k]: 1 / len(group) for k in group} for r, group in enumerate(groups)}
    return SecondOrder(domains, mixed).coefficients(_weights(bench))


def _centroid_coefficients(bench: Bench) -> np.ndarray:
    return _second_order(bench, [range(len(bench.uniform_D))])


def second_order_centroid(bench: Bench) -> Table:
    return _scored(
        bench, "second-order-centroid", lambda: [*_components(bench), _centroid(bench)], _centroid_coefficients(bench)
    )


def second_order_pairs(bench: Bench) -> Table:
    def sources() -> list[np.ndarray]:
        return [*_components(bench), *(bench.mixed(pair) for pair in bench.pairs)]

    return _scored(bench, "second-order-pairs", sources, _second_order(bench, bench.pairs))


def averaged(bench: Bench, label: str) -> Table:
    parts = AVERAGED[label]

    def sources() -> list[np.ndarray]:
        return [np.mean(over, axis=0) for over in zip(*(_components(bench, at=at) for at in parts), strict=True)]

    return _scored(bench, label.replace(" ", "-"), sources, _weights(bench))


def extrapolated(bench: Bench, parts: Sequence[float]) -> Table:
    """From these parts of the horizon to all of it, on a straight line in the logarithm of the steps."""
    tables = [merged_at(bench, at=at) for at in parts]
    coefficients_P = Line([bench.plan.steps(at) for at in parts], bench.plan.horizon).coefficients_P
    return {name: coefficients_P @ [table[name] for table in tables] for name in tables[0]}


# --- no merging -------------------------------------------------------------------------------------------------------


def component_scores(bench: Bench, share: float = ANCHOR) -> list[dict[str, float]]:
    names = [f"component-uniform{share}-{domain}" for domain in bench.suite.domains]
    return [bench.score(name, lambda k=k: _components(bench, share)[k]) for k, name in enumerate(names)]


def interpolated(bench: Bench, share: float = ANCHOR) -> Table:
    scores = _table(component_scores(bench, share))
    return {name: _weights(bench, share) @ values_K for name, values_K in scores.items()}


def centroid_scores(bench: Bench, seed: int) -> dict[str, float]:
    return bench.score(f"centroid-{seed}", lambda: bench.mixed(range(len(bench.uniform_D)), seed))


def interpolated_second_order(bench: Bench) -> Table:
    """Interpolated, and bent so that it is right at the trained centroid."""
    scores = _table([*component_scores(bench), centroid_scores(bench, 0)])
    return {name: _centroid_coefficients(bench) @ values_C for name, values_C in scores.items()}


def ensemble(bench: Bench) -> Table:
    """Scores of the weighted mean of the components' probabilities: each component is run once, the rest is arithmetic."""
    names = [f"ensemble-{m}" for m in range(len(bench.references_MD))]
    if any(name not in bench.known for name in names):
        logs = [bench.lab.log_probabilities(vector_N, bench.suite.sets) for vector_N in _components(bench)]
        for name, weights_K in zip(names, _weights(bench), strict=True):
            mixed = [
                np.log(sum(w * np.exp(p) for w, p in zip(weights_K, parts, strict=True))) for parts in zip(*logs, strict=True)
            ]
            scores: dict[str, float] = {}
            for part, log_TV in zip(bench.suite.sets, mixed, strict=True):
                scores |= part.scores(log_TV)
            bench.score_by(name, lambda scores=scores: scores)
    return _table([bench.known[name] for name in names])


def stacked(bench: Bench) -> Table:
    """The mean of the merged and the interpolated score."""
    return _mean(merged_at(bench), interpolated(bench))


def stacked_second_order(bench: Bench) -> Table:
    return _mean(second_order_centroid(bench), interpolated_second_order(bench))


def stacked_ensemble(bench: Bench) -> Table:
    return _mean(merged_at(bench), interpolated(bench), ensemble(bench))


def _mean(*tables: Table) -> Table:
    return {name: np.mean([table[name] for table in tables], axis=0) for name in tables[0]}


def calibrated(bench: Bench) -> Table:
    """Between merged and interpolated, for each score, where the trained centroid lies between theirs."""
    gaps = _centroid_gaps(bench)
    parts = {name: part_of_merged(0.0, merged, trained) for name, (merged, trained) in gaps.items()}
    return _between(bench, parts)


def calibrated_at_once(bench: Bench) -> Table:
    """The same with one part for all losses of a suite and one for all accuracies: that of least squares over them."""
    gaps = _centroid_gaps(bench)
    parts = {}
    for accuracies in (False, True):
        names = [name for name in gaps if name.endswith(" accuracy") == accuracies]
        merged_S, trained_S = np.array([gaps[name] for name in names]).reshape(-1, 2).T
        part = np.clip(merged_S @ trained_S / (merged_S @ merged_S), 0, 1) if np.any(merged_S) else 1.0
        parts |= dict.fromkeys(names, part)
    return _between(bench, parts)


def _centroid_gaps(bench: Bench) -> dict[str, tuple[float, float]]:
    """By score: how far the merged centroid lies from the interpolated one, and how far the trained one does."""
    even = np.full((1, len(bench.uniform_D)), 1 / len(bench.uniform_D))
    merged_centre = _scored(bench, MERGED_CENTROID, lambda: _components(bench), even)
    flat = {name: values_K.mean() for name, values_K in _table(component_scores(bench)).items()}
    trained = centroid_scores(bench, 0)
    return {name: (merged_centre[name][0] - flat[name], trained[name] - flat[name]) for name in flat}


def _between(bench: Bench, parts: dict[str, float]) -> Table:
    left, right = merged_at(bench), interpolated(bench)
    return {name: right[name] + parts[name] * (left[name] - right[name]) for name in left}


def mixing_law(bench: Bench) -> Table:
    """The exponential law of the weights that goes through every component's score and the trained centroid's; no merging."""
    scores, trained = _table(component_scores(bench)), centroid_scores(bench, 0)
    return {name: law_through(values_K, trained[name]).of(_weights(bench), values_K) for name, values_K in scores.items()}


def stacked_law(bench: Bench) -> Table:
    return _mean(merged_at(bench), mixing_law(bench))


def calibrated_law(bench: Bench) -> Table:
    """Two curves through every component and the trained centroid: one bent as merging bends, one exponentially."""
    return _mean(calibrated(bench), mixing_law(bench))


def second_order_law(bench: Bench) -> Table:
    return _mean(second_order_centroid(bench), mixing_law(bench))


def no_model(bench: Bench) -> Table:
    """The share of the most similar domain (chosen before anything was trained): more of it is better."""
    result = {}
    for part in bench.suite.sets:
        share_M = bench.references_MD[:, bench.suite.domains.index(bench.suite.nearest[part.name])]
        if part.problems is None:
            result[part.name] = -np.log(share_M)
        else:
            result |= {f"{part.name} bits": -np.log(share_M), f"{part.name} accuracy": np.log(share_M)}
    return result


def trained_scores(bench: Bench, length: float, more: int) -> Table:
    return _table([bench.trained(length, m) for m in range(len(bench.trained_MD(length, more)))])


def trained(bench: Bench, more: int, length: float, kind: str) -> Table:
    """Short runs on other mixtures, and a surrogate."""
    shares_MD = bench.trained_MD(length, more)
    scores = trained_scores(bench, length, more)
    result = {}
    for name, values_M in scores.items():
        if np.ptp(values_M) == 0:
            result[name] = np.full(len(bench.references_MD), values_M[0])
        else:
            result[name] = fit_surrogate(shares_MD, values_M, kind, seed=0, name=name).predict(bench.references_MD)[0]
    return result


Predictor = Callable[[Bench], Table]
PREDICTORS: dict[str, Predictor] = {
    "merged": merged_at,
    "merged, pure components": partial(merged_at, share=0.0),
    "merged, 25 % anchor": partial(merged_at, share=OTHER_ANCHORS[1]),
    "merged, anchor of one domain": one_domain_anchor,
    "merged, deltas x 0.8": partial(stretched, scale=0.8),
    "merged, deltas x 1.25": partial(stretched, scale=1.25),
    "merged, deltas x 1.5": partial(stretched, scale=1.5),
    "merged, deltas fitted at the centroid": lambda bench: stretched(bench, fitted_scale(bench)),
    "merged, second order from the centroid": second_order_centroid,
    "merged, second order from all pairs": second_order_pairs,
    **{f"merged, {label}": partial(averaged, label=label) for label in AVERAGED},
    "merged, 1/4 of the budget": partial(merged_at, at=0.25),
    "merged, 1/2 of the budget": partial(merged_at, at=0.5),
    "merged, 1/4 extrapolated to the horizon": partial(extrapolated, parts=(0.125, 0.25)),
    "merged, 1/2 extrapolated to the horizon": partial(extrapolated, parts=(0.25, 0.5)),
    "merged, 1/2 extrapolated from 1/8": partial(extrapolated, parts=(0.125, 0.5)),
    "probability ensemble": ensemble,
    "interpolated": interpolated,
    "interpolated, pure components": partial(interpolated, share=0.0),
    "interpolated, second order from the centroid": interpolated_second_order,
    "stack: mean of merged and interpolated": stacked,
    "stack: calibrated at the centroid": calibrated,
    "stack: mean, second order from the centroid": stacked_second_order,
    "stack: mean of merged, interpolated and ensemble": stacked_ensemble,
    "stack: calibrated with one part for all losses": calibrated_at_once,
    "mixing law through the components and the centroid": mixing_law,
    "stack: mean of merged and mixing law": stacked_law,
    "stack: mean of calibrated and mixing law": calibrated_law,
    "stack: mean of second order and mixing law": second_order_law,
    "no model: own share": no_model,
}
COSTLY = {"merged, anchor of one domain", "merged, second order from all pairs"}
TRAINED: dict[tuple[int, float, str], Predictor] = {
    (more, length, kind): partial(trained, more=more, length=length, kind=kind)
    for more in TRAINED_MORE
    for length in TRAINED_LENGTHS
    for kind in ("auto", *REGRESSORS)
}
