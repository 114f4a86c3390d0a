"""The rounds of the search: propose mixtures, score their proxies, fit surrogates; at last the chosen mixture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_demix.artifact import read_json, write_json
from megatron_demix.errors import ConfigError, MixtureError
from megatron_demix.mixture import Mixture
from megatron_demix.pipeline import data_stages, train_stages
from megatron_demix.pipeline.comparable import score_names
from megatron_demix.pipeline.earlier_stages import Earlier
from megatron_demix.pipeline.foundation import Foundation
from megatron_demix.pipeline.merging import check_rules
from megatron_demix.pipeline.scoring import (
    scores_of_components,
    scores_of_merged,
    scores_of_trained,
    scores_proxies,
)
from megatron_demix.pipeline.stage import Stage
from megatron_demix.pipeline.surrogates import fit_facts, fit_surrogates
from megatron_demix.pipeline.train_stages import MIXTURES
from megatron_demix.search.proxy_score import REVISION
from megatron_demix.search.space import TOLERANCE, Group, SearchSpace, epoch_caps
from megatron_demix.study.choices import MIN_PROXIES
from megatron_demix.study.search import SearchSpec
from megatron_demix.study.study import Study
from megatron_demix.study.training import AnchorSpec

if TYPE_CHECKING:
    from megatron_demix.search.objective import Objective

FIT = "fit.json"
CHOICE = "mixture.json"


@dataclass(frozen=True)
class Round:
    """One iteration. proposal: the stage whose artifact holds this round's mixtures.json. scores: the one that scores its
    proxies; where no proxy is scored itself, the components' scores, the same stage in all rounds."""

    number: int
    proposal: Stage
    scores: Stage
    fit: Stage


def rounds(foundation: Foundation, centroid: Stage | None, earlier: Sequence[Earlier] = ()) -> list[Round]:
    """centroid: scores of the maturity check. Raises ConfigError where the first round has too few proxies."""
    study = foundation.study
    _enough_proxies(foundation, earlier)
    centroid = centroid if study.goes_through_centroid else None
    proposal = _fit(foundation, 0, [[]], [], centroid, earlier) if _covers(foundation, earlier) else _first_proposal(foundation)
    kept = [*train_stages.kept_iterations(study)[:-1], None] if study.search.extrapolate else [None]
    components = [] if scores_proxies(study) else [scores_of_components(foundation, at) for at in kept]

    def scored(number: int) -> list[Stage]:
        if study.search.proxies == "trained":
            return [scores_of_trained(foundation, number, proposal)]
        return components or [scores_of_merged(foundation, number, proposal, at) for at in kept]

    result: list[Round] = []
    scores: list[list[Stage]] = []
    for number, _ in enumerate(study.search.rounds, start=1):
        scores.append(scored(number))
        by_iteration = [list(dict.fromkeys(stages)) for stages in zip(*scores, strict=True)]
        proposals = [*(r.proposal for r in result), proposal]
        fit = _fit(foundation, number, by_iteration, proposals, centroid, earlier)
        result.append(Round(number, proposal, scores[-1][-1], fit))
        proposal = fit
    return result


def _enough_proxies(foundation: Foundation, earlier: Sequence[Earlier]) -> None:
    """A score that no earlier study has needs a first round that fixes its surrogate."""
    first = foundation.study.search.rounds[0]
    lacking = [name for name in score_names(foundation) if not any(name in e.scores for e in earlier)]
    if lacking and first < MIN_PROXIES:
        raise ConfigError(
            f"search.rounds: the first has {first} proxies. A surrogate needs {MIN_PROXIES}, and no earlier study has the "
            f"scores {', '.join(lacking)}. Make it {MIN_PROXIES} or more, or leave them out of `evaluate`."
        )


def _covers(foundation: Foundation, earlier: Sequence[Earlier]) -> bool:
    """Whether an earlier study has varied every domain of this one, and measured all that this one aims at: the first round
    then goes on from a fit, as any other."""
    aimed = {name for name, weight in foundation.study.search.objective.items() if weight}
    return any(set(foundation.data) <= set(e.same) and aimed <= set(e.scores) for e in earlier)


