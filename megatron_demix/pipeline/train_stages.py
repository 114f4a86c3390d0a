"""Stages that train: the base, one component per domain, trained proxies, and (see final_stages) the final runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_demix.artifact import hash_file, read_json, write_json
from megatron_demix.checkpoint.layout import iteration_folder
from megatron_demix.data.tokenizer import load_tokenizer
from megatron_demix.errors import ConfigError
from megatron_demix.mixture import Mixture, actual_shares
from megatron_demix.pipeline import data_stages, preflight
from megatron_demix.pipeline.foundation import Ground
from megatron_demix.pipeline.given_checkpoint import check_function, check_precision, look_at
from megatron_demix.pipeline.huggingface_base import imported
from megatron_demix.pipeline.inputs import InputDigests
from megatron_demix.pipeline.stage import POINTER, Load, Stage
from megatron_demix.progress import METRICS
from megatron_demix.search.horizon import Line
from megatron_demix.study.section import MixtureSpec
from megatron_demix.study.study import Study
from megatron_demix.study.training import PhaseName, TrainerSpec, TrainSpec
from megatron_demix.train.job import TrainJob
from megatron_demix.train.megatron_lm.arguments import own_arguments
from megatron_demix.train.megatron_lm.command import FROM_DATA, prepare, shown_command
from megatron_demix.train.megatron_lm.work import check_finished, settle

AVERAGE = "average"
MIXTURES = "mixtures.json"
"""A round's mixtures, in the artifact that proposed them."""
_TOKENS = {"base": "base.tokens", "component": "component.tokens", "proxy": "search.proxy_tokens", "final": "final.tokens"}
# How a run is spread over ranks, and how often it saves and speaks, does not decide what it learns.
_NOT_IN_KEY = {
    *("micro_batch_size", "use_distributed_optimizer", "recompute_granularity", "timeout"),
    *("save_interval", "keep_checkpoints", "log_interval"),
    *("loss_spike_factor", "loss_spike_window", "loss_spike_patience"),
}


def num_iterations(study: Study, phase: PhaseName) -> int:
    """Optimiser steps that a phase really runs for."""
    return kept_iterations(study)[-1] if phase == "component" else schedule_iterations(study, phase)


def kept_iterations(study: Study) -> list[int]:
    """Of a component, ascending: the iterations whose checkpoints are used. It ends with the last one, whatever its schedule.

    Raises ConfigError where two of them would be one.
    """
    total, setting, fractions = schedule_iterations(study, "component"), "component.average", study.component.average
    if fractions is None:
        setting, fractions = "search.extrapolate", [*(study.search.extrapolate or ()), 1.0]
    kept = [max(1, round(fraction * total)) for fraction in fractions]
    if len(set(kept)) < len(kept):
        raise ConfigError(
            f"{setting}: {fractions} of {total} iterations are {kept}, which repeats one. Take numbers farther apart, or "
            "train components for longer."
        )
    return kept


def horizon_line(study: Study) -> Line | None:
    """Through scores after the kept iterations, to the final run's length; None where scores are those at the end."""
    return Line(kept_iterations(study), schedule_iterations(study, "final")) if study.search.extrapolate else None


def _kept_before_the_last(study: Study, phase: PhaseName) -> list[int]:
    return kept_iterations(study)[:-1] if phase == "component" else []


def schedule_iterations(study: Study, phase: PhaseName) -> int:
    """Optimiser steps that a phase's tokens are, to the nearest whole step: its learning rate's schedule."""
    tokens = study.proxy_tokens if phase == "proxy" else getattr(study, phase).tokens
    return round(tokens / (study.train.global_batch_size * study.train.seq_length))


def num_tokens(study: Study, phase: PhaseName) -> int:
    """Tokens a phase really trains on."""
    return num_iterations(study, phase) * study.train.global_batch_size * study.train.seq_length


def blend_tokens(study: Study) -> int:
    """Tokens of the final run's data: one more than its samples hold, since a sample's last target is the token after it."""
    return num_tokens(study, "final") + 1


