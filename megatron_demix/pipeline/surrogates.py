"""From the score tables of a study to a surrogate of each score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from megatron_demix.artifact import read_json
from megatron_demix.errors import CorruptInput
from megatron_demix.evaluate.ensemble import FOLDER, Ensemble
from megatron_demix.evaluate.job import SCORES
from megatron_demix.evaluate.scores import Score, ScoreTable
from megatron_demix.merge.second_order import SecondOrder
from megatron_demix.pipeline.earlier_stages import Earlier
from megatron_demix.pipeline.merging import second_order
from megatron_demix.pipeline.scoring import (
    MERGED_CENTROID,
    TRAINED_CENTROID,
    component_row,
)
from megatron_demix.pipeline.stage import Stage
from megatron_demix.pipeline.train_stages import MIXTURES, horizon_line
from megatron_demix.search.fits import fit_scores
from megatron_demix.search.mixing_law import law_through
from megatron_demix.search.proxy_score import Curves, part_of_merged
from megatron_demix.search.space import SearchSpace
from megatron_demix.search.surrogate import Surrogate, is_constant
from megatron_demix.study.search import ProxyScore
from megatron_demix.study.study import Study


@dataclass(frozen=True)
class Fitted:
    """Of all proxies so far. constant: the value of each score that is the same for all, and has no surrogate. names: of the
    proxies, in the surrogates' order. earlier: by study, what was used of it, and what was not, and why. curves: of each score
    that goes through a trained centroid's."""

    surrogates: dict[str, Surrogate]
    constant: dict[str, float]
    higher_is_better: set[str]
    names: list[str]
    earlier: dict[str, Any]
    curves: dict[str, Curves]


@dataclass
class _Measured:
    """The proxies of one study. components: the rows of its components alone, in the order of second_order's coefficients.

    ensemble: by score that likelihoods decide, of each proxy as a mean of probabilities; empty where nothing asks for it.
    """

    entries: list[dict[str, Any]]
    table: ScoreTable
    components: list[str]
    second_order: SecondOrder
    ensemble: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def scores(self) -> dict[str, Score]:
        return {score.name: score for score in self.table.scores}

    @property
    def weights_MC(self) -> np.ndarray:
        """Of all components in every proxy."""
        return self.second_order.coefficients(self.weights_MK)

    @property
    def weights_MK(self) -> np.ndarray:
        """Of the domains, in every proxy."""
        return np.array([[*m["weights"].values()] for m in self.entries])

    def values(self, score: str, kind: ProxyScore, curves: Curves | None) -> np.ndarray:
        """What the proxies count as; NaN where this study, or the proxy, has no such score."""
        if score not in self.scores or not self.entries:
            return np.full(len(self.entries), np.nan)
        if score in self.ensemble:
            return self.ensemble[score]
        if kind == "merged":
            return self._merged(score)
        averaged_M = self.weights_MC @ self._components(score)
        if curves is None:
            return (averaged_M + self._merged(score)) / 2 if kind == "stack" else averaged_M
        law_M = curves.law.of(self.weights_MK, self.domain_components(score))
        if kind == "stack":
            return curves.stacked(law_M, averaged_M, self._merged(score))
        # The law knows nothing of mixed components, of which the average of all is a function.
        return (law_M + averaged_M) / 2 if len(self.components) > self.second_order.num_domains else law_M

    def averaged_centroid(self, score: str) -> float:
        """Of equal merge weights."""
        return float(self._components(score) @ self.second_order.centroid_K)

    def domain_components(self, score: str) -> np.ndarray:
        """[K] of the components of single domains."""
        return self._components(score)[: self.second_order.num_domains]

    def _merged(self, score: str) -> np.ndarray:
        return np.array(self.table.column(score, [m["name"] for m in self.entries], lacking=np.nan))

    def _components(self, score: str) -> np.ndarray:
        return np.array(self.table.column(score, self.components))