def search_space(study: Study, data: Mapping[str, Stage]) -> SearchSpace:
    """Of a study whose data stages are done. Raises MixtureError where it holds no mixture, or one."""
    tokens = data_stages.tokens(data, "train")
    budget = train_stages.blend_tokens(study)
    caps = epoch_caps(tokens, {d.name: d.max_epochs for d in study.domains}, budget)
    return _with_choice(_space(study, tokens, _anchor(study), max_kl=study.search.max_kl, epoch_caps=caps))


def check_bounds(study: Study) -> None:
    """Raises MixtureError where the anchor leaves no mixture within the bounds, as far as this is known without the data."""
    anchor = _anchor(study)
    if anchor.mixture != "natural":
        _space(study, dict.fromkeys(study.domain_names, 1), anchor)


def _with_choice(space: SearchSpace) -> SearchSpace:
    lows_D, highs_D = space.ranges_D2.T
    if len(space.domains) > 1 and (highs_D - lows_D < TOLERANCE).all():
        floors = "" if not space.anchor_share else ", and component.anchor, below which no domain goes,"
        raise MixtureError(
            "the bounds on shares (min_share, max_share, max_epochs, search.groups)"
            f"{floors} leave one mixture, {', '.join(f'{n} {s:.4g}' for n, s in zip(space.domains, lows_D, strict=True))}, so "
            "that there is nothing to search for. Loosen one of them."
        )
    return space


def _space(study: Study, tokens: Mapping[str, int], anchor: AnchorSpec, **limits: Any) -> SearchSpace:
    """tokens: of each domain's training data. limits: what depends on these."""
    return SearchSpace(
        natural=Mixture.proportional(tokens, label="natural mixture"),
        anchor=study.mixture(anchor.mixture, tokens, "component.anchor.mixture"),
        anchor_share=anchor.share,
        max_shares={d.name: d.max_share for d in study.domains if d.max_share < 1},
        min_shares={d.name: d.min_share for d in study.domains if d.min_share > 0},
        groups={label: Group(tuple(g.domains), g.lowest, g.highest) for label, g in study.search.groups.items()},
        **limits,
    )


def _anchor(study: Study) -> AnchorSpec:
    """What every proxy has seen besides its mixture: nothing, where it was trained on that mixture itself."""
    return study.component.anchor if study.search.proxies == "merged" else AnchorSpec(share=0)


def _space_settings(study: Study) -> dict[str, Any]:
    return {
        "anchor": _anchor(study).model_dump(),
        "final_tokens": train_stages.num_tokens(study, "final"),
        "bounds": {d.name: (d.max_epochs, d.min_share, d.max_share) for d in study.domains},
        "groups": {label: group.model_dump() for label, group in study.search.groups.items()},
        "max_kl": study.search.max_kl,
        "seed": study.seed,
    }


def _first_proposal(foundation: Foundation) -> Stage:
    study, data = foundation.study, foundation.data

    def make(folder: Path) -> None:
        from megatron_demix.search.sample import sample_mixtures

        space = search_space(study, data)
        weights_MD = sample_mixtures(space, study.search.rounds[0], study.seed, design=study.search.design)
        _write_mixtures(folder, 1, space, weights_MD)

    def check() -> None:
        check_rules(study)
        search_space(study, data)

    settings = {"num": study.search.rounds[0], "design": study.search.design, **_space_settings(study)}
    return Stage("rounds/1/sample", foundation.run, settings, tuple(data.values()), make, check=check)


def _write_mixtures(folder: Path, number: int, space: SearchSpace, weights_MD: Any) -> None:
    shares_MD = space.shares(weights_MD)
    entries = [
        {
            "name": f"r{number}_{m:03d}",
            "weights": dict(zip(space.domains, w, strict=True)),
            "shares": dict(zip(space.domains, s, strict=True)),
        }
        for m, (w, s) in enumerate(zip(weights_MD.tolist(), shares_MD.tolist(), strict=True))
    ]
    write_json(folder / MIXTURES, entries)