def training_settings(study: Study, phase: PhaseName, seed: int) -> dict[str, Any]:
    """What decides the result of a training run, apart from its data and its start."""
    settings: dict[str, Any] = {
        "model": study.model.model_dump(exclude={"transformer_impl"}),
        "train": study.phase(phase).model_dump(exclude=_NOT_IN_KEY),
        "train_iters": schedule_iterations(study, phase),
        "seed": seed,
    }
    if keep := _kept_before_the_last(study, phase):
        settings["kept"] = [*keep, num_iterations(study, phase)]
    if stock := _stock(study):
        own = stock.script.is_absolute() and stock.script.is_file()  # not one of the checkout
        script = hash_file(stock.script) if own else stock.script.name
        settings["trainer"] = {"backend": stock.backend, "script": script, "args": own_arguments(stock.args)}
    return settings


def _stock(study: Study) -> TrainerSpec | None:
    return study.trainer if study.trainer.backend == "megatron_lm" else None


@dataclass(frozen=True)
class Filling:
    """What a run is trained on. All of it is asked for when the data it needs is there.

    sources: Megatron's blend, train prefixes and weights. check: raises where the data cannot fill the run. wanted: whether
    there is anything to train; what is not wanted is an empty artifact. known: whether it and check can be asked as soon as
    the data is there.
    """

    sources: Callable[[], list[tuple[Path, float]]]
    check: Callable[[], object] = lambda: None
    wanted: Callable[[], bool] = lambda: True
    known: Callable[[], bool] = lambda: True


def training(
    study: Study,
    run: Path,
    name: str,
    phase: PhaseName,
    filling: Filling,
    *,
    needs: Sequence[Stage],
    tokenizer: Stage,
    settings: Mapping[str, Any],
    seed: int,
    start: Stage | None,
) -> Stage:
    """A training stage. start: whose checkpoint it begins with; None: with random weights."""
    train: TrainSpec = study.phase(phase)
    iterations, schedule, keep = (
        num_iterations(study, phase),
        schedule_iterations(study, phase),
        _kept_before_the_last(study, phase),
    )
    everything = {**training_settings(study, phase, seed), **settings}
    stock = _stock(study)

    def job(work: Path, vocab_size: int, eod_id: int, sources: list[tuple[Path, float]]) -> TrainJob:
        return TrainJob(
            name=name,
            seed=seed,
            model=study.model,
            parallel=study.parallel,
            train=train,
            train_iters=iterations,
            schedule_iters=schedule,
            keep=keep,
            vocab_size=vocab_size,
            eod_id=eod_id,
            blend=sources,
            init_checkpoint=checkpoint_of(start) if start else None,
            work=work,
            index_cache=run / "cache" / "index" / stage.key,
            tensorboard=run / "tensorboard" / f"{name.replace('/', '.')}-{stage.key}",
            heartbeat=stage.heartbeat,
            threads_per_rank=study.launch.threads_per_rank,
        )

    def make(work: Path) -> None:
        if not filling.wanted():
            return
        vocabulary = load_tokenizer(tokenizer.folder)
        described = job(work, vocabulary.vocab_size, vocabulary.eod_id, filling.sources())
        if not stock:
            write_json(stage.job, described.model_dump(mode="json"))
        elif settle(work, name) < iterations:
            metrics = run / METRICS
            write_json(stage.job, prepare(described, stock, stage.job, metrics).model_dump(mode="json"))

    def script() -> str:
        """With what is not known before the data is there shown as dots."""
        assert stock
        if all(need.done() for need in needs) and filling.wanted():
            vocabulary = load_tokenizer(tokenizer.folder)
            described = job(stage.work, vocabulary.vocab_size, vocabulary.eod_id, filling.sources())
            return shown_command(described, stock, stage.job)
        unknown = [*FROM_DATA, *([] if study.base.tokens else ["pretrained-checkpoint"])]
        return shown_command(job(stage.work, 2, 0, [(run, 1.0)]), stock, stage.job, unknown=unknown)

    def check_if_wanted() -> None:
        if filling.known() and filling.wanted():
            data_stages.check_rows(study, tokenizer)
            filling.check()

    def load() -> Load | None:
        if filling.known() and not filling.wanted():
            return None
        return Load("trains", 1, num_tokens(study, phase), 1 + len(keep))

    def judge(folder: Path) -> None:
        if filling.wanted():
            check_finished(folder, name, iterations, keep)

    ranks = study.parallel.world_size
    stage = Stage(
        name,
        run,
        everything,
        tuple(needs),
        make,
        ranks=ranks,
        check=check_if_wanted,
        judge=judge,
        script=script if stock else None,
        load=load,
    )
    return stage


