"""The rounds of the search: propose mixtures, score their proxies, fit surrogates; at last the chosen mixture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_demix.artifact import read_json, write_json
from megatron_demix.mixture import Mixture
from megatron_demix.pipeline import data_stages, train_stages
from megatron_demix.pipeline.stage import Stage
from megatron_demix.study import Study

MIXTURES = "mixtures.json"
FIT = "fit.json"
CHOICE = "mixture.json"


@dataclass(frozen=True)
class Round:
    """One iteration. proposal: the stage whose artifact holds this round's mixtures.json."""

    number: int
    proposal: Stage
    scores: Stage
    fit: Stage


def rounds(
    study: Study, run: Path, tokenizer: Stage, data: Mapping[str, Stage], components: Mapping[str, Stage]
) -> list[Round]:
    proposal = _first_proposal(study, run, data)
    result: list[Round] = []
    for number, _ in enumerate(study.search.rounds, start=1):
        scores = _scores(study, number, run, tokenizer, data, components, proposal)
        fit = _fit(study, number, run, data, [*(r.scores for r in result), scores], [*(r.proposal for r in result), proposal])
        result.append(Round(number, proposal, scores, fit))
        proposal = fit
    return result


def search_space(study: Study, data: Mapping[str, Stage]) -> Any:
    """The megatron_demix.search.space.SearchSpace of a study whose data stages are done."""
    from megatron_demix.search.space import SearchSpace

    natural = data_stages.tokens(data, "train")
    budget = train_stages.num_tokens(study, "final")
    caps = {d.name: min(1.0, d.max_epochs * natural[d.name] / budget) for d in study.domains}
    return SearchSpace(
        natural=Mixture.proportional(natural, label="natural mixture"),
        anchor=study.mixture(study.component.anchor.mixture, natural, "component.anchor.mixture"),
        anchor_share=study.component.anchor.share,
        max_shares=caps,
    )


def _space_settings(study: Study) -> dict[str, Any]:
    return {
        "anchor": study.component.anchor.model_dump(),
        "final_tokens": train_stages.num_tokens(study, "final"),
        "max_epochs": {d.name: d.max_epochs for d in study.domains},
        "seed": study.seed,
    }


def _first_proposal(study: Study, run: Path, data: Mapping[str, Stage]) -> Stage:
    def make(folder: Path) -> None:
        from megatron_demix.search.sample import sample_mixtures

        space = search_space(study, data)
        _write_mixtures(folder, 1, space, sample_mixtures(space, study.search.rounds[0], study.seed))

    settings = {"num": study.search.rounds[0], **_space_settings(study)}
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


def _scores(
    study: Study,
    number: int,
    run: Path,
    tokenizer: Stage,
    data: Mapping[str, Stage],
    components: Mapping[str, Stage],
    proposal: Stage,
) -> Stage:
    def models() -> dict[str, Any]:
        mixtures = {m["name"]: m["weights"] for m in read_json(proposal.folder / MIXTURES)}
        return {"components": {n: c.folder for n, c in components.items()}, "mixtures": mixtures}

    needs = (proposal, *components.values())
    return scoring(study, f"rounds/{number}/scores", run, tokenizer, data, "valid", needs, models)


def scoring(
    study: Study,
    name: str,
    run: Path,
    tokenizer: Stage,
    data: Mapping[str, Stage],
    split: str,
    needs: Sequence[Stage],
    models: Callable[[], dict[str, Any]],
) -> Stage:
    """A stage that scores models on one split. models: the components, mixtures and checkpoints of its EvaluateJob."""
    domains = list(data) if study.evaluate.losses == "all" else study.evaluate.losses
    settings = {
        "split": split,
        "domains": domains,
        "tokens_per_domain": study.evaluate.tokens_per_domain,
        "seq_length": study.train.seq_length,
        "precision": study.train.precision,
    }

    def make(work: Path) -> None:
        from megatron_demix.data.tokenizer import load_tokenizer
        from megatron_demix.evaluate.job import EvaluateJob

        vocabulary = load_tokenizer(tokenizer.folder)
        job = EvaluateJob(
            model=study.model,
            train=study.train,
            parallel=study.parallel.model_copy(update={"data": study.evaluate.replicas}),
            vocab_size=vocabulary.vocab_size,
            token_bytes=vocabulary.token_bytes.tolist(),
            domains={n: data_stages.prefixes(data[n], split) for n in domains},
            tokens_per_domain=study.evaluate.tokens_per_domain,
            micro_batch_size=study.evaluate.micro_batch_size,
            work=work,
            heartbeat=stage.heartbeat,
            threads_per_rank=study.launch.threads_per_rank,
            **models(),
        )
        write_json(stage.job, job.model_dump(mode="json"))

    ranks = study.parallel.tensor * study.parallel.pipeline * study.evaluate.replicas
    all_needs = {s.name: s for s in (*needs, tokenizer, *(data[n] for n in domains))}
    stage = Stage(name, run, settings, tuple(all_needs.values()), make, ranks=ranks)
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
    study: Study, number: int, run: Path, data: Mapping[str, Stage], scores: Sequence[Stage], proposals: Sequence[Stage]
) -> Stage:
    """Fit every score on all rounds so far; then propose the next round's mixtures, or after the last round choose."""
    last = number == len(study.search.rounds)
    settings = {
        "objective": study.search.objective,
        "surrogate": study.search.surrogate,
        "candidates": study.search.candidates,
        **({"top": study.search.top} if last else {"num": study.search.rounds[number]}),
        **_space_settings(study),
    }

    def make(folder: Path) -> None:
        import numpy as np

        from megatron_demix.evaluate.scores import ScoreTable
        from megatron_demix.search.optimise import choose_mixture, propose
        from megatron_demix.search.surrogate import fit_surrogate

        space = search_space(study, data)
        entries = [m for p in proposals for m in read_json(p.folder / MIXTURES)]
        tables = [ScoreTable.read(s.folder / "scores.json") for s in scores]
        rows = {name: row for table in tables for name, row in table.rows.items()}
        merged = ScoreTable(tables[0].scores, rows)
        names = [m["name"] for m in entries]
        shares_MD = np.array([[m["shares"][d] for d in space.domains] for m in entries])
        surrogates = {}
        for score in merged.scores:
            values = np.array(merged.column(score.name, names))
            surrogates[score.name] = fit_surrogate(shares_MD, values, study.search.surrogate, seed=study.seed, name=score.name)
        write_json(folder / FIT, {name: _fit_facts(surrogate, names) for name, surrogate in surrogates.items()})
        wanted = {n: s for n, s in surrogates.items() if study.search.objective.get(n)}
        objective, candidates, seed = study.search.objective, study.search.candidates, study.seed + number
        if not last:
            proposed = propose(space, wanted, objective, num=study.search.rounds[number], candidates=candidates, seed=seed)
            _write_mixtures(folder, number + 1, space, proposed)
            return
        choice = choose_mixture(space, wanted, objective, top=study.search.top, candidates=candidates, seed=seed)
        predicted = {
            n: [float(v[0]) for v in s.predict(np.array([[choice.shares[d] for d in space.domains]]))]
            for n, s in surrogates.items()
        }
        write_json(
            folder / CHOICE,
            {
                "weights": dict(choice.shares),
                "merge_weights": dict(choice.weights),
                "unit": "actual shares of trained tokens; merge_weights are the proxy's weights over the components",
                "predicted": predicted,
                "objective": list(choice.objective),
            },
        )

    return Stage(f"rounds/{number}/fit", run, settings, (*scores, *proposals, *data.values()), make)