def _fit(
    foundation: Foundation,
    number: int,
    scores: Sequence[Sequence[Stage]],
    proposals: Sequence[Stage],
    centroid: Stage | None,
    earlier: Sequence[Earlier],
) -> Stage:
    """Fit every score on earlier studies and all rounds so far; then propose the next round's mixtures, or after the last round
    choose. Number 0 proposes the first. scores: of all rounds, after each kept iteration of the components, at last the end."""
    study, data = foundation.study, foundation.data
    last, search = number == len(study.search.rounds), study.search
    settings = {
        **search.model_dump(include={"objective", "aim", "surrogate", "candidates"}),
        "proxy_score": study.proxy_score,
        **({"curves": REVISION} if study.goes_through_centroid and (centroid or study.mixed_centroid) else {}),
        **({} if last else {"num": search.rounds[number], "stop": search.stop}),
        **(search.model_dump(include={"top", "bootstraps"}) if last or search.stop is not None else {}),
        **_space_settings(study),
    }

    def make(folder: Path) -> None:
        from megatron_demix.search.objective import Objective, usable_objective
        from megatron_demix.search.optimise import propose
        from megatron_demix.search.outcome import outcome

        space = search_space(study, data)
        fitted = fit_surrogates(study, space, scores, proposals, centroid, earlier)
        surrogates, higher = fitted.surrogates, fitted.higher_is_better
        objective = usable_objective(search.objective, fitted.constant)
        goal = Objective(space, surrogates, objective, aim=search.aim, higher_is_better=higher, seed=study.seed + number)
        measured = zip(fitted.names, goal.measured().tolist(), strict=True)
        facts: dict[str, Any] = {
            "surrogates": {name: fit_facts(surrogate, fitted.names) for name, surrogate in surrogates.items()},
            "objective": {name: value for name, value in measured if math.isfinite(value)},
            **({"higher_is_better": sorted(higher)} if higher else {}),
            **({"constant": fitted.constant} if fitted.constant else {}),
            **({"earlier": fitted.earlier} if earlier else {}),
            **({"through_centroid": {name: c.facts for name, c in fitted.curves.items()}} if fitted.curves else {}),
            **({"extrapolated": line.facts} if (line := train_stages.horizon_line(study)) else {}),
        }
        if last:
            found = outcome(goal, candidates=search.candidates, top=search.top, bootstraps=search.bootstraps)
            write_json(folder / CHOICE, found)
        elif search.stop is not None and proposals and not read_json(proposals[-1].folder / MIXTURES):
            # Nothing was measured since: deciding anew, with another seed, could only begin the rounds again by chance.
            facts["spread"] = read_json(proposals[-1].folder / FIT)["spread"]
            write_json(folder / MIXTURES, [])
        else:
            proposed_MD = propose(goal, num=search.rounds[number], candidates=search.candidates)
            if search.stop is not None:
                facts["spread"] = spread = _spread_so_far(goal, search)
                if spread["enough"]:
                    proposed_MD = proposed_MD[:0]
            _write_mixtures(folder, number + 1, space, proposed_MD)
        write_json(folder / FIT, facts)

    def check() -> None:
        if search.surrogate == "lightgbm":
            from megatron_demix.search.regressors import import_lightgbm

            import_lightgbm()

    needs = (
        *chain.from_iterable(scores),
        *proposals,
        *(e.stage for e in earlier),
        *data.values(),
        *([centroid] if centroid else []),
    )
    return Stage(f"rounds/{number}/fit", foundation.run, settings, needs, make, check=check)


def _spread_so_far(goal: Objective, search: SearchSpec) -> dict[str, Any]:
    """Whether another round is worth its cost: what is left to win, and what has been won over the natural mixture."""
    from megatron_demix.search.optimise import choose_mixture
    from megatron_demix.search.uncertainty import optimum_distribution

    assert search.stop is not None
    choice = choose_mixture(goal, candidates=search.candidates, top=search.top)
    spread = optimum_distribution(goal, choice, num=search.bootstraps, candidates=max(1000, search.candidates // 10))
    return {
        "expected_regret": spread.expected_regret,
        "expected_gain": spread.expected_gain,
        "enough": spread.enough(search.stop),
    }
