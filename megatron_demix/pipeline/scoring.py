"""Stages that score models: merged or trained proxies of a round, and whatever else is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_demix.artifact import read_json, write_json
from megatron_demix.data.tokenizer import load_tokenizer
from megatron_demix.evaluate.job import SCORES, EvaluateJob
from megatron_demix.evaluate.scores import ScoreTable
from megatron_demix.mixture import Mixture
from megatron_demix.pipeline import data_stages, preflight, train_stages
from megatron_demix.pipeline.foundation import Foundation
from megatron_demix.pipeline.merging import merge_settings, normalization, second_order
from megatron_demix.pipeline.stage import Load, Stage
from megatron_demix.pipeline.task_inputs import ScoredTasks
from megatron_demix.pipeline.train_stages import MIXTURES
from megatron_demix.study.study import Study

MERGED_CENTROID, TRAINED_CENTROID = "merged", "seed"
"""Rows of the maturity check's scores: the merged centroid, and (with a number) the ones trained on its mixture."""


def scores_proxies(study: Study) -> bool:
    """Whether the proxies themselves are scored; if not, what their components score says all."""
    return study.proxy_score in ("merged", "stack")


def scores_of_merged(foundation: Foundation, number: int, proposal: Stage, at: int | None = None) -> Stage:
    """at: merges of the components as they were after so many iterations."""
    study, components = foundation.study, foundation.merged
    with_components = number == 1 and study.proxy_score != "merged"

    def models() -> dict[str, Any]:
        order = second_order(study)
        proposed = {m["name"]: order.of(m["weights"]) for m in read_json(proposal.folder / MIXTURES)}
        alone, as_they_are = _alone(foundation, at) if with_components else ({}, {})
        return merges(foundation, components, proposed | alone, at) | as_they_are

    needs = (proposal, foundation.base, *components.values())
    settings = merge_settings(study) | ({"components": _one_hot_is_itself(study) or "as they are"} if with_components else {})
    name = f"rounds/{number}/scores{_after(at)}"

    def num_models() -> int:
        return _num_proposed(study, number, proposal) + (len(components) if with_components else 0)

    return scoring(foundation, name, "valid", foundation.tasks.search, needs, models, num_models, settings)


def _num_proposed(study: Study, number: int, proposal: Stage) -> int:
    """Proxies of a round: as many as it may have, until it is known how many it has."""
    return len(read_json(proposal.folder / MIXTURES)) if proposal.is_intact() else study.search.rounds[number - 1]


def scores_of_components(foundation: Foundation, at: int | None = None) -> Stage:
    """What all rounds need where no proxy is scored itself; with what every token costs, where that decides. at: as above."""
    study, components = foundation.study, foundation.merged
    kept = {"keep_tokens": [component_row(name) for name in components]} if study.proxy_score == "ensemble" else {}

    def models() -> dict[str, Any]:
        alone, as_they_are = _alone(foundation, at)
        return merges(foundation, components, alone, at) | as_they_are | kept

    needs = (foundation.base, *components.values())
    settings = (merge_settings(study) if _one_hot_is_itself(study) else {"components": "as they are"}) | kept
    name = f"rounds/components{_after(at)}"
    return scoring(foundation, name, "valid", foundation.tasks.search, needs, models, lambda: len(components), settings)


def _after(at: int | None) -> str:
    return "" if at is None else f"_after_{at}"


def _alone(foundation: Foundation, at: int | None) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """A job's mixtures, or other fields, by which it scores the components themselves: as merges with one-hot weights, which
    are made in memory, unless the method would change what it merges."""
    components = foundation.merged
    if _one_hot_is_itself(foundation.study):
        return {component_row(name): dict(Mixture.one_hot(components, name)) for name in components}, {}
    return {}, {"checkpoints": {component_row(n): train_stages.checkpoint_of(c, at) for n, c in components.items()}}


def _one_hot_is_itself(study: Study) -> bool:
    """Not where deltas are thinned or scaled, or certain tensors have weights of their own."""
    merge = study.merge
    return merge.density is None and merge.scale in (None, 1) and not merge.rules


