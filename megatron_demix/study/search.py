"""The sections about the search: rounds and objective, and what is scored."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_demix.study.choices import MIN_PROXIES, Aim, Design, SurrogateKind
from megatron_demix.study.section import ExpandedPath, Name, Seconds, Section, Tokens, nearest

ProxyScore = Literal["merged", "interpolated", "stack", "ensemble"]

MIN_BOOTSTRAPS = 10
MAX_PROXIES, MAX_TRAINED_PROXIES = 10_000, 4096
"""Of a search. A Gaussian process holds the square of their number; and each trained proxy is a stage of its own, of which a
plan and a folder hold some thousands."""


class GroupSpec(Section):
    """Bounds on the summed actual shares of some domains. A domain belongs to one group at most."""

    domains: list[str] = Field(min_length=1)
    lowest: float = Field(0.0, ge=0, le=1)
    highest: float = Field(1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> GroupSpec:
        if self.lowest > self.highest:
            raise ValueError(f"lowest {self.lowest:g} is above highest {self.highest:g}")
        return self


class EarlierSpec(Section):
    """A study of other domains whose proxies count in this one, wherever a score of theirs is still what it would be here."""

    study: ExpandedPath
    """Its file as it was run, relative to this one. Its run lies beside this study's, and is not added to."""
    rounds: int | None = Field(None, ge=1)
    """How many of its rounds count. Default: all; they have to be done."""
    split: dict[str, Annotated[list[str], Field(min_length=1)]] = {}
    """Domains of it that are others now: {math: [math_a, math_b]}. A share of math was one of both, by their tokens."""


class SearchSpec(Section):
    rounds: list[Annotated[int, Field(ge=1)]] = Field([64, 32, 16], min_length=1, max_length=100)
    """Proxies evaluated in each round."""
    earlier: list[EarlierSpec] = []
    """Studies of other domains whose proxies are used, too."""
    proxies: Literal["merged", "trained"] = "merged"
    """merged from the components (DeMix); or each trained on its mixture: RegMix with one round, CLIMB with several."""
    proxy_score: ProxyScore = "stack"
    """What a merged proxy's score is: the merged model's, the components' own averaged with its weights, a stack of both, or
    that of the components' probabilities, averaged for every token. Only merged and stack score the proxies themselves."""
    extrapolate: list[Annotated[float, Field(gt=0, lt=1)]] | None = Field(None, min_length=1)
    """Parts of the components' run, ascending: scores of proxies of their checkpoints there and at the end lie on a line in the
    logarithm of the tokens, which is continued to final.tokens. Null: the scores at the end."""
    proxy_tokens: Tokens | None = None
    """Of each trained proxy. Default: all together cost what the components would."""
    stop: float | None = Field(None, gt=0, lt=1)
    """Later rounds are left empty once a perfect further search could win less than this part of what was won over natural."""
    design: Design = "dirichlet"
    """How the first round is sampled."""
    objective: dict[str, float] = Field(min_length=1)
    """Weight of each score. A domain's name means its validation loss in bits per byte; the weights are relative."""
    aim: Aim = "mean"
    """What is made of the scores: their weighted mean, the worst of them (in standard deviations), or their mean rank."""
    surrogate: SurrogateKind = "auto"
    candidates: int = Field(200_000, ge=100, le=10_000_000)
    """Feasible mixtures the surrogate scores in each round."""
    top: int = Field(128, ge=1)
    """The final mixture is the mean of this many best predicted candidates."""
    groups: dict[str, GroupSpec] = {}
    max_kl: float | None = Field(None, gt=0)
    """No mixture is farther from the natural shares than this Kullback-Leibler divergence, in nats."""
    bootstraps: int = Field(50, ge=0, le=10_000)
    """Searches repeated on resampled proxies, which say how sure the found mixture is. 0: none, and nothing is said."""

    @model_validator(mode="after")
    def _usable(self) -> SearchSpec:
        if any(w < 0 for w in self.objective.values()) or sum(self.objective.values()) <= 0:
            raise ValueError("objective: weights must be >= 0 and not all 0")
        if self.rounds[0] < MIN_PROXIES and not self.earlier:
            raise ValueError(f"rounds: the first has {self.rounds[0]} proxies, but a surrogate needs {MIN_PROXIES}")
        most = MAX_TRAINED_PROXIES if self.proxies == "trained" else MAX_PROXIES
        if (num := sum(self.rounds)) > most:
            raise ValueError(f"rounds: {num:,} {self.proxies} proxies in all, expected at most {most:,}")
        if self.aim == "worst" and len({w for w in self.objective.values() if w}) > 1:
            raise ValueError(
                f"aim 'worst' compares scores as equals, but their weights are {self.objective}; make them equal, or 0"
            )
        if self.bootstraps == 1:
            raise ValueError("bootstraps: one search says nothing of how sure it is; set it to 0, or to 2 or more")
        if self.stop is not None and self.bootstraps < MIN_BOOTSTRAPS:
            raise ValueError(f"stop needs bootstraps of {MIN_BOOTSTRAPS} or more to judge by, found {self.bootstraps}")
        if self.proxies == "trained" and "proxy_score" in self.model_fields_set:
            raise ValueError("proxy_score says what the score of a merged proxy is; a trained one has its own")
        if self.extrapolate:
            if any(a >= b for a, b in pairwise(self.extrapolate)):
                raise ValueError(
                    f"extrapolate: {self.extrapolate} has to ascend: parts of the components' run, as in [0.25, 0.5]"
                )
            if self.proxies == "trained":
                raise ValueError("extrapolate continues scores of merged proxies; take it out, or set proxies to merged")
            if self.earlier:
                raise ValueError(
                    "extrapolate needs scores after parts of a run; of an earlier study there are none: take one out"
                )
        if self.proxy_score == "ensemble" and self.earlier:
            raise ValueError(
                "proxy_score ensemble needs what every token costs every component, and of an earlier study only scores are "
                "taken over; set proxy_score to interpolated or stack, or take `earlier` out"
            )
        if self.proxy_tokens is not None and self.proxies == "merged":
            raise ValueError("proxy_tokens is what trained proxies cost; merged ones cost the components: set component.tokens")
        return self