def base(study: Study, root: Path, run: Path, tokenizer: Stage, data: Mapping[str, Stage], digests: InputDigests) -> Stage:
    """A given checkpoint may be missing where the digests say so, as long as nothing is to be run."""
    spec = study.base
    if spec.huggingface is not None:
        return imported(study, root, run, digests)
    if spec.checkpoint is not None:
        dtype = look_at(root / spec.checkpoint, digests).dtype
        checkpoint = given(study, "base/base", root / spec.checkpoint, run, digests)
        return replace(checkpoint, check=lambda: check_precision(study, str(spec.checkpoint), dtype))

    used = _domains_of(spec.mixture, data)

    def shares() -> tuple[str, Mixture]:
        return "stage base/base", _mixture(study, spec.mixture, data, "base.mixture")

    return training(
        study,
        run,
        "base/base",
        "base",
        _filled(study, "base", data, shares),
        needs=(tokenizer, *(data[n] for n in used)),
        tokenizer=tokenizer,
        settings={"mixture": spec.mixture},
        seed=study.seed,
        start=None,
    )


def _domains_of(spec: MixtureSpec, data: Mapping[str, Stage]) -> list[str]:
    """The domains a mixture depends on. One that names its domains stays as it is when others are added, dropped or split."""
    return list(data) if isinstance(spec, str) else [name for name in data if spec.get(name)]


def _mixture(study: Study, spec: MixtureSpec, data: Mapping[str, Stage], label: str) -> Mixture:
    """A MixtureSpec over all domains; only the natural one asks for the data of all of them."""
    return study.mixture(spec, data_stages.tokens(data, "train") if spec == "natural" else {}, label)


def given(study: Study, name: str, checkpoint: Path, run: Path, digests: InputDigests) -> Stage:
    """A stage that only points at the user's checkpoint; nothing of it is copied. Raises IncompatibleInputs where that is
    another model than the study's."""
    found = look_at(checkpoint, digests)
    check_function(study, checkpoint, found)

    def make(folder: Path) -> None:
        write_json(folder / POINTER, {"checkpoint": found.path})

    settings = {"checkpoint": found.digest, "model": study.model.model_dump(exclude={"transformer_impl"})}
    return Stage(name, run, settings, (), make, stands_for=Path(found.path))


def checkpoint_of(stage: Stage, iteration: int | None = None) -> Path:
    """The checkpoint a finished stage stands for: one that trains, averages, or was given. iteration: a kept one before it."""
    if iteration is not None:
        return stage.folder / iteration_folder(iteration)
    if isinstance(stage.stands_for, Path):
        return stage.stands_for
    pointer = stage.folder / POINTER
    return stage.folder / read_json(pointer)["checkpoint"] if pointer.is_file() else stage.folder


def component(ground: Ground, name: str) -> Stage:
    return on_merge_weights(ground, f"components/{name}", Mixture.one_hot(ground.data, name), seed=ground.study.seed)


def mixed(ground: Ground, name: str, weights: Mixture) -> Stage:
    """A component that is trained on these merge weights, to correct the merges of the others (component.mixed)."""
    settings = {"weights": {n: w for n, w in weights.items() if w}}
    return on_merge_weights(ground, f"components/mixed/{name}", weights, seed=ground.study.seed, settings=settings)


