"""What the report is made from: plain data, filled by the pipeline from artifacts. Whatever is absent is left out of the page.

Scores are in bits per byte, the lower the better, unless ReportData.higher_is_better names them. Shares and weights are
dictionaries by domain name that sum to 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_demix.errors import ConfigError
from megatron_demix.study.search import ProxyScore

FOUND = "found"
"""The name of the searched mixture among the final runs; every other name is a baseline."""


@dataclass(frozen=True)
class Domain:
    """One corpus, as prepared. tokens: those of the train split."""

    name: str
    documents: int
    tokens: int
    bytes: int | None
    """Of text. None where it came tokenized."""
    natural_share: float
    epochs: float | None = None
    """How often the final run repeats it at the found mixture."""
    held_out: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """By split that scores: its tokens and documents."""


@dataclass(frozen=True)
class Proxy:
    """A merged model, or one trained on its shares. weights: of the components in the merge. shares: the data it stands for."""

    name: str
    weights: Mapping[str, float]
    shares: Mapping[str, float]


@dataclass(frozen=True)
class Fit:
    """A surrogate of one score, cross-validated: `predicted` never saw the proxy it predicts (out of fold)."""

    kind: str
    spearman: float
    rmse: float
    measured: Sequence[float]
    predicted: Sequence[float]
    half_intervals: Sequence[float] = ()
    """Half the width of each prediction's 90 % interval, calibrated out of fold; none if empty."""
    little_skill: bool = False
    """It is hardly better than the mean at what it has not seen."""

    @property
    def correlation(self) -> str:
        """The rank correlation as shown; constant predictions or scores have none."""
        return f"{self.spearman:.3f}" if math.isfinite(self.spearman) else "undefined"


@dataclass(frozen=True)
class Cost:
    """Of the stages of one kind that train, or score. models: how many, in words. flop: multiplications and additions."""

    kind: str
    models: str
    tokens: int
    flop: float


@dataclass(frozen=True)
class Round:
    """One sample-merge-evaluate-fit iteration. scores: what counted, by proxy name, then score. fit: by score, on all rounds so
    far.

    objective: what the search made of the scores, by proxy, of all rounds so far. constant: scores that are the same for all of
    these, which the search could not use. No mixtures: an earlier round was enough.
    """

    mixtures: Sequence[Proxy]
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    fit: Mapping[str, Fit] = field(default_factory=dict)
    objective: Mapping[str, float] = field(default_factory=dict)
    constant: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Optimum:
    """The optima of searches on resampled proxies: shares by domain, one value a search.

    expected_regret: what a perfect further search could still win, in the objective's unit, on average. gain: (mean, standard
    deviation) of what mixtures chosen by half of the proxies win over the natural one, as the other half predicts;
    probability: the part of these that win at all.
    """

    samples: Mapping[str, Sequence[float]]
    expected_regret: float
    gain: tuple[float, float]
    probability: float


@dataclass(frozen=True)
class FrontPoint:
    """A mixture on the Pareto front of the objective's scores."""

    shares: Mapping[str, float]
    predicted: Mapping[str, float]


@dataclass(frozen=True)
class Choice:
    """The found mixture. predicted: (mean, standard deviation) by score; objective: the same of what the search minimised.

    natural: predicted at the feasible mixture closest to the natural one; compared: that one in words; expected_gain: (mean,
    standard deviation) of how much worse the objective is there, as the proxies predict that the choice was made by.
    binding: the bounds the mixture lies at, each as one sentence. distance: in total variation, to the nearest proxy's mixture;
    and the one within which 9 in 10 proxies have another.
    """

    shares: Mapping[str, float]
    weights: Mapping[str, float]
    predicted: Mapping[str, tuple[float, float]]
    objective: tuple[float, float]
    natural: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    expected_gain: tuple[float, float] | None = None
    compared: str = "natural"
    optimum: Optimum | None = None
    pareto: Sequence[FrontPoint] = ()
    binding: Sequence[str] = ()
    distance: tuple[float, float] | None = None


@dataclass(frozen=True)
class Maturity:
    """Scores on the validation split of the merged centroid, of models trained on its mixture (one a seed), and of the base."""

    merged: Mapping[str, float]
    trained: Sequence[Mapping[str, float]]
    base: Mapping[str, float]
    is_mixed: bool = False
    """Whether the first of the trained ones is a mixed component: proxies are that model there, and `merged` leaves it out."""


@dataclass(frozen=True)
class FinalRun:
    """One final run, scored on the test split. mixture: FOUND, "uniform" or "natural"."""

    mixture: str
    seed: int
    scores: Mapping[str, float]


@dataclass(frozen=True)
class BlendRow:
    """Tokens of one domain in the final data of one mixture."""

    requested_tokens: int
    planned_tokens: int
    realised_tokens: int
    epochs: float
    documents: int


@dataclass(frozen=True)
class Task:
    """unseen: final runs are compared on items that the search never saw. Of all proxies together: answers that were generated,
    that did not end by themselves, and that had to be stopped when they were run or compared. cut: of the texts that each model
    reads, those that are too long for it."""

    unseen: bool
    answers: int = 0
    endless: int = 0
    stopped: int = 0
    cut: int = 0