# The scores of each format of task files (megatron_demix.evaluate.tasks.formats). The first of each is the usual one.
TASK_SCORES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("arc", "hellaswag", "piqa", "siqa", "winogrande"), ("acc", "acc_norm", "bits_per_byte")),
    **dict.fromkeys(("gsm8k", "math"), ("exact_match", "bits_per_byte")),
    **dict.fromkeys(("humaneval", "mbpp"), ("pass@1", "bits_per_byte")),
}
GENERATED = {"exact_match", "pass@1"}
"""Scores of answers that the model writes."""


class TaskSpec(Section):
    """One task from local files. Its scores are called <name>/acc and so on, in the objective too."""

    name: Name
    format: Literal["arc", "hellaswag", "piqa", "siqa", "winogrande", "gsm8k", "math", "humaneval", "mbpp"]
    """How the files are made: as the public data set of this name ships, JSON lines or Parquet."""
    path: ExpandedPath
    """A file, or a folder in which files are named after their split."""
    split: Literal["train", "validation", "test"] | None = None
    """What the search is scored on. Default: validation where that is published with answers, else test."""
    final_split: Literal["train", "validation", "test"] | None = None
    """What final runs are compared on. Default: test where that is published with answers, else what the search uses."""
    scores: list[str] | None = Field(None, min_length=1)
    """Some of the format's scores. Without exact_match or pass@1 nothing is generated, which saves most of the cost."""
    num_shots: int = Field(0, ge=0)
    """Worked examples before each question: the first ones of the training split."""
    limit: int | None = Field(None, ge=1)
    """No more items than this, spread evenly over the split."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Longest generated answer. Default: half of what the model reads, at most 512."""
    timeout: Seconds = 10
    """Of one answer that is run or compared; longer is a failure."""

    @model_validator(mode="after")
    def _known(self) -> TaskSpec:
        has = TASK_SCORES[self.format]
        for score in self.scores or ():
            if score not in has:
                raise ValueError(
                    f"scores: format {self.format} has no {score!r}, only {', '.join(has)}{nearest(score, [*has])}"
                )
        if self.format == "humaneval" and self.num_shots:
            raise ValueError("num_shots: format humaneval has no worked examples; set it to 0")
        return self

    @property
    def score_names(self) -> dict[str, str]:
        """Name in the score table -> the format's score."""
        return {f"{self.name}/{score}": score for score in self.scores or TASK_SCORES[self.format]}

    @property
    def generates(self) -> bool:
        """Whether a model writes answers that have to be judged."""
        return bool(GENERATED & set(self.score_names.values()))


class EvaluateSpec(Section):
    losses: Literal["all"] | list[str] = "all"
    """Domains whose validation loss is measured for each proxy."""
    tasks: list[TaskSpec] = []
    tokens_per_domain: Tokens = 32768
    micro_batch_size: int = Field(8, ge=1)
    generate_batch_size: int | None = Field(None, ge=1)
    """Answers that are written side by side; None: as many as have the tokens of micro_batch_size sequences."""
    replicas: int = Field(1, ge=1)
    """Data-parallel copies of the model that share the proxies out among themselves."""
    expert: int = Field(1, ge=1)
    """Ranks that the experts of each are shared out among."""