def fit_surrogates(
    study: Study,
    space: SearchSpace,
    scores: Sequence[Sequence[Stage]],
    proposals: Sequence[Stage],
    centroid: Stage | None,
    earlier: Sequence[Earlier] = (),
) -> Fitted:
    """Fit the proxies of all rounds so far and of earlier studies. A mixture that was scored in several studies counts once: in
    this one, else in the first of them. scores: of all rounds, after each kept iteration of the components, at last the end.
    centroid: what every proxy's score goes through, an earlier study's too, so that a score means one thing in all of them.
    """
    by_iteration = [_own(study, stages, proposals) for stages in scores]
    own, line = by_iteration[-1], horizon_line(study)
    sources = [own, *map(_of_earlier, earlier)]
    shares = [m["shares"] for measured in sources for m in measured.entries]
    dropped = [name for name in dict.fromkeys(name for row in shares for name in row) if name not in space.domains]
    met = {_mixture(m) for m in own.entries}
    for measured in sources[1:]:
        measured.entries = [m for m in measured.entries if _mixture(m) not in met]
        met |= {_mixture(m) for m in measured.entries}
    entries = [m for measured in sources for m in measured.entries]
    shares_MD = np.array([[m["shares"].get(d, 0.0) for d in (*space.domains, *dropped)] for m in entries])
    kind, curves = study.proxy_score, _curves(study, sources, _components_alone(own, space.domains, earlier), centroid)
    varying, constant = {}, {}
    known = {name: score for measured in sources for name, score in measured.scores.items()}
    for name in known:
        values_of = [measured.values(name, kind, curves.get(name)) for measured in sources]
        if line:
            values_of[0] = line.coefficients_P @ [measured.values(name, kind, None) for measured in by_iteration]
        values_M = np.concatenate(values_of)
        measured_M = np.isfinite(values_M)
        if not measured_M.any():
            if own.entries:
                raise CorruptInput(
                    f"score {name!r} is no finite number for any of {len(entries)} proxies: nothing can be predicted."
                )
            continue  # what only this study measures, before it has any proxies
        if is_constant(values_M[measured_M]):
            constant[name] = float(values_M[measured_M][0])
        else:
            varying[name] = values_M
    surrogates = dict(fit_scores(shares_MD, varying, study.search.surrogate, seed=study.seed, num_dropped=len(dropped)))
    higher = {name for name, score in known.items() if score.direction == "higher"} - set(constant)
    facts = {e.label: {"proxies": len(m.entries), **e.facts} for e, m in zip(earlier, sources[1:], strict=True)}
    return Fitted(surrogates, constant, higher, [m["name"] for m in entries], facts, curves)


def _own(study: Study, scores: Sequence[Stage], proposals: Sequence[Stage]) -> _Measured:
    order = second_order(study)
    tables = [ScoreTable.read(s.folder / SCORES) for s in scores]
    rows = {name: row for table in tables for name, row in table.rows.items()}
    table = ScoreTable(next((t.scores for t in tables if t.scores), []), rows)
    entries = [m for p in proposals for m in read_json(p.folder / MIXTURES)]
    own = _Measured(entries, table, [component_row(name) for name in order.names], order)
    if study.proxy_score == "ensemble":
        (components,) = scores
        own.ensemble = Ensemble(components.folder / FOLDER, own.components).scores(own.weights_MC)
    return own


def _of_earlier(earlier: Earlier) -> _Measured:
    entries = read_json(earlier.stage.folder / MIXTURES)
    components = [earlier.row(component_row(name)) for name in earlier.second_order.names]
    return _Measured(entries, ScoreTable.read(earlier.stage.folder / SCORES), components, earlier.second_order)


def _mixture(entry: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    """Its shares, so that those of two studies can be compared."""
    return tuple(sorted((name, round(share, 9)) for name, share in entry["shares"].items() if share))


def _components_alone(own: _Measured, domains: Sequence[str], earlier: Sequence[Earlier]) -> list[_Measured]:
    """Where this study's components have scores of their own: here, and before its first round in earlier studies that have all
    of them, as theirs."""
    if own.table.rows:
        return [own]
    names = own.second_order.names
    return [
        replace(_of_earlier(e), components=[e.row(component_row(name)) for name in names], second_order=own.second_order)
        for e in earlier
        if set(domains) <= set(e.same)
    ]


def _curves(
    study: Study, sources: Sequence[_Measured], alone: Sequence[_Measured], centroid: Stage | None
) -> dict[str, Curves]:
    """By score, where a model was really trained on all domains in equal parts: a component of this study, whose merges then go
    through it themselves, or what a maturity check has measured. The components of all sources are on one side of a law's
    limit."""
    if not study.goes_through_centroid:
        return {}
    known = study.mixed_centroid
    table = None if centroid is None else ScoreTable.read(centroid.folder / SCORES)
    curves: dict[str, Curves] = {}
    for own in alone:
        for name in [name for name in own.scores if name not in curves]:
            if table is not None:
                seeds = [row for row in table.rows if row.startswith(TRAINED_CENTROID)]
                trained = float(np.mean(table.column(name, seeds)))
            elif known is not None:
                trained = own.table.column(name, [own.components[own.second_order.names.index(known)]])[0]
            else:
                return {}
            part = 1.0
            if table is not None and known is None:
                part = part_of_merged(own.averaged_centroid(name), table.column(name, [MERGED_CENTROID])[0], trained)
            beside = [source.domain_components(name) for source in sources if name in source.scores]
            law = law_through(own.domain_components(name), trained, np.concatenate(beside))
            curves[name] = Curves(law, part)
    return curves


def fit_facts(surrogate: Surrogate, names: Sequence[str]) -> dict[str, Any]:
    """What the report shows of a surrogate: all out of fold. names: of all proxies."""
    facts = surrogate.cross_validation
    models = [name for name, score in zip(names, surrogate.scores_M, strict=True) if np.isfinite(score)]
    return {
        "kind": surrogate.kind,
        "rmse": facts["rmse"],
        "spearman": facts["spearman"],
        "skill": surrogate.skill,
        "models": models,
        "measured": facts["measured_M"].tolist(),
        "predicted": facts["predicted_M"].tolist(),
        "std": facts["std_M"].tolist(),
    }