@dataclass(frozen=True)
class ReportData:
    """A whole study, or as much of it as is done."""

    study: str
    settings: Mapping[str, Any]
    """The study file as data, shown as it is."""
    objective: Mapping[str, float]
    """Relative weight of each score."""
    aim: str = "mean"
    """What the search made of the scores: mean, worst or percentile_rank."""
    higher_is_better: frozenset[str] = frozenset()
    tasks: Mapping[str, Task] = field(default_factory=dict)
    """By name."""
    domains: Sequence[Domain] = ()
    few: Sequence[str] = ()
    """What is to be said against scores on little held-out data."""
    losses: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    """Loss curves by stage name ("components/code"): {"iteration": [...], "lm loss": [...]}, in nats per token. Runs whose
    names share the part before the last slash are drawn together."""
    proxies: Literal["merged", "trained"] = "merged"
    proxy_score: ProxyScore = "merged"
    """What counted as a proxy's score."""
    merged_parts: Mapping[str, float] = field(default_factory=dict)
    """Of each score that goes through a trained centroid's, how far that lies from the averaged to the merged one."""
    extrapolated: str = ""
    """In words, how scores were continued to the final run's length; and what is to be said against that."""
    extrapolation_warning: str | None = None
    rounds: Sequence[Round] = ()
    mixed: Sequence[str] = ()
    """Components trained on mixtures, which correct the merges to second order."""
    earlier: Sequence[str] = ()
    """What was used of each earlier study, in words."""
    maturity: Maturity | None = None
    choice: Choice | None = None
    final: Sequence[FinalRun] = ()
    untrained: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Scores on the same split of models that had no final run: the base, the found mixture's proxy."""
    blends: Mapping[str, Mapping[str, BlendRow]] = field(default_factory=dict)
    """By final mixture, then domain."""
    costs: Sequence[Cost] = ()
    timings_s: Mapping[str, float] = field(default_factory=dict)
    """Wall-clock seconds by stage."""

    def __post_init__(self) -> None:
        if not self.objective or sum(self.objective.values()) <= 0:
            raise ConfigError(f"report of {self.study!r}: objective is {dict(self.objective)}, expected a positive weight.")
        for run in self.final:
            missing = [name for name, weight in self.objective.items() if weight and name not in run.scores]
            if missing:
                raise ConfigError(
                    f"report of {self.study!r}: final run {run.mixture!r}, seed {run.seed}, has no score {missing[0]!r}, "
                    f"which the objective needs; it has {', '.join(run.scores) or 'none'}. Score it again."
                )

    @property
    def blend(self) -> Mapping[str, BlendRow]:
        """Of the found mixture."""
        return self.blends.get(FOUND, {})

    @property
    def kind_of_proxies(self) -> str:
        """In one word: what they are, or what stands for them."""
        return self.proxy_score if self.proxy_score in ("interpolated", "ensemble") else self.proxies

    @property
    def score_names(self) -> list[str]:
        """Every score there is, in the order of first appearance."""
        tables = [row for r in self.rounds for row in r.scores.values()] + [run.scores for run in self.final]
        return list(dict.fromkeys(name for table in tables for name in table))

    @property
    def domain_names(self) -> list[str]:
        """Names of the domains, from whichever part of the data has them."""
        if self.domains:
            return [d.name for d in self.domains]
        mixtures = [self.choice.shares] if self.choice else [p.shares for r in self.rounds for p in r.mixtures]
        return list(dict.fromkeys(name for mixture in mixtures for name in mixture))

    def measured(self, number: int) -> list[tuple[Proxy, float]]:
        """The proxies of a round (counted from 0) that have a finite objective, with it."""
        r = self.rounds[number]
        values = ((proxy, self.objective_of_proxy(proxy.name, r.scores.get(proxy.name, {}))) for proxy in r.mixtures)
        return [(proxy, value) for proxy, value in values if math.isfinite(value)]

    def objective_of_proxy(self, name: str, scores: Mapping[str, float]) -> float:
        """What the search minimised, as its newest fit has it; before the first fit, the weighted mean if that is the aim."""
        fitted = next((r.objective for r in reversed(self.rounds) if r.objective), {})
        return fitted.get(name, self.objective_of(scores) if self.aim == "mean" else math.nan)

    def objective_of(self, scores: Mapping[str, float]) -> float:
        """The weighted mean of `scores`, the lower the better; NaN where one is missing. Final runs are compared by it."""
        total = math.fsum(self.objective.values())
        signed = {name: -value if name in self.higher_is_better else value for name, value in scores.items()}
        return math.fsum(w * signed.get(name, math.nan) for name, w in self.objective.items() if w) / total

    @property
    def final_unit(self) -> str:
        """Of the weighted mean that final runs are compared by."""
        return "weighted mean" if self.higher_is_better & {s for s, w in self.objective.items() if w} else "bits per byte"

    @property
    def mixes_units(self) -> bool:
        """Whether the weighted mean adds scores of which more is better to losses: a part of such a sum means nothing."""
        return len({name in self.higher_is_better for name, weight in self.objective.items() if weight}) > 1

    @property
    def seen_tasks(self) -> list[str]:
        """Tasks whose final scores are on items that the search saw, too."""
        return [name for name, task in self.tasks.items() if not task.unseen]

    def direction(self, score: str) -> str:
        """An arrow to where it is better."""
        return "↑" if score in self.higher_is_better else "↓"

    def unit_of(self, score: str) -> str:
        return "higher is better" if score in self.higher_is_better else "bits per byte"

    @property
    def unit(self) -> str:
        """Of the search's objective."""
        if self.aim == "mean":
            return self.final_unit
        return "standard deviations" if self.aim == "worst" else "mean rank, 0 to 1"
