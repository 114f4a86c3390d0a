"""The rounds of the search: propose mixtures, score their proxies, fit surrogates; at last the chosen mixture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_demix.artifact import read_json, write_json
from megatron_demix.errors import IncompatibleInputs
from megatron_demix.mixture import Mixture
from megatron_demix.pipeline import data_stages, train_stages
from megatron_demix.pipeline.merging import merge_settings
from megatron_demix.pipeline.stage import Stage
from megatron_demix.pipeline.task_inputs import ScoredTasks
from megatron_demix.pipeline.train_stages import MIXTURES
from megatron_demix.study.study import Study
from megatron_demix.study.training import AnchorSpec

FIT = "fit.json"
MERGED_CENTROID, TRAINED_CENTROID = "merged", "seed"
"""Rows of the maturity check's scores: the merged centroid, and (with a number) the ones trained on its mixture."""
CHOICE = "mixture.json"


@dataclass(frozen=True)
class Round:
    """One iteration. proposal: the stage whose artifact holds this round's mixtures.json."""

    number: int
    proposal: Stage
    scores: Stage
    fit: Stage


def rounds(
    study: Study,
    run: Path,
    tokenizer: Stage,
    data: Mapping[str, Stage],
    base: Stage,
    components: Mapping[str, Stage],
    tasks: ScoredTasks,
    centroid: Stage | None,
) -> list[Round]:
    """components: empty where the study trains its proxies. centroid: scores of the maturity check, for the stack."""
    proposal = _first_proposal(study, run, data)
    result: list[Round] = []
    for number, _ in enumerate(study.search.rounds, start=1):
        if study.search.proxies == "merged":
            scores = _scores_of_merged(study, number, run, tokenizer, data, base, components, tasks, proposal)
        else:
            scores = _scores_of_trained(study, number, run, tokenizer, data, base, tasks, proposal)
        so_far = [*(r.scores for r in result), scores], [*(r.proposal for r in result), proposal]
        fit = _fit(study, number, run, data, *so_far, centroid if _proxy_score(study) == "stack" else None)
        result.append(Round(number, proposal, scores, fit))
        proposal = fit
    return result


def search_space(study: Study, data: Mapping[str, Stage]) -> Any:
    """The megatron_demix.search.space.SearchSpace of a study whose data stages are done."""
    from megatron_demix.search.space import Group, SearchSpace, epoch_caps

    tokens = data_stages.tokens(data, "train")
    budget = train_stages.num_tokens(study, "final")
    anchor = _anchor(study)
    return SearchSpace(
        natural=Mixture.proportional(tokens, label="natural mixture"),
        anchor=study.mixture(anchor.mixture, tokens, "component.anchor.mixture"),
        anchor_share=anchor.share,
        max_shares={d.name: d.max_share for d in study.domains if d.max_share < 1},
        min_shares={d.name: d.min_share for d in study.domains if d.min_share > 0},
        groups={label: Group(tuple(g.domains), g.lowest, g.highest) for label, g in study.search.groups.items()},
        max_kl=study.search.max_kl,
        epoch_caps=epoch_caps(tokens, {d.name: d.max_epochs for d in study.domains}, budget),
    )


def _anchor(study: Study) -> AnchorSpec:
    """What every proxy has seen besides its mixture: nothing, where it was trained on that mixture itself."""
    return study.component.anchor if study.search.proxies == "merged" else AnchorSpec(share=0)


def _proxy_score(study: Study) -> Literal["merged", "interpolated", "stack"]:
    """A trained proxy's score is its own, as a merged one's can be."""
    return study.search.proxy_score if study.search.proxies == "merged" else "merged"


def _space_settings(study: Study) -> dict[str, Any]:
    return {
        "anchor": _anchor(study).model_dump(),
        "final_tokens": train_stages.num_tokens(study, "final"),
        "bounds": {d.name: (d.max_epochs, d.min_share, d.max_share) for d in study.domains},
        "groups": {label: group.model_dump() for label, group in study.search.groups.items()},
        "max_kl": study.search.max_kl,
        "seed": study.seed,
    }


def _first_proposal(study: Study, run: Path, data: Mapping[str, Stage]) -> Stage:
    def make(folder: Path) -> None:
        from megatron_demix.search.sample import sample_mixtures

        space = search_space(study, data)
        weights_MD = sample_mixtures(space, study.search.rounds[0], study.seed, design=study.search.design)
        _write_mixtures(folder, 1, space, weights_MD)

    settings = {"num": study.search.rounds[0], "design": study.search.design, **_space_settings(study)}
    return Stage("rounds/1/sample", run, settings, tuple(data.values()), make)


