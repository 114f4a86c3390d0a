"""The study: one YAML file that describes a whole run. Unknown keys are refused, and the nearest known key is named.

Model, parallelism and optimiser keys carry Megatron's own argument names, so that a study reads like a launch script.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import Field, model_validator

from megatron_demix.mixture import TOLERANCE, Mixture
from megatron_demix.study.data import DomainSpec, PrepareSpec, TokenizerSpec
from megatron_demix.study.launch import LaunchSpec
from megatron_demix.study.merging import MergeSpec
from megatron_demix.study.search import EvaluateSpec, ProxyScore, SearchSpec
from megatron_demix.study.section import MixtureSpec, Name, Section, nearest
from megatron_demix.study.training import (
    OVERRIDES,
    BaseSpec,
    ComponentSpec,
    FinalSpec,
    ModelSpec,
    ParallelSpec,
    Phase,
    PhaseName,
    TrainerSpec,
    TrainSpec,
    check_layout,
)
from megatron_demix.units import format_count


def _by_name(mixed: Any) -> Iterable[tuple[str, dict[str, float]]]:
    return mixed.items() if isinstance(mixed, dict) else ()


class Study(Section):
    name: Name
    seed: int = Field(1234, ge=0, lt=1 << 31)
    tokenizer: TokenizerSpec = TokenizerSpec()
    prepare: PrepareSpec = PrepareSpec()
    domains: list[DomainSpec] = Field(min_length=2)
    model: ModelSpec
    parallel: ParallelSpec = ParallelSpec()
    train: TrainSpec
    trainer: TrainerSpec = TrainerSpec()
    base: BaseSpec
    component: ComponentSpec
    merge: MergeSpec = MergeSpec()
    search: SearchSpec
    evaluate: EvaluateSpec = EvaluateSpec()
    final: FinalSpec
    launch: LaunchSpec = LaunchSpec()

    @property
    def domain_names(self) -> list[str]:
        return [d.name for d in self.domains]

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        names = self.domain_names
        if repeated := {n for n in names if names.count(n) > 1}:
            raise ValueError(f"domains: {sorted(repeated)[0]!r} is named twice")
        if self.prepare.clean and (unknown := self.prepare.clean.unknown_domain(names)):
            place, name = unknown
            raise ValueError(f"prepare.clean.{place}: {name!r} is not one of {', '.join(names)}{nearest(name, names)}")
        losses = names if self.evaluate.losses == "all" else self.evaluate.losses
        tasks = [task.name for task in self.evaluate.tasks]
        if repeated := {n for n in tasks if tasks.count(n) > 1}:
            raise ValueError(f"evaluate.tasks: {sorted(repeated)[0]!r} is named twice")
        if not losses and not tasks:
            raise ValueError("evaluate: neither losses nor tasks are measured; name one")
        scores = [*losses, *(score for task in self.evaluate.tasks for score in task.score_names)]
        longest = self.model.max_position_embeddings or self.train.seq_length
        for task in self.evaluate.tasks:
            if task.max_new_tokens is not None and task.max_new_tokens >= longest:
                raise ValueError(
                    f"evaluate.tasks: max_new_tokens of {task.name!r} is {task.max_new_tokens}, but the model reads {longest} "
                    "tokens with the question"
                )
        merged = [*names, *self._mixed_names()]
        for what, used, allowed in (
            ("evaluate.losses", losses, names),
            ("search.objective", self.search.objective, scores),
            ("tokenizer.domains", self.tokenizer.domains or [], names),
            ("base.mixture", self.base.mixture, names),
            ("component.anchor.mixture", self.component.anchor.mixture, names),
            *((f"component.mixed.{label}", weights, names) for label, weights in _by_name(self.component.mixed)),
            *((f"merge.rules.{n}.weights", rule.weights or {}, merged) for n, rule in enumerate(self.merge.rules or ())),
            *((f"search.groups.{label}", group.domains, names) for label, group in self.search.groups.items()),
            *((f"search.earlier: split of {old}", parts, names) for e in self.search.earlier for old, parts in e.split.items()),
        ):
            for name in () if isinstance(used, str) else used:
                if name not in allowed:
                    raise ValueError(f"{what}: {name!r} is not one of {', '.join(allowed)}{nearest(name, allowed)}")
        for what, spec in (("base.mixture", self.base.mixture), ("component.anchor.mixture", self.component.anchor.mixture)):
            if not isinstance(spec, str):
                Mixture(spec, label=f"study {self.name!r}: {what}")
        if self.trainer.backend == "megatron_lm" and self.seed == 0:
            raise ValueError("seed is 0, and Megatron-LM (trainer.backend) takes seeds of 1 or more")
        if self.tokenizer.type == "bpe" and all(domain.prefixes for domain in self.domains):
            raise ValueError(
                "tokenizer: type 'bpe' is trained on the domains' text, and all of them are tokenized already (prefixes): name "
                "the tokenizer that they were made with"
            )
        self._check_bounds()
        self._check_mixed_components()
        self._check_learning_rates()
        self._check_extrapolation()
        self._check_budgets()
        check_layout(self.model, self.parallel, self.train)
        if (self.model.num_experts or 1) % self.evaluate.expert:
            found = "the model has none" if self.model.num_experts is None else f"found {self.model.num_experts}"
            raise ValueError(
                f"evaluate.expert {self.evaluate.expert} shares experts out, so model.num_experts has to be a multiple of it; "
                f"{found}"
            )
        return self

    def _mixed_names(self) -> list[str]:
        """Components that are trained on mixtures."""
        mixed = self.component.mixed
        return list(mixed if isinstance(mixed, dict) else self.component.mixed_weights(self.domain_names))

    def _check_bounds(self) -> None:
        """Shares that contradict one another whatever the data; what the data allow is known once they are prepared."""
        lows = {d.name: d.min_share for d in self.domains}
        highs = {d.name: d.max_share for d in self.domains}
        group_of: dict[str, str] = {}
        low, high = lows.copy(), highs.copy()
        for label, group in self.search.groups.items():
            for name in group.domains:
                if name in group_of:
                    raise ValueError(f"search.groups: {name!r} is in {group_of[name]!r} and in {label!r}; expected once")
                group_of[name] = label
                del low[name], high[name]
            least, most = (math.fsum(bounds[name] for name in group.domains) for bounds in (lows, highs))
            if least > group.highest + TOLERANCE:
                raise ValueError(
                    f"search.groups.{label}: the min_share of its domains sum to {least:g}, above highest {group.highest:g}"
                )
            if most < group.lowest - TOLERANCE:
                raise ValueError(
                    f"search.groups.{label}: the max_share of its domains sum to {most:g}, below lowest {group.lowest:g}"
                )
            low[f"group {label}"], high[f"group {label}"] = max(least, group.lowest), min(most, group.highest)
        if (least := math.fsum(low.values())) > 1 + TOLERANCE:
            listed = ", ".join(f"{name} {share:g}" for name, share in low.items() if share)
            raise ValueError(f"domains: the least shares (min_share, groups' lowest) sum to {least:g}, above 1: {listed}")
        if (most := math.fsum(high.values())) < 1 - TOLERANCE:
            listed = ", ".join(f"{name} {share:g}" for name, share in high.items())
            raise ValueError(f"domains: the largest shares (max_share, groups' highest) sum to {most:g}, below 1: {listed}")

    def _check_learning_rates(self) -> None:
        phases: tuple[PhaseName, ...] = ("base", "component", "final") if self.base.tokens else ("component", "final")
        for name in phases:
            train = self.phase(name)
            if train.min_lr > train.lr and train.lr_decay_style != "constant":
                raise ValueError(
                    f"{name}: min_lr {train.min_lr:g} is above lr {train.lr:g}; set {name}.min_lr, or train.min_lr"
                )

    def _check_mixed_components(self) -> None:
        if self.component.mixed is None:
            return
        if self.search.proxies == "trained":
            raise ValueError(
                "component.mixed corrects merged proxies; trained ones (search.proxies) need no correction: take it out"
            )
        if self.merge.method != "linear":
            raise ValueError(
                "component.mixed: its corrections are sums, with weights below 0, too, and have no meaning for merge.method "
                f"{self.merge.method}; take method linear, or take component.mixed out"
            )
        if self.search.proxy_score == "ensemble":
            raise ValueError(
                "component.mixed corrects with weights below 0, with which the mean of the components' probabilities is none: "
                "set search.proxy_score to another than ensemble, or take component.mixed out"
            )
        self.component.mixed_weights(self.domain_names)

    def _check_budgets(self) -> None:
        """A run has at least one step, and is not made longer than it was meant to be without a word."""
        batch = self.train.global_batch_size * self.train.seq_length
        budgets: dict[str, float | None] = {
            f"{phase}.tokens": getattr(self, phase).tokens for phase in ("base", "component", "final")
        }
        if self.search.proxies == "trained":
            budgets["search.proxy_tokens"] = self.proxy_tokens
        for what, tokens in budgets.items():
            if tokens is not None and tokens < batch:
                default = " (by default, what the components would cost)" if self.search.proxy_tokens is None else ""
                raise ValueError(
                    f"{what} is {int(tokens):,}{default if 'proxy' in what else ''}, less than one step: "
                    f"train.global_batch_size x train.seq_length is {batch:,} tokens. Give it more, or make the batch smaller"
                )

    @property
    def proxy_score(self) -> ProxyScore:
        """What a proxy's score is. A trained one's is its own, as a merged one's can be."""
        return self.search.proxy_score if self.search.proxies == "merged" else "merged"

    @property
    def goes_through_centroid(self) -> bool:
        """Whether interpolated scores go through the trained centroid's: not where they are continued to a longer run, of which
        only its end has them."""
        return self.proxy_score != "merged" and self.search.extrapolate is None

    @property
    def maturity_seeds(self) -> int:
        """By default one, where it is what makes interpolated scores, and none of the mixed components is one; averaged
        probabilities do without. 0 where there is nothing to compare."""
        if self.search.proxies != "merged":
            return 0
        if (given := self.component.maturity_seeds) is not None:
            return given
        return int(self.goes_through_centroid and self.proxy_score != "ensemble" and self.mixed_centroid is None)

    @property
    def mixed_centroid(self) -> str | None:
        """The mixed component that was trained on all domains in equal parts, if there is one."""
        for name, weights in self.component.mixed_weights(self.domain_names).items():
            if max(abs(weight - 1 / len(weights)) for weight in weights.values()) < TOLERANCE:
                return name
        return None

    @property
    def proxy_tokens(self) -> float:
        """Of one trained proxy. By default all of them together cost what the components would."""
        return self.search.proxy_tokens or self.component.tokens * len(self.domains) / sum(self.search.rounds)

    def _check_extrapolation(self) -> None:
        if self.search.extrapolate is None:
            return
        if self.component.average is not None:
            raise ValueError(
                "search.extrapolate: the components are means of checkpoints (component.average), which have no one length; "
                "take one of both out"
            )
        if (style := self.phase("component").lr_decay_style) != "constant":
            raise ValueError(
                f"search.extrapolate: the components' lr_decay_style is {style}, and what its decay wins is no function of the "
                "tokens; set component.lr_decay_style to constant"
            )
        if self.final.init != "base":
            raise ValueError(
                "search.extrapolate: the line begins at the base, and so has the final run to; set final.init to base"
            )
        if self.final.tokens <= self.component.tokens:
            raise ValueError(
                f"search.extrapolate: final.tokens ({format_count(self.final.tokens)}) is not more than component.tokens "
                f"({format_count(self.component.tokens)}), so there is nothing to extrapolate to; take it out"
            )

    def phase(self, name: PhaseName) -> TrainSpec:
        """`train` with the overrides of one phase applied. Trained proxies are trained as components are."""
        section: Phase = getattr(self, "component" if name == "proxy" else name)
        overrides = {key: value for key in OVERRIDES if (value := getattr(section, key)) is not None}
        return self.train.model_copy(update=overrides)

    def mixture(self, spec: MixtureSpec, natural: Mapping[str, float], label: str) -> Mixture:
        """A MixtureSpec as a Mixture over all domains. natural: training tokens by domain."""
        if spec == "natural":
            return Mixture.proportional({n: natural[n] for n in self.domain_names}, label=label)
        if spec == "uniform":
            return Mixture.uniform(self.domain_names)
        return Mixture(dict(spec), label=label).over(self.domain_names)
