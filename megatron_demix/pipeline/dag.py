"""The study as a DAG of stages: data -> train -> merge and evaluate -> search -> blend -> final -> report."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_demix.errors import ConfigError, CorruptInput
from megatron_demix.pipeline import data_stages, final_stages, maturity_stages, search_stages, train_stages
from megatron_demix.pipeline.foundation import Foundation
from megatron_demix.pipeline.huggingface_base import with_base
from megatron_demix.pipeline.inputs import InputDigests
from megatron_demix.pipeline.maturity_stages import Maturity
from megatron_demix.pipeline.stage import Stage, with_needs
from megatron_demix.pipeline.task_inputs import task_inputs
from megatron_demix.study.data import DomainSpec
from megatron_demix.study.study import Study
from megatron_demix.train.megatron_lm.checkout import Checkout


@dataclass(frozen=True)
class Dag(Foundation):
    """Every stage of a study, by role. `all` lists them in an order in which they can run."""

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
        name, _, part = name.partition("@")
        for stage in self.all:
            if stage.name == name and not part:
                return stage
            if stage.name == name and stage.make_part and (numbers := re.fullmatch(r"(\d+)-of-(\d+)", part)):
                return stage.part((int(numbers[1]), int(numbers[2])))
        close = difflib.get_close_matches(name, [s.name for s in self.all], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ConfigError(f"study {self.study.name!r} has no stage {name!r}{hint} `demix plan` lists them.")

    def of_kinds(self, kinds: set[str]) -> list[Stage]:
        """The stages of these kinds and all they need. Raises ConfigError where the study has none."""
        if not (found := [s for s in self.all if s.kind in kinds]):
            raise ConfigError(
                f"study {self.study.name!r} has no stage of kind {', '.join(sorted(kinds))}: its proxies are trained "
                "(search.proxies), so nothing is merged."
            )
        return with_needs(found)


def build_dag(study: Study, study_path: Path, run: Path, *, absent_inputs: bool = False) -> Dag:
    """Wire the stages of `study` together. Reads the inputs once (their digests are part of the keys), runs nothing.

    study_path: relative inputs are resolved from its folder. Raises ConfigError or CorruptInput for inputs that are missing;
    with absent_inputs they may be: all is as it will be but the keys.
    """
    root = study_path.resolve().parent
    study = with_base(study, root, absent_ok=absent_inputs)
    study = study.model_copy(update={"trainer": study.trainer.under(root)})
    if study.trainer.backend == "megatron_lm" and not absent_inputs:
        assert study.trainer.checkout is not None
        Checkout.open(study.trainer.checkout).script(study.trainer.script)
    digests = InputDigests(run / "cache" / "input_digests.json", absent_ok=absent_inputs)
    inputs = {d.name: _inputs(d, root, absent_inputs) for d in study.domains}
    cleaned = data_stages.clean(study, root, run, inputs, digests)
    tokenizer = data_stages.tokenizer(study, root, run, inputs, digests, cleaned)
    data = {d.name: data_stages.domain(study, d, run, inputs[d.name], tokenizer, digests, cleaned) for d in study.domains}
    tasks = task_inputs(study, root, digests)
    base = train_stages.base(study, root, run, tokenizer, data, digests)
    digests.save()
    merged = study.search.proxies == "merged"
    components = {name: train_stages.component(study, name, run, tokenizer, data, base) for name in data} if merged else {}
    foundation = Foundation(study, run, tokenizer, data, base, components, tasks)
    maturity = maturity_stages.maturity(foundation) if merged and study.component.maturity_seeds else None
    rounds = search_stages.rounds(foundation, maturity.scores if maturity else None)
    blends = final_stages.blends(study, run, data, rounds[-1].fit)
    finals = final_stages.finals(study, run, tokenizer, blends, base)
    proxies = final_stages.proxies(study, run, base, components, rounds[-1].fit) if merged else None
    scores = final_stages.scores(foundation, finals, proxies)
    return Dag(
        **vars(foundation), rounds=rounds, blends=blends, finals=finals, proxies=proxies, final_scores=scores, maturity=maturity
    )


def _inputs(domain: DomainSpec, root: Path, absent_ok: bool) -> list[Path]:
    try:
        return data_stages.resolve(domain, root)
    except (ConfigError, CorruptInput):
        if not absent_ok:
            raise
        return []