def _write_mixtures(folder: Path, number: int, space: Any, weights_MD: Any) -> None:
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


def _scores_of_merged(
    study: Study,
    number: int,
    run: Path,
    tokenizer: Stage,
    data: Mapping[str, Stage],
    base: Stage,
    components: Mapping[str, Stage],
    tasks: ScoredTasks,
    proposal: Stage,
) -> Stage:
    # The first round also scores the components themselves: as merges, whose weights are one-hot.
    alone = list(components) if number == 1 and _proxy_score(study) != "merged" else []

    def models() -> dict[str, Any]:
        proposed = {m["name"]: m["weights"] for m in read_json(proposal.folder / MIXTURES)}
        return {
            "components": {n: c.folder for n, c in components.items()},
            "mixtures": proposed | {_alone(n): dict(Mixture.one_hot(components, n)) for n in alone},
            "merge": study.merge,
            "base": train_stages.checkpoint_of(base),
            "seed": study.seed,
        }

    needs = (proposal, base, *components.values())
    settings = merge_settings(study) | ({"components": True} if alone else {})
    return scoring(study, f"rounds/{number}/scores", run, tokenizer, data, "valid", tasks, needs, models, settings)


def _alone(component: str) -> str:
    """A component's name among the proxies of the first round."""
    return f"component-{component}"


def _scores_of_trained(
    study: Study,
    number: int,
    run: Path,
    tokenizer: Stage,
    data: Mapping[str, Stage],
    base: Stage,
    tasks: ScoredTasks,
    proposal: Stage,
) -> Stage:
    trained = [
        train_stages.proxy(study, f"rounds/{number}/proxy_{entry:03d}", run, tokenizer, data, base, proposal, entry)
        for entry in range(study.search.rounds[number - 1])
    ]

    def models() -> dict[str, Any]:
        names = [m["name"] for m in read_json(proposal.folder / MIXTURES)]
        return {"checkpoints": {name: stage.folder for name, stage in zip(names, trained, strict=False)}}

    return scoring(study, f"rounds/{number}/scores", run, tokenizer, data, "valid", tasks, (proposal, *trained), models)


def scoring(
    study: Study,
    name: str,
    run: Path,
    tokenizer: Stage,
    data: Mapping[str, Stage],
    split: str,
    tasks: ScoredTasks,
    needs: Sequence[Stage],
    models: Callable[[], dict[str, Any]],
    merge: Mapping[str, Any] | None = None,
) -> Stage:
    """A stage that scores models on one split and on tasks. models: the components, mixtures and checkpoints of its job.

    merge: how mixtures are made, for the key.
    """
    domains = list(data) if study.evaluate.losses == "all" else study.evaluate.losses
    settings = {
        "split": split,
        "domains": domains,
        "tokens_per_domain": study.evaluate.tokens_per_domain,
        "seq_length": study.train.seq_length,
        "precision": study.train.precision,
        **tasks.settings,
        **({"merge": dict(merge)} if merge else {}),
    }

    def make(work: Path, part: tuple[int, int] | None = None) -> None:
        from megatron_demix.data.tokenizer import load_tokenizer
        from megatron_demix.evaluate.job import SCORES, EvaluateJob
        from megatron_demix.evaluate.scores import ScoreTable

        scored = models()
        if not scored.get("mixtures") and not scored.get("checkpoints"):
            # A round that an earlier one found unnecessary: nothing for the ranks to do.
            if part is None:
                ScoreTable([]).write(work / SCORES)
            return
        maker = stage.part(part) if part else stage
        vocabulary = load_tokenizer(tokenizer.folder)
        job = EvaluateJob(
            model=study.model,
            train=study.train,
            parallel=study.parallel.model_copy(update={"data": study.evaluate.replicas}),
            vocab_size=vocabulary.vocab_size,
            token_bytes=vocabulary.token_bytes.tolist(),
            domains={n: data_stages.prefixes(data[n], split) for n in domains},
            tokens_per_domain=study.evaluate.tokens_per_domain,
            tasks=list(tasks.specs),
            tokenizer=tokenizer.folder,
            micro_batch_size=study.evaluate.micro_batch_size,
            part=part,
            work=work,
            heartbeat=maker.heartbeat,
            threads_per_rank=study.launch.threads_per_rank,
            **scored,
        )
        write_json(maker.job, job.model_dump(mode="json"))

    ranks = study.parallel.tensor * study.parallel.pipeline * study.evaluate.replicas
    all_needs = {s.name: s for s in (*needs, tokenizer, *(data[n] for n in domains))}
    stage = Stage(name, run, settings, tuple(all_needs.values()), make, ranks=ranks, make_part=make)
    return stage


