"""The study as a DAG of stages: data -> train -> merge and evaluate -> search -> blend -> final -> report."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_demix.errors import ConfigError, DemixError
from megatron_demix.pipeline import data_stages, earlier_stages, final_stages, maturity_stages, search_stages, train_stages
from megatron_demix.pipeline.earlier_stages import Earlier
from megatron_demix.pipeline.foundation import Foundation, Ground
from megatron_demix.pipeline.given_checkpoint import with_sizes_of_base
from megatron_demix.pipeline.huggingface_base import with_base
from megatron_demix.pipeline.inputs import Absent, InputDigests, check_apart
from megatron_demix.pipeline.maturity_stages import Maturity
from megatron_demix.pipeline.merging import rules_of, second_order
from megatron_demix.pipeline.stage import Stage, with_needs
from megatron_demix.pipeline.task_inputs import task_inputs
from megatron_demix.study.data import DomainSpec
from megatron_demix.study.load import load_study
from megatron_demix.study.study import Study
from megatron_demix.study.unused import without_unused
from megatron_demix.train.megatron_lm.checkout import Checkout

MILESTONES = {
    "prepare": {"tokenizer", "data"},
    "train": {"base", "components", "averages"},
    "evaluate": {"maturity", "rounds"},
    "search": {"maturity", "rounds"},
    "merge": {"merge"},
    "blend": {"blend"},
    "final": {"final"},
}
"""The commands that make a study up to somewhere, in its order, and the kinds of stages that each asks for, with all needs."""


@dataclass(frozen=True)
class Dag(Foundation):
    """Every stage of a study, by role. `all` lists them in an order in which they can run."""

    earlier: list[Earlier]
    rounds: list[search_stages.Round]
    blends: dict[str, Stage]
    finals: dict[str, Stage]
    proxies: Stage | None
    """The found mixture's merged proxy; none where the study trains its proxies."""
    final_scores: Stage
    maturity: Maturity | None
    """The check that the base branched late enough, where the study asks for it and merges."""

    @property
    def choice(self) -> Stage:
        """The stage whose artifact holds mixture.json."""
        return self.rounds[-1].fit

    @property
    def all(self) -> list[Stage]:
        return with_needs([*([self.maturity.scores] if self.maturity else []), self.final_scores])

    def stage(self, name: str) -> Stage:
        """Also a part, by its own name. Raises ConfigError naming the nearest stage there is."""
        whole, _, part = name.partition("@")
        for stage in self.all:
            if stage.name == name:
                return stage
            if stage.name == whole and stage.make_part and (numbers := re.fullmatch(r"(\d+)-of-(\d+)", part)):
                return stage.part((int(numbers[1]), int(numbers[2])))
        close = difflib.get_close_matches(whole, [s.name for s in self.all], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ConfigError(f"study {self.study.name!r} has no stage {name!r}{hint} `demix plan` lists them.")

    def until(self, milestone: str | None) -> list[Stage]:
        """What a study has up to one of MILESTONES, that included; None: all of it."""
        return self.of_kinds(MILESTONES[milestone]) if milestone else self.all

    def foreseen(self, milestone: str | None) -> list[Stage]:
        """What has to be possible before anything up to there is made: that, and of components the search they are for."""
        return [*self.until(milestone), *([self.rounds[0].proposal] if milestone == "train" else [])]

    def of_kinds(self, kinds: set[str]) -> list[Stage]:
        """The stages of these kinds and all they need. Raises ConfigError where the study has none."""
        if not (found := [s for s in self.all if s.kind in kinds]):
            raise ConfigError(
                f"study {self.study.name!r} has no stage of kind {', '.join(sorted(kinds))}: its proxies are trained "
                "(search.proxies), so nothing is merged."
            )
        return with_needs(found)


def build_dag(study: Study, place: Path, run: Path, *, absent_inputs: Absent = "refused") -> Dag:
    """Wire the stages of `study` together. Reads the inputs once (their digests are in the keys), runs nothing.

    place: the study's file, from whose folder relative inputs are resolved; or that folder, where the file is not known. Raises
    ConfigError or CorruptInput for inputs that are missing, as far as absent_inputs says that this is one.
    """
    digests = InputDigests(run / "cache" / "input_digests.json", absent=absent_inputs)
    try:
        dag = _wired(study, place.resolve(), run, digests, ())
    except BaseException:  # Ctrl-C, too: reading a large corpus takes hours
        digests.keep()
        raise
    if dag.study.trainer.backend == "megatron_lm" and absent_inputs == "refused":
        assert dag.study.trainer.checkout is not None
        Checkout.open(dag.study.trainer.checkout).script(dag.study.trainer.script)
    digests.save()
    return dag


def _wired(study: Study, place: Path, run: Path, digests: InputDigests, naming: tuple[Path, ...]) -> Dag:
    """naming: the studies that name this one as an earlier one, directly or through others."""
    root = place if place.is_dir() else place.parent
    study = with_sizes_of_base(with_base(study, root, digests), root, digests)
    placed = {"trainer": study.trainer.under(root), "tokenizer": study.tokenizer.under(root)}
    study = without_unused(study.model_copy(update=placed))
    before = _earlier_dags(study, root, run, digests, (*naming, place))
    elsewhere = list(dict.fromkeys(there.run for there in before if there.run != run))
    data_stages.check_prefixes(study, root)
    inputs = {d.name: _inputs(d, root, digests) for d in study.domains}
    check_apart(study, inputs, digests.look)
    if cleaned := data_stages.clean(study, root, run, inputs, digests):
        cleaned = _where_done(cleaned, elsewhere)
    tokenizer = _where_done(data_stages.tokenizer(study, root, run, inputs, digests, cleaned), elsewhere)
    digests.read(file for files in inputs.values() for file in files)
    data = {
        d.name: _where_done(data_stages.domain(study, d, run, inputs[d.name], tokenizer, digests, cleaned), elsewhere)
        for d in study.domains
    }
    tasks = task_inputs(study, root, digests)
    base = _where_done(train_stages.base(study, root, run, tokenizer, data, digests), elsewhere)
    ground = Ground(study, run, tokenizer, data, base)
    merged = study.search.proxies == "merged"

    def as_merged(trained: Stage) -> Stage:
        return _where_done(train_stages.averaged(study, run, _where_done(trained, elsewhere)), elsewhere)

    names = list(data) if merged else []
    components = {n: as_merged(train_stages.component(ground, n)) for n in names}
    mixtures = study.component.mixed_weights(study.domain_names)
    mixed = {n: as_merged(train_stages.mixed(ground, n, w)) for n, w in mixtures.items()}
    rules_of(study.merge)  # raises where they are none
    search_stages.check_bounds(study)
    second_order(study)  # raises where a mixed component corrects nothing
    foundation = Foundation(**vars(ground), components=components, mixed=mixed, tasks=tasks)
    earlier = [
        earlier_stages.earlier(spec, foundation, there, absent_ok=digests.absent_ok)
        for spec, there in zip(study.search.earlier, before, strict=True)
    ]
    maturity = maturity_stages.maturity(foundation, as_merged) if study.maturity_seeds else None
    rounds = search_stages.rounds(foundation, maturity.scores if maturity else None, earlier)
    blends = final_stages.blends(ground, rounds[-1].fit)
    finals = final_stages.finals(ground, blends)
    proxies = final_stages.proxies(foundation, rounds[-1].fit) if merged else None
    scores = final_stages.scores(foundation, finals, proxies)
    return Dag(
        **vars(foundation),
        earlier=earlier,
        rounds=rounds,
        blends=blends,
        finals=finals,
        proxies=proxies,
        final_scores=scores,
        maturity=maturity,
    )


def _earlier_dags(study: Study, root: Path, run: Path, digests: InputDigests, naming: tuple[Path, ...]) -> list[Dag]:
    """All stages of each study of search.earlier. Its run lies beside `run`, or is `run` where the studies have one name.
    naming: this study, and those that name it."""
    found: dict[str, Dag] = {}
    for spec in study.search.earlier:
        place, label = (root / spec.study).resolve(), earlier_stages.label_of(spec)
        if place in naming:
            raise ConfigError(f"search.earlier: {place} is this study, or names it as an earlier one.")
        if label in found:
            raise ConfigError(f"search.earlier: two studies have the file name {label!r}, by which they are told apart.")
        try:
            there = load_study(place)
            there_run = run if there.name == study.name else run.parent / there.name
            found[label] = _wired(there, place, there_run, digests, naming)
        except DemixError as e:
            raise type(e)(f"search.earlier, {spec.study}: {e}") from e
    return list(found.values())


def _where_done(stage: Stage, runs: Sequence[Path]) -> Stage:
    """The stage in the first of these other runs in which it is done, if it is not done in its own."""
    if runs and not stage.is_intact():
        return next((there for run in runs if (there := replace(stage, run=run)).is_intact()), stage)
    return stage


def _inputs(domain: DomainSpec, root: Path, digests: InputDigests) -> list[Path]:
    def ask() -> list[str]:
        return [str(path) for path in data_stages.resolve(domain, root, digests.look)]

    question = f"{root} {domain.model_dump_json(include={'inputs', 'prefixes'})}"
    files = digests.answer(question, ask, kind="domain files", absent=[])
    return [Path(p) for p in files]