def averaged(study: Study, run: Path, trained: Stage) -> Stage:
    """The stage that stands for a model trained as components are: itself, or the mean of the checkpoints it has kept."""
    if study.component.average is None:
        return trained

    def make(folder: Path) -> None:
        from megatron_demix.merge.engine import merge_checkpoints

        kept = kept_iterations(study)
        checkpoints = {iteration_folder(i): trained.folder / iteration_folder(i) for i in kept}
        merge_checkpoints(
            checkpoints,
            {AVERAGE: dict.fromkeys(checkpoints, 1 / len(checkpoints))},
            folder,
            threads=study.merge.threads,
            progress=False,
        )
        write_json(folder / POINTER, {"checkpoint": AVERAGE})

    return Stage(f"averages/{trained.name}", run, {}, (trained,), make)


def on_merge_weights(
    ground: Ground, name: str, weights: Mixture, *, seed: int, settings: Mapping[str, Any] | None = None
) -> Stage:
    """A model trained as components are, on the data that a merge of these weights stands for: a component, where one is 1.

    settings: what else is part of its key, where its name does not say the weights.
    """
    study, data, anchor = ground.study, ground.data, ground.study.component.anchor
    anchored = _domains_of(anchor.mixture, data) if anchor.share else []
    used = [n for n in data if weights[n] or n in anchored]

    def shares() -> tuple[str, Mixture]:
        mixture = _mixture(study, anchor.mixture, data, "component.anchor.mixture")
        return f"stage {name}", actual_shares(weights, mixture, anchor.share)

    return training(
        study,
        ground.run,
        name,
        "component",
        _filled(study, "component", data, shares),
        needs=(ground.tokenizer, *(data[n] for n in used), ground.base),
        tokenizer=ground.tokenizer,
        settings={"anchor": anchor.model_dump(), **(settings or {})},
        seed=seed,
        start=ground.base,
    )


def proxy(ground: Ground, name: str, proposal: Stage, entry: int) -> Stage:
    """Proxy number `entry` of the mixtures that `proposal` holds, trained on its shares from the base. Nothing is trained where
    the proposal, in a round that turned out unnecessary, holds no such mixture."""

    def mixtures() -> list[dict[str, Any]]:
        return read_json(proposal.folder / MIXTURES)

    def shares() -> tuple[str, Mixture]:
        chosen = mixtures()[entry]
        return f"stage {name}, mixture {chosen['name']}", Mixture(chosen["shares"], label=chosen["name"])

    filling = _filled(ground.study, "proxy", ground.data, shares)
    return training(
        ground.study,
        ground.run,
        name,
        "proxy",
        replace(filling, wanted=lambda: entry < len(mixtures()), known=proposal.is_intact),
        needs=(ground.tokenizer, *ground.data.values(), ground.base, proposal),
        tokenizer=ground.tokenizer,
        settings={"entry": entry},
        seed=ground.study.seed,
        start=ground.base,
    )


def _filled(study: Study, phase: PhaseName, data: Mapping[str, Stage], mixture: Callable[[], tuple[str, Mixture]]) -> Filling:
    """From the domains' training data. mixture: the run in words, and the shares of its data."""

    def check() -> Mixture:
        # Megatron would repeat a small domain without a word.
        run, shares = mixture()
        preflight.check_filled(study, run, shares, num_tokens(study, phase), data, _TOKENS[phase])
        return shares

    def sources() -> list[tuple[Path, float]]:
        """Zero weights left out. A domain of several prefixes spreads its weight over them in proportion to their tokens."""
        from megatron_demix.indexed.reader import read_index

        shares, result = check(), []
        for domain in study.domains:
            if share := shares[domain.name]:
                own = data_stages.prefixes(data[domain.name], "train")
                sizes = [read_index(p).num_tokens for p in own]
                result += [(p, share * size / sum(sizes)) for p, size in zip(own, sizes, strict=True)]
        return result

    return Filling(sources, check)
