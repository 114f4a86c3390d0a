"""What the data, once it is there, says of the stages to come: what it cannot fill is refused before anything is trained."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

from megatron_demix.errors import ConfigError, MixtureError
from megatron_demix.mixture import Mixture, apportion, tokens_of_epochs
from megatron_demix.pipeline.data_stages import splits
from megatron_demix.pipeline.stage import Stage, with_needs
from megatron_demix.study.study import Study
from megatron_demix.units import format_count

FEW_DOCUMENTS = 20
"""Fewer held-out documents than this are pointed out: one more or less of them would change a domain's loss."""


def check(stages: Sequence[Stage], around: Callable[[Stage], AbstractContextManager] = nullcontext) -> None:
    """Raises MixtureError or ConfigError naming the first stage to do that its data cannot fill. Where that is not there yet,
    nothing is said. around: entered while a stage is asked."""
    data = {stage.name for stage in with_needs(stages) if stage.kind == "data" and stage.is_intact()}
    for stage in stages:
        if not stage.is_intact() and all(need.name in data for need in stage.needs if need.kind == "data"):
            with around(stage):
                stage.check()


def check_filled(
    study: Study, what: str, mixture: Mixture, budget: int, data: Mapping[str, Stage], setting: str, *remedies: str
) -> None:
    """Raises MixtureError where `budget` tokens of a mixture repeat a domain more often than its max_epochs.

    data: finished stages by domain; those of weight 0 may be absent. setting: of the budget. remedies: what else helps.
    """
    used = [domain for domain in study.domains if mixture[domain.name] > 0]
    sizes = {d.name: splits(data[d.name])["train"]["tokens"] for d in used}
    limits = {d.name: tokens_of_epochs(sizes[d.name], d.max_epochs) for d in used}
    wanted = dict(zip(limits, apportion(budget, [mixture[name] for name in limits]), strict=True))
    step = study.train.global_batch_size * study.train.seq_length
    most = int(min(limit / mixture[name] for name, limit in limits.items()) - budget % step) // step * step
    advice = ", ".join([*([f"set {setting} to at most {most}"] if most > 0 else []), *remedies, "give it more text"])
    for domain in used:
        name, size = domain.name, sizes[domain.name]
        if wanted[name] > limits[name]:
            raise MixtureError(
                f"{what}: its share {mixture[name]:.4g} of domain {name!r} is {format_count(wanted[name])} tokens, which "
                f"repeats the {format_count(size)} there are {wanted[name] / max(size, 1):.3g} times; max_epochs is "
                f"{domain.max_epochs:g}. {advice[0].upper()}{advice[1:]}, or raise its max_epochs."
            )


def check_windows(study: Study, name: str, data: Mapping[str, Stage], split: str) -> None:
    """Raises ConfigError where a split of one of these domains, which stage `name` scores, holds less than one window. Warns of
    few tokens and documents."""
    window = study.train.seq_length + 1
    for domain, stage in data.items():
        held = splits(stage)[split]
        if held["tokens"] < window:
            raise ConfigError(
                f"stage {name}: the {split} split of domain {domain!r} has {_held(held['tokens'], held['documents'])}, but one "
                f"evaluation window is {window:,} (train.seq_length + 1). {_more_of(study, domain, split)}, or leave it out of "
                "evaluate.losses."
            )
        if said := few(study, domain, split, **held):
            warnings.warn(said, stacklevel=2)


def few(study: Study, domain: str, split: str, *, tokens: int, documents: int, **_: int) -> str:
    """What is to be said against scores on so little of a domain; empty where it is enough."""
    wanted = study.evaluate.tokens_per_domain
    short = f", and evaluate.tokens_per_domain asks for {wanted:,}" if tokens < wanted else ""
    if not short and documents >= FEW_DOCUMENTS:
        return ""
    rests = "the search" if split == "valid" else "the comparison of the final runs"
    return (
        f"the {split} split of domain {domain!r} has {_held(tokens, documents)}{short}: what {rests} sees of it may be chance. "
        f"{_more_of(study, domain, split)}."
    )


def _held(tokens: int, documents: int) -> str:
    return f"{tokens:,} tokens in {documents:,} document{'s' * (documents != 1)}"


def _more_of(study: Study, domain: str, split: str) -> str:
    spec = next(d for d in study.domains if d.name == domain)
    return f"Name more {split} data in its prefixes" if spec.prefixes else "Give it more text, or prepare.split another share"