def _fit_facts(surrogate: Any, models: list[str]) -> dict[str, Any]:
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


def _fit(
    study: Study,
    number: int,
    run: Path,
    data: Mapping[str, Stage],
    scores: Sequence[Stage],
    proposals: Sequence[Stage],
    centroid: Stage | None,
) -> Stage:
    """Fit every score on all rounds so far; then propose the next round's mixtures, or after the last round choose."""
    last, search = number == len(study.search.rounds), study.search
    settings = {
        **search.model_dump(include={"objective", "aim", "surrogate", "candidates"}),
        "proxy_score": _proxy_score(study),
        **(search.model_dump(include={"top", "bootstraps"}) if last else {"num": search.rounds[number], "stop": search.stop}),
        **_space_settings(study),
    }

    def make(folder: Path) -> None:
        from megatron_demix.search.objective import Objective
        from megatron_demix.search.optimise import propose
        from megatron_demix.search.outcome import outcome

        space = search_space(study, data)
        surrogates, constant, higher, entries = _surrogates(study, space, scores, proposals, centroid)
        objective = _usable_objective(search.objective, constant)
        goal = Objective(space, surrogates, objective, aim=search.aim, higher_is_better=higher)
        names = [m["name"] for m in entries]
        facts: dict[str, Any] = {
            "surrogates": {name: _fit_facts(surrogate, names) for name, surrogate in surrogates.items()},
            "objective": dict(zip(names, goal.measured().tolist(), strict=True)),
            **({"constant": constant} if constant else {}),
        }
        aims: dict[str, Any] = {"aim": search.aim, "higher_is_better": higher, "seed": study.seed + number}
        if last:
            found = outcome(
                space,
                surrogates,
                objective,
                candidates=search.candidates,
                top=search.top,
                bootstraps=search.bootstraps,
                **aims,
            )
            write_json(folder / CHOICE, found)
        else:
            proposed_MD = propose(space, surrogates, objective, num=search.rounds[number], candidates=search.candidates, **aims)
            if search.stop is not None:
                facts["spread"] = spread = _spread_so_far(study, space, surrogates, objective, aims)
                if spread["enough"]:
                    proposed_MD = proposed_MD[:0]
            _write_mixtures(folder, number + 1, space, proposed_MD)
        write_json(folder / FIT, facts)

    return Stage(
        f"rounds/{number}/fit", run, settings, (*scores, *proposals, *data.values(), *([centroid] if centroid else [])), make
    )


def _surrogates(
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
    alone = [_alone(d) for d in space.domains]
    surrogates, constant = {}, {}
    for s in merged.scores:
        values_M, kind = np.array(merged.column(s.name, names)), _proxy_score(study)
        if kind != "merged":
            components_K = np.array(merged.column(s.name, alone))
            values_M = proxy_scores(kind, weights_MD, values_M, components_K, centroids.get(s.name))
        if np.ptp(values_M) <= 1e-12 * max(1.0, np.abs(values_M).max()):
            constant[s.name] = float(values_M[0])
        else:
            surrogates[s.name] = fit_surrogate(shares_MD, values_M, study.search.surrogate, seed=study.seed, name=s.name)
    higher = {s.name for s in merged.scores if s.direction == "higher"} - set(constant)
    return surrogates, constant, higher, entries


def _usable_objective(objective: Mapping[str, float], constant: Mapping[str, float]) -> dict[str, float]:
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


def _spread_so_far(
    study: Study, space: Any, surrogates: Mapping[str, Any], objective: Mapping[str, float], aims: Mapping[str, Any]
) -> dict[str, Any]:
    """Whether another round is worth its cost: what is left to win, and what has been won over the natural mixture."""
    from megatron_demix.search.optimise import choose_mixture
    from megatron_demix.search.uncertainty import optimum_distribution

    search = study.search
    assert search.stop is not None
    wanted = {name: surrogate for name, surrogate in surrogates.items() if objective.get(name)}
    aims = {**aims, "higher_is_better": aims["higher_is_better"] & set(wanted)}
    choice = choose_mixture(space, wanted, objective, candidates=search.candidates, top=search.top, **aims)
    aims["candidates"] = max(1000, search.candidates // 10)
    spread = optimum_distribution(space, wanted, objective, choice, num=search.bootstraps, **aims)
    return {
        "expected_regret": spread.expected_regret,
        "expected_gain": spread.expected_gain,
        "enough": spread.enough(search.stop),
    }
