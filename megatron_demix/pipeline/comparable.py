"""Whether this study would have measured what an earlier one did: asked of keys and settings alone, before anything runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_demix.pipeline import train_stages
from megatron_demix.pipeline.foundation import Foundation
from megatron_demix.pipeline.merging import merge_settings
from megatron_demix.pipeline.scoring import scored_losses, scores_proxies
from megatron_demix.pipeline.stage import Stage
from megatron_demix.settings import differences
from megatron_demix.study.training import PhaseName


def reasons_against(here: Foundation, there: Foundation) -> Iterator[str]:
    """Why no score of an earlier study's proxies counts in this one, each with the settings to look at; nothing if some may."""
    kind, other = here.study.search.proxies, there.study.search.proxies
    if kind != other:
        yield f"search.proxies: {other} there, {kind} here"
        return
    yield from _unlike(here.tokenizer, there.tokenizer, "tokenizer.domains keeps one as it is")
    if here.tokenizer.key == there.tokenizer.key:
        yield from _unlike(here.base, there.base, "a base.mixture that names its domains keeps it as it is")
    phase: PhaseName = "component" if kind == "merged" else "proxy"
    settings, others = (train_stages.training_settings(f.study, phase, f.study.seed) for f in (here, there))
    yield from (f"{phase}: {text}" for text in _unequal(settings, others))
    if kind == "trained":
        return
    yield from (f"merge: {text}" for text in _unequal(merge_settings(here.study), merge_settings(there.study)))
    if _anchor(here) != _anchor(there):
        yield (
            f"component.anchor: {_anchor_said(there)} there, {_anchor_said(here)} here, or of other text; an anchor that names "
            "its domains stays what it is"
        )
    if _mixed(here) != _mixed(there):
        yield f"component.mixed: {_mixed_said(there)} there, {_mixed_said(here)} here, or of other text"
    if scores_proxies(here.study) and not scores_proxies(there.study):
        scored = there.study.proxy_score
        yield f"search.proxy_score: {scored} there, so that only its components have scores; set it to interpolated here"
    if here.study.proxy_score != "merged" and there.study.proxy_score == "merged":
        yield "search.proxy_score: merged there, so that its components have no scores of their own; set it to merged here, too"


def scores_left_out(here: Foundation, there: Foundation) -> Iterator[tuple[str, str]]:
    """(score of this study, why proxies of the earlier one lack it)."""
    general, others = (_evaluation(f) for f in (here, there))
    unequal = ", ".join(_unequal(general, others))
    for name in scored_losses(here):
        tokens = here.study.evaluate.tokens_per_domain, there.study.evaluate.tokens_per_domain
        if name not in there.data:
            yield name, "no domain of it"
        elif there.data[name].key != here.data[name].key:
            yield name, "other text there"
        elif name not in scored_losses(there):
            yield name, "not scored there (evaluate.losses)"
        elif tokens[0] != tokens[1]:
            yield name, f"evaluate.tokens_per_domain was {tokens[1]}, is {tokens[0]}"
        elif unequal:
            yield name, unequal
    known = {spec.name: (spec, facts) for spec, facts in _tasks(there)}
    for spec, facts in _tasks(here):
        there_is, other_facts = known.get(spec.name, (None, {}))
        why = (", ".join(_unequal(facts, other_facts)) or unequal) if there_is else "no task of it"
        for score in spec.score_names:
            if why or score not in there_is.score_names:
                yield score, why or "not scored there"


def score_names(foundation: Foundation) -> list[str]:
    """Every score of the search."""
    return [*scored_losses(foundation), *(name for spec in foundation.tasks.search.specs for name in spec.score_names)]


def _evaluation(foundation: Foundation) -> dict[str, Any]:
    """What decides every score alike."""
    train = foundation.study.train
    return {"train.seq_length": train.seq_length, "train.precision": train.precision}


def _tasks(foundation: Foundation) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Each task, and what decides its scores; which of them were asked for does not decide any."""
    tasks = foundation.tasks.search
    for spec, facts in zip(tasks.specs, tasks.settings.get("tasks", ()), strict=True):
        yield spec, {key: value for key, value in facts.items() if key != "scores"}


def _unlike(here: Stage, there: Stage, advice: str) -> Iterator[str]:
    """Why two stages of one name are not the same."""
    if (here.name, here.key) == (there.name, there.key):
        return
    needs = {need.name: need.key for need in there.needs}
    other = [n.name for n in here.needs if needs.get(n.name) != n.key]
    other += [name for name in needs if name not in {n.name for n in here.needs}]
    reasons = [*_unequal(here.settings, there.settings), *([f"made from other {', '.join(other)}"] if other else [])]
    yield f"{here.name}: {', '.join(reasons) or f'was {there.name}'} ({advice})"


def _unequal(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """ "lr: 0.003 there, 0.001 here" for each setting that differs."""
    return [f"{place}: {_said(theirs)} there, {_said(ours)} here" for place, theirs, ours in differences(there, here)]


def _said(value: Any) -> Any:
    return "nothing" if value is None else value


def _anchor(foundation: Foundation) -> tuple[float, Any]:
    """Its share, and the actual shares of the text in it, whatever words the study has for them."""
    anchor, data = foundation.study.component.anchor, foundation.data
    if not anchor.share:
        return 0.0, None
    if anchor.mixture == "natural":
        return anchor.share, {(name, stage.key) for name, stage in data.items()}
    mixture = foundation.study.mixture(anchor.mixture, {}, "component.anchor.mixture")
    return anchor.share, {(name, data[name].key): round(share, 9) for name, share in mixture.items() if share}


def _mixed(foundation: Foundation) -> dict[str, Any]:
    """The weights of each mixed component, with the text that they are of."""
    data, study = foundation.data, foundation.study
    mixed = study.component.mixed_weights(study.domain_names)
    return {name: {(n, data[n].key): w for n, w in weights.items() if w} for name, weights in mixed.items()}


def _mixed_said(foundation: Foundation) -> str:
    return ", ".join(foundation.mixed) or "none"


def _anchor_said(foundation: Foundation) -> str:
    anchor = foundation.study.component.anchor
    mixture = anchor.mixture
    words = f"{mixture} over {', '.join(foundation.data)}" if isinstance(mixture, str) else str(mixture)
    return f"{anchor.share:g} of {words}"