def merges(
    foundation: Foundation,
    components: Mapping[str, Stage],
    mixtures: Mapping[str, Mapping[str, float]],
    at: int | None = None,
) -> dict[str, Any]:
    """A scoring job's fields for mixtures of some of the components, as they were after iteration `at` (None: the last)."""
    study = foundation.study
    return {
        "components": {n: train_stages.checkpoint_of(c, at) for n, c in components.items()},
        "mixtures": mixtures,
        "normalize": normalization(study),
        "merge": study.merge,
        "base": train_stages.checkpoint_of(foundation.base),
        "seed": study.seed,
    }


def component_row(component: str) -> str:
    """A component's name among scored models."""
    return f"component-{component}"


def scores_of_trained(foundation: Foundation, number: int, proposal: Stage) -> Stage:
    trained = [
        train_stages.proxy(foundation, f"rounds/{number}/proxy_{entry:03d}", proposal, entry)
        for entry in range(foundation.study.search.rounds[number - 1])
    ]

    def models() -> dict[str, Any]:
        names = [m["name"] for m in read_json(proposal.folder / MIXTURES)]
        return {"checkpoints": {name: stage.folder for name, stage in zip(names, trained, strict=False)}}

    def num_models() -> int:
        return _num_proposed(foundation.study, number, proposal)

    name = f"rounds/{number}/scores"
    return scoring(foundation, name, "valid", foundation.tasks.search, (proposal, *trained), models, num_models)


def scored_losses(foundation: Foundation) -> list[str]:
    """Domains whose loss is measured."""
    losses = foundation.study.evaluate.losses
    return list(foundation.data) if losses == "all" else losses


def scoring(
    foundation: Foundation,
    name: str,
    split: str,
    tasks: ScoredTasks,
    needs: Sequence[Stage],
    models: Callable[[], dict[str, Any]],
    num_models: Callable[[], int],
    merge: Mapping[str, Any] | None = None,
) -> Stage:
    """A stage that scores models on one split and on tasks. models: the components, mixtures and checkpoints of its job.

    num_models: how many that is, at most. merge: how mixtures are made, and what is kept of them, for the key.
    """
    study, tokenizer, data = foundation.study, foundation.tokenizer, foundation.data
    domains = scored_losses(foundation)
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
        scored = models()
        if not scored.get("mixtures") and not scored.get("checkpoints"):
            # A round that an earlier one found unnecessary: nothing for the ranks to do.
            if part is None:
                ScoreTable([]).write(work / SCORES)
            return
        tasks.check_unchanged()
        maker = stage.part(part) if part else stage
        vocabulary = load_tokenizer(tokenizer.folder)
        job = EvaluateJob(
            model=study.model,
            train=study.train,
            # Each replica has a mixture of its own: texts are not spread over ranks.
            parallel=study.parallel.model_copy(
                update={"data": study.evaluate.replicas * expert, "context": 1, "expert": expert},
            ),
            vocab_size=vocabulary.vocab_size,
            token_bytes=vocabulary.token_bytes.tolist(),
            domains={n: data_stages.prefixes(data[n], split) for n in domains},
            tokens_per_domain=study.evaluate.tokens_per_domain,
            tasks=list(tasks.specs),
            tokenizer=tokenizer.folder,
            micro_batch_size=study.evaluate.micro_batch_size,
            generate_batch_size=study.evaluate.generate_batch_size,
            part=part,
            work=work,
            heartbeat=maker.heartbeat,
            threads_per_rank=study.launch.threads_per_rank,
            **scored,
        )
        write_json(maker.job, job.model_dump(mode="json"))

    def check() -> None:
        preflight.check_windows(study, name, {n: data[n] for n in domains}, split)

    expert = study.evaluate.expert
    ranks = study.parallel.tensor * study.parallel.pipeline * expert * study.evaluate.replicas
    all_needs = {s.name: s for s in (*needs, tokenizer, *(data[n] for n in domains))}
    stage = Stage(
        name,
        foundation.run,
        settings,
        tuple(all_needs.values()),
        make,
        ranks=ranks,
        make_part=make,
        check=check,
        load=lambda: Load("scores", num_models(), len(domains) * study.evaluate.tokens_per_domain),
    )
    return stage
