"""The study: one YAML file that describes a whole run. Unknown keys are refused, and the nearest known key is named.

Model, parallelism and optimiser keys carry Megatron's own argument names, so that a study reads like a launch script.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from megatron_demix.errors import ConfigError, DemixError
from megatron_demix.mixture import Mixture
from megatron_demix.units import Cut, parse_bytes, parse_cut, parse_duration, parse_tokens


def _or_value_error(parse):
    """pydantic collects ValueErrors; our parsers raise ConfigError."""

    def validate(value: Any) -> Any:
        try:
            return parse(value)
        except DemixError as e:
            raise ValueError(str(e)) from e

    return BeforeValidator(validate)


Tokens = Annotated[int, Field(gt=0), _or_value_error(parse_tokens)]
Bytes = Annotated[int, Field(gt=0), _or_value_error(parse_bytes)]
Seconds = Annotated[int, Field(gt=0), _or_value_error(parse_duration)]
CutOff = Annotated[Cut, _or_value_error(lambda value: value if isinstance(value, Cut) else parse_cut(value))]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Share = Annotated[float, Field(ge=0, lt=1)]
MixtureSpec = Literal["natural", "uniform"] | dict[str, float]
Surrogate = Literal[
    "auto", "gaussian_process", "power_law", "log_linear", "quadratic", "scheffe_log", "ridge", "lightgbm", "stack"
]

_MIN_BOOTSTRAPS = 10
MIN_PROXIES = 8
"""Fewer do not fix a surrogate."""


_Checked = TypeVar("_Checked", bound=BaseModel)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class TokenizerSpec(_Section):
    type: Literal["byte", "bpe", "huggingface", "sentencepiece", "tiktoken"] = "bpe"
    """byte: 256 bytes and EOD, no training. bpe: a byte-level BPE trained on the study's text. The rest load `model`."""
    model: Path | None = None
    """The tokenizer's file or folder, for the types that load one."""
    train_vocab_size: int = Field(4096, ge=300)
    """bpe: number of ids, EOD included."""
    train_bytes: Bytes = 8_000_000
    """bpe: text it is trained on, spread evenly over the domains."""
    domains: list[str] | None = Field(None, min_length=1)
    """bpe: domains it is trained on; null: all. Named ones keep it, and what depends on it, valid when others come and go."""

    @model_validator(mode="after")
    def _model_given(self) -> TokenizerSpec:
        if (self.model is None) != (self.type in ("byte", "bpe")):
            raise ValueError(f"type {self.type!r} {'needs' if self.model is None else 'takes no'} `model`")
        if self.domains and self.type != "bpe":
            raise ValueError(f"type {self.type!r} is not trained, so it takes no `domains`")
        return self


class DomainSpec(_Section):
    name: Name
    inputs: list[str] = []
    """Files or globs: .jsonl, .txt, ... relative to the study file."""
    prefixes: dict[Literal["train", "valid", "test"], list[Path]] | None = None
    """Already tokenized data instead of `inputs`: Megatron path prefixes (without .bin/.idx), by split."""
    json_key: str = "text"
    max_epochs: float = Field(4.0, gt=0)
    """The search and the blend never repeat this domain more often than this in the final run."""
    min_share: float = Field(0.0, ge=0, le=1)
    """Least actual share of the final data. The same number as max_share fixes the domain."""
    max_share: float = Field(1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _one_source(self) -> DomainSpec:
        if bool(self.inputs) == bool(self.prefixes):
            raise ValueError(f"domain {self.name!r} needs either `inputs` (text) or `prefixes` (.bin/.idx)")
        return self


class HeuristicsSpec(_Section):
    use: list[Literal["gopher_repetition", "gopher_quality", "c4", "fineweb"]] = Field(min_length=1)
    """Published rules, in this order. c4 also takes lines out of the documents that it keeps."""
    domains: list[Name] | None = None
    """Domains they are for; null: all."""


class NearDuplicatesSpec(_Section):
    """MinHash over n-grams of words; the defaults are the paper's and find documents that are about 90 % alike."""

    ngram: int = Field(24, ge=1)
    """Words in an n-gram. Documents with fewer have no n-gram and are near duplicates of nothing."""
    bands: int = Field(20, ge=1)
    hashes: int = Field(13, ge=1)
    """MinHashes in a band; documents that agree on all of one band are duplicates."""


class ContaminationSpec(_Section):
    tasks: dict[Name, list[str]] = Field(min_length=1)
    """By task: files or globs with one item a line. A document that contains an n-gram of an item is removed."""
    ngram: int = Field(13, ge=1)
    """Words in an n-gram."""
    keys: list[str] = []
    """Fields of an item that count; none: all."""


class PerplexitySpec(_Section):
    model: Path
    """KenLM's .arpa or binary file."""
    sentencepiece: Path | None = None
    """SentencePiece model that the KenLM model's tokens come from (as CCNet's do); null: words between blanks."""
    drop: CutOff = Cut(0.02, True)
    """The worst of each domain: 2% of the documents, or those above a perplexity. The paper: about 2 %."""
    domains: list[Name] | None = None


class QualitySpec(_Section):
    model: Path
    """fastText's .bin file."""
    label: str = "high"
    """The label whose probability is the score."""
    drop: CutOff = Cut(0.03, True)
    """The worst of each domain: 3% of the documents, or those below a probability. The paper: about 3 %."""
    domains: list[Name] | None = None


class CleanSpec(_Section):
    """What is removed from text before it is tokenized, in this order. Needs the extra [data]."""

    heuristics: HeuristicsSpec | None = None
    exact_duplicates: bool = True
    contamination: ContaminationSpec | None = None
    near_duplicates: NearDuplicatesSpec | None = NearDuplicatesSpec()
    perplexity: PerplexitySpec | None = None
    quality: QualitySpec | None = None

    def models(self) -> list[tuple[str, Path]]:
        """(place, file) of every model that scores documents."""
        found = [("perplexity.model", self.perplexity.model)] if self.perplexity else []
        if self.perplexity and self.perplexity.sentencepiece:
            found.append(("perplexity.sentencepiece", self.perplexity.sentencepiece))
        return [*found, ("quality.model", self.quality.model)] if self.quality else found

    def under(self, root: Path) -> CleanSpec:
        """The same with the models' paths starting at `root`."""
        sections: dict[str, BaseModel] = {}
        for place, path in self.models():
            section, key = place.split(".")
            sections[section] = sections.get(section, getattr(self, section)).model_copy(update={key: root / path})
        return self.model_copy(update=sections)

    def unknown_domain(self, known: Collection[str]) -> tuple[str, str] | None:
        """(place, name) of a domain that is named here and is not one of `known`."""
        for place in ("heuristics", "perplexity", "quality"):
            for name in getattr(getattr(self, place), "domains", None) or ():
                if name not in known:
                    return f"{place}.domains", name
        return None


class PrepareSpec(_Section):
    clean: CleanSpec | None = None
    """Clean the text first; null: it is used as it is."""
    split: tuple[float, float, float] = (0.94, 0.03, 0.03)
    """Shares of the documents for train, valid (scores the search) and test (scores the final run only)."""
    on_bad_document: Literal["error", "reject"] = "error"
    """A line that is not UTF-8, not JSON or without text: stop, or leave it out and list it."""
    workers: int = Field(2, ge=1)

    @model_validator(mode="after")
    def _whole(self) -> PrepareSpec:
        if min(self.split) <= 0 or abs(sum(self.split) - 1) > 1e-6:
            raise ValueError(f"split {list(self.split)}: expected three shares above 0 that sum to 1 (train, valid, test)")
        return self


class ModelSpec(_Section):
    """megatron.core TransformerConfig and GPTModel, by Megatron's argument names."""

    num_layers: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_query_groups: int | None = Field(None, ge=1)
    ffn_hidden_size: int | None = Field(None, ge=1)
    """Default: 4 x hidden_size, or 8/3 of it rounded up to a multiple of 64 with swiglu."""
    kv_channels: int | None = Field(None, ge=1)
    max_position_embeddings: int | None = Field(None, ge=1)
    """Default: train.seq_length."""
    position_embedding_type: Literal["rope", "learned_absolute", "none"] = "rope"
    rotary_base: int = 10000
    use_rope_scaling: bool = False
    """Llama 3's scaling of low frequencies, by rope_scaling_factor."""
    rope_scaling_factor: float = Field(8.0, gt=0)
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    norm_epsilon: float = 1e-5
    swiglu: bool = True
    qk_layernorm: bool = False
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    untie_embeddings_and_output_weights: bool = False
    init_method_std: float = 0.02
    hidden_dropout: float = Field(0.0, ge=0, lt=1)
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    make_vocab_size_divisible_by: int = Field(128, ge=1)
    padded_vocab_size: int | None = Field(None, ge=2)
    """Rows of the embedding. Default: the tokenizer's ids, rounded up to a multiple of the former."""
    num_experts: int | None = Field(None, ge=2)
    moe_router_topk: int = Field(2, ge=1)
    moe_router_pre_softmax: bool = False
    moe_ffn_hidden_size: int | None = None
    moe_aux_loss_coeff: float = 1e-2
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """auto: Transformer Engine where it works, the local layer spec elsewhere."""

    @model_validator(mode="after")
    def _divisible(self) -> ModelSpec:
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.num_query_groups and self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_query_groups {self.num_query_groups}"
            )
        return self


class ParallelSpec(_Section):
    tensor: int = Field(1, ge=1)
    pipeline: int = Field(1, ge=1)
    data: int = Field(1, ge=1)
    context: int = Field(1, ge=1)
    expert: int = Field(1, ge=1)
    sequence_parallel: bool = False

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data * self.context


class TrainSpec(_Section):
    """Settings every training run of the study shares, by Megatron's argument names."""

    seq_length: int = Field(ge=8)
    micro_batch_size: int = Field(1, ge=1)
    global_batch_size: int = Field(ge=1)
    """Sequences in one optimiser step."""
    lr: float = Field(3e-4, gt=0)
    min_lr: float = Field(0.0, ge=0)
    lr_decay_style: Literal["constant", "linear", "cosine", "WSD"] = "cosine"
    lr_warmup_fraction: float = Field(0.01, ge=0, lt=1)
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    precision: Literal["fp32", "bf16"] = "bf16"
    use_distributed_optimizer: bool = False
    recompute_granularity: Literal["full"] | None = None
    save_interval: int = Field(500, ge=1)
    """Optimiser steps between the checkpoints a killed run resumes from."""
    keep_checkpoints: int = Field(2, ge=2)
    """While a run goes on: if the newest turns out damaged, the one before is resumed from. A finished run keeps its last."""
    loss_spike_factor: float = Field(1.5, gt=1)
    """A loss above this times its recent median is a spike."""
    loss_spike_window: int = Field(64, ge=2)
    """Iterations of that median; before there are as many, nothing counts as a spike. Spikes do not enter it."""
    loss_spike_patience: int = Field(32, ge=1)
    """Consecutive spikes after which the run is stopped as diverged. NaN and infinity stop it at once."""
    log_interval: int = Field(10, ge=1)
    eval_interval: int | None = Field(None, ge=1)
    eval_iters: int = Field(4, ge=1)
    timeout: Seconds = 1800
    """A collective that waits longer than this has lost a rank: the run is stopped."""


class TrainerSpec(_Section):
    """Who trains. Settings of megatron_lm are kept, and not used, while the backend is megatron_core."""

    backend: Literal["megatron_core", "megatron_lm"] = "megatron_core"
    """megatron_core: this project's trainer. megatron_lm: stock Megatron-LM from `checkout`, which is never changed."""
    checkout: Path | None = None
    """Folder of Megatron-LM, relative to the study file."""
    script: Path = Path("pretrain_gpt.py")
    """Relative to the checkout; or the absolute path of one of your own that calls Megatron's pretrain()."""
    args: str = ""
    """More of Megatron-LM's flags, as on a command line. What the study decides is refused here."""

    @model_validator(mode="after")
    def _can_start(self) -> TrainerSpec:
        if self.backend == "megatron_lm" and self.checkout is None:
            raise ValueError("backend megatron_lm needs `checkout`, the folder of Megatron-LM")
        return self

    def under(self, root: Path) -> TrainerSpec:
        """The same with the checkout's path starting at `root`."""
        return self if self.checkout is None else self.model_copy(update={"checkout": root / self.checkout.expanduser()})


class Phase(_Section):
    """One kind of training run; its settings override `train`."""

    tokens: Tokens
    lr: float | None = Field(None, gt=0)
    min_lr: float | None = Field(None, ge=0)
    lr_decay_style: Literal["constant", "linear", "cosine", "WSD"] | None = None
    lr_warmup_fraction: float | None = Field(None, ge=0, lt=1)


class BaseSpec(Phase):
    tokens: Tokens | None = None  # type: ignore[assignment]
    mixture: MixtureSpec = "natural"
    checkpoint: Path | None = None
    """A Megatron torch_dist checkpoint to start from instead of training a base."""
    huggingface: Path | None = None
    """The same with a Hugging Face folder of a supported family, which is made a checkpoint first."""

    @model_validator(mode="after")
    def _one_start(self) -> BaseSpec:
        if sum(start is not None for start in (self.tokens, self.checkpoint, self.huggingface)) != 1:
            raise ValueError("base needs one of `tokens` (train one), `checkpoint` and `huggingface` (start from one)")
        return self


class AnchorSpec(_Section):
    mixture: MixtureSpec = "uniform"
    share: Share = 0.5
    """Part of every component's data that is the anchor mixture; the rest is its own domain. The paper: 0.5."""


class ComponentSpec(Phase):
    anchor: AnchorSpec = AnchorSpec()
    maturity_seeds: int = Field(0, ge=0)
    """Models trained on the centroid mixture, one a seed, that the merged centroid is compared with. 0: no check."""


# The options of each merge method (megatron_demix.merge.named). Random drops take the study's seed.
MERGE_OPTIONS: dict[str, tuple[str, ...]] = {
    "linear": ("scale", "rules"),
    "multislerp": ("from_base",),
    "karcher": ("from_base",),
    "ties": ("scale", "density"),
    "dare_linear": ("scale", "density"),
    "dare_ties": ("scale", "density"),
    "della": ("scale", "density", "epsilon"),
    "della_linear": ("scale", "density", "epsilon"),
    "breadcrumbs": ("scale", "density", "gamma"),
    "breadcrumbs_ties": ("scale", "density", "gamma"),
}


class MergeRule(_Section):
    tensors: str = "*"
    layers: int | str | None = None
    scale: float | None = None
    weights: dict[str, float] | None = None


class MergeSpec(_Section):
    """How components become a proxy, in the search and on disk. An option that the method does not have is refused."""

    method: Literal[
        "linear",
        "multislerp",
        "karcher",
        "ties",
        "dare_linear",
        "dare_ties",
        "della",
        "della_linear",
        "breadcrumbs",
        "breadcrumbs_ties",
    ] = "linear"
    from_base: bool | None = None
    """Merge the components' deltas from the base instead of the components."""
    scale: float | None = Field(None, allow_inf_nan=False)
    """Of the merged deltas, which are then added to the base."""
    rules: list[MergeRule] | None = None
    """Weights or scales of certain tensors or layers (megatron_demix.merge.rules)."""
    density: float | None = Field(None, gt=0, le=1)
    """Share of each delta that stays."""
    gamma: float | None = Field(None, ge=0, lt=1)
    """Share of the largest changes that are dropped."""
    epsilon: float | None = Field(None, ge=0, lt=0.5)
    """How far the probabilities to stay reach from density."""
    threads: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _options(self) -> MergeSpec:
        has = MERGE_OPTIONS[self.method]
        for option in sorted({o for options in MERGE_OPTIONS.values() for o in options}):
            if getattr(self, option) is not None and option not in has:
                raise ValueError(f"merge.{option}: method {self.method} has no {option}; its options are {', '.join(has)}")
        if "density" in has and self.density is None:
            raise ValueError(f"merge.density: method {self.method} needs the share of each delta that stays, such as 0.5")
        epsilon = 0.15 if self.epsilon is None else self.epsilon
        if "epsilon" in has and self.density and self.density < 1 and not epsilon < self.density < 1 - epsilon:
            raise ValueError(f"merge.epsilon: density {self.density} - {epsilon} and + {epsilon} must lie in (0, 1)")
        return self

    @property
    def needs_base(self) -> bool:
        scales = (self.scale, *(rule.scale for rule in self.rules or ()))
        return bool(self.from_base) or self.density is not None or any(scale is not None for scale in scales)

    @property
    def options(self) -> dict[str, Any]:
        """The method's own options that are given."""
        return {o: v for o in MERGE_OPTIONS[self.method] if o != "from_base" and (v := getattr(self, o)) is not None}


class GroupSpec(_Section):
    """Bounds on the summed actual shares of some domains. A domain belongs to one group at most."""

    domains: list[str] = Field(min_length=1)
    lowest: float = Field(0.0, ge=0, le=1)
    highest: float = Field(1.0, ge=0, le=1)


class SearchSpec(_Section):
    rounds: list[Annotated[int, Field(ge=1)]] = Field([64, 32, 16], min_length=1)
    """Proxies evaluated in each round."""
    proxies: Literal["merged", "trained"] = "merged"
    """merged from the components (DeMix); or each trained on its mixture: RegMix with one round, CLIMB with several."""
    proxy_score: Literal["merged", "interpolated", "stack"] = "stack"
    """What a merged proxy's score is: the merged model's, the components' own averaged with its weights, or a stack of both."""
    proxy_tokens: Tokens | None = None
    """Of each trained proxy. Default: all together cost what the components would."""
    stop: float | None = Field(None, gt=0, lt=1)
    """Later rounds are left empty once a perfect further search could win less than this part of what was won over natural."""
    design: Literal["dirichlet", "sobol", "lattice", "optimal"] = "dirichlet"
    """How the first round is sampled."""
    objective: dict[str, float] = Field(min_length=1)
    """Weight of each score. A domain's name means its validation loss in bits per byte; the weights are relative."""
    aim: Literal["mean", "worst", "percentile_rank"] = "mean"
    """What is made of the scores: their weighted mean, the worst of them (in standard deviations), or their mean rank."""
    surrogate: Surrogate = "auto"
    candidates: int = Field(200_000, ge=100)
    """Feasible mixtures the surrogate scores in each round."""
    top: int = Field(128, ge=1)
    """The final mixture is the mean of this many best predicted candidates."""
    groups: dict[str, GroupSpec] = {}
    max_kl: float | None = Field(None, gt=0)
    """No mixture is farther from the natural shares than this Kullback-Leibler divergence, in nats."""
    bootstraps: int = Field(50, ge=0)
    """Searches repeated on resampled proxies, which say how sure the found mixture is. 0: none, and nothing is said."""

    @model_validator(mode="after")
    def _usable(self) -> SearchSpec:
        if any(w < 0 for w in self.objective.values()) or sum(self.objective.values()) <= 0:
            raise ValueError("objective: weights must be >= 0 and not all 0")
        if self.rounds[0] < MIN_PROXIES:
            raise ValueError(f"rounds: the first has {self.rounds[0]} proxies, but a surrogate needs {MIN_PROXIES}")
        if self.aim == "worst" and len({w for w in self.objective.values() if w}) > 1:
            raise ValueError(
                f"aim 'worst' compares scores as equals, but their weights are {self.objective}; make them equal, or 0"
            )
        if self.stop is not None and self.bootstraps < _MIN_BOOTSTRAPS:
            raise ValueError(f"stop needs bootstraps of {_MIN_BOOTSTRAPS} or more to judge by, found {self.bootstraps}")
        if self.proxies == "trained" and "proxy_score" in self.model_fields_set:
            raise ValueError("proxy_score says what the score of a merged proxy is; a trained one has its own")
        if self.proxy_tokens is not None and self.proxies == "merged":
            raise ValueError("proxy_tokens is what trained proxies cost; merged ones cost the components: set component.tokens")
        return self


# The scores of each format of task files (megatron_demix.evaluate.tasks.formats). The first of each is the usual one.
TASK_SCORES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("arc", "hellaswag", "piqa", "siqa", "winogrande"), ("acc", "acc_norm", "bits_per_byte")),
    **dict.fromkeys(("gsm8k", "math"), ("exact_match", "bits_per_byte")),
    **dict.fromkeys(("humaneval", "mbpp"), ("pass@1", "bits_per_byte")),
}


class TaskSpec(_Section):
    """One task from local files. Its scores are called <name>/acc and so on, in the objective too."""

    name: Name
    format: Literal["arc", "hellaswag", "piqa", "siqa", "winogrande", "gsm8k", "math", "humaneval", "mbpp"]
    """How the files are made: as the public data set of this name ships, JSON lines or Parquet."""
    path: Path
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
                    f"scores: format {self.format} has no {score!r}, only {', '.join(has)}{_nearest(score, [*has])}"
                )
        if self.format == "humaneval" and self.num_shots:
            raise ValueError("num_shots: format humaneval has no worked examples; set it to 0")
        return self

    @property
    def score_names(self) -> dict[str, str]:
        """Name in the score table -> the format's score."""
        return {f"{self.name}/{score}": score for score in self.scores or TASK_SCORES[self.format]}


class EvaluateSpec(_Section):
    losses: Literal["all"] | list[str] = "all"
    """Domains whose validation loss is measured for each proxy."""
    tasks: list[TaskSpec] = []
    tokens_per_domain: Tokens = 32768
    micro_batch_size: int = Field(8, ge=1)
    replicas: int = Field(1, ge=1)
    """Data-parallel copies of the model that share the proxies out among themselves."""


class FinalSpec(Phase):
    init: Literal["base", "scratch"] = "base"
    baselines: list[Literal["uniform", "natural"]] = ["uniform", "natural"]
    """Mixtures trained at the same budget, to compare the found one with. Empty: train the found mixture only."""
    seeds: int = Field(1, ge=1)
    """Runs of each mixture: how else would one know the noise?"""
    blend: Literal["view", "materialise"] = "view"


class SlurmResources(_Section):
    """What a job asks SLURM for, by the names of sbatch's options. Absent: the site's default."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: Seconds | None = None
    """Limit of one job. A stage that needs longer is told to save before it, and goes on in the same job, requeued."""
    cpus_per_task: int | None = Field(None, ge=1)
    """One task a node starts all ranks of that node."""
    mem: str | None = None
    gpus_per_node: int | None = Field(None, ge=1)
    sbatch: list[str] = []
    """Any other options, as in "--exclusive"."""


class SlurmSpec(SlurmResources):
    ranks_per_node: int | None = Field(None, ge=1)
    """Default: gpus_per_node, else all ranks of a stage on one node. Nodes are counted from this."""
    light: SlurmResources | None = None
    """Overrides for stages without ranks (tokenizing, fitting, blending), which need no GPU."""
    kinds: dict[str, SlurmResources] = {}
    """Overrides for all stages of a kind, which is the first part of their name: {final: {time: 2-00:00:00}}."""
    parts: dict[str, Annotated[int, Field(ge=1)]] = {}
    """Array elements that make each stage of a kind together: {data: 16, rounds: 8, blend: 8}. rounds: what is scored in them.
    blend: if it is materialised."""
    grace: Seconds = 300
    """How long before the time limit a job is told to save."""
    array_limit: int | None = Field(None, ge=1)
    """Most jobs of one array that run side by side."""
    setup: str = ""
    """Shell lines before the stage starts: module load, source a virtual environment, export NCCL settings."""
    container: str | None = None
    """Image that pyxis runs the stages in. `mounts` has to show the run, the corpus and this package."""
    mounts: list[str] = []
    python: str | None = None
    """Interpreter of the stages. Default: the one `demix submit` runs on, with a container python3."""


class LaunchSpec(_Section):
    backend: Literal["local", "slurm"] = "local"
    """Where `demix submit` starts the study: in the background of this machine, or as SLURM jobs."""
    jobs: int = Field(1, ge=1)
    """local: stages that may run side by side."""
    threads_per_rank: int = Field(1, ge=1)
    slurm: SlurmSpec = SlurmSpec()


class Study(_Section):
    name: Name
    seed: int = Field(1234, ge=0)
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
            raise ValueError(f"prepare.clean.{place}: {name!r} is not one of {', '.join(names)}{_nearest(name, names)}")
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
        for what, used in (
            ("evaluate.losses", losses),
            ("search.objective", self.search.objective),
            ("tokenizer.domains", self.tokenizer.domains or []),
            ("base.mixture", self.base.mixture),
            ("component.anchor.mixture", self.component.anchor.mixture),
            *((f"search.groups.{label}", group.domains) for label, group in self.search.groups.items()),
        ):
            allowed = scores if what == "search.objective" else names
            for name in () if isinstance(used, str) else used:
                if name not in allowed:
                    raise ValueError(f"{what}: {name!r} is not one of {', '.join(allowed)}{_nearest(name, allowed)}")
        for what, spec in (("base.mixture", self.base.mixture), ("component.anchor.mixture", self.component.anchor.mixture)):
            if not isinstance(spec, str):
                Mixture(spec, label=f"study {self.name!r}: {what}")
        batch = self.train.micro_batch_size * self.parallel.data
        if self.train.global_batch_size % batch:
            raise ValueError(
                f"train.global_batch_size {self.train.global_batch_size} "
                f"is not a multiple of micro_batch_size x parallel.data = {batch}"
            )
        if self.model.num_layers % self.parallel.pipeline:
            raise ValueError(
                f"model.num_layers {self.model.num_layers} is not a multiple of parallel.pipeline {self.parallel.pipeline}"
            )
        if self.model.num_attention_heads % self.parallel.tensor:
            raise ValueError(
                f"model.num_attention_heads {self.model.num_attention_heads} "
                f"is not a multiple of parallel.tensor {self.parallel.tensor}"
            )
        return self

    def phase(self, name: Literal["base", "component", "proxy", "final"]) -> TrainSpec:
        """`train` with the overrides of one phase applied. Trained proxies are trained as components are."""
        section: Phase = getattr(self, "component" if name == "proxy" else name)
        overrides = {
            k: v for k in ("lr", "min_lr", "lr_decay_style", "lr_warmup_fraction") if (v := getattr(section, k)) is not None
        }
        return self.train.model_copy(update=overrides)

    def mixture(self, spec: MixtureSpec, natural: Mapping[str, float], label: str) -> Mixture:
        """A MixtureSpec as a Mixture over all domains. natural: training tokens by domain."""
        if spec == "natural":
            return Mixture.proportional({n: natural[n] for n in self.domain_names}, label=label)
        if spec == "uniform":
            return Mixture.uniform(self.domain_names)
        return Mixture(dict(spec), label=label).over(self.domain_names, label=label)


def load_study(path: Path, overrides: list[str] | None = None) -> Study:
    """Read and check a study file. overrides: "a.b=value" as YAML, lists by index. Raises ConfigError, MixtureError."""
    import yaml

    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise ConfigError(f"study {path}: cannot be read: {e}") from e
    if not isinstance(data, dict):
        raise ConfigError(f"study {path}: expected a mapping with name, domains, model, ...; found {type(data).__name__}.")
    for override in overrides or []:
        _override(data, override)
    return _checked(Study, data, f"study {path}")


def clean_spec(data: Mapping[str, Any]) -> CleanSpec:
    """What a study holds under prepare.clean, for use without a study. Raises ConfigError."""
    return _checked(CleanSpec, data, "cleaning")


def _checked(section: type[_Checked], data: Any, what: str) -> _Checked:
    try:
        return section.model_validate(data)
    except ValidationError as e:
        # A value that fits no form of a field gives one error a form: shown as one line a field.
        reasons: dict[str, list[str]] = {}
        for error in e.errors():
            reasons.setdefault(_place(error), []).append(_explain(error, section))
        lines = (f"  {where}: {', or '.join(found)}" if where else f"  {found[0]}" for where, found in reasons.items())
        raise ConfigError(f"{what}:\n" + "\n".join(lines)) from e


def _override(data: dict, text: str) -> None:
    import yaml

    dotted, equals, value = text.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"--set {text!r}: expected key.subkey=value.")
    *parents, last = dotted.split(".")
    node: Any = data
    try:
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        node[int(last) if isinstance(node, list) else last] = yaml.safe_load(value)
    except (ValueError, IndexError, TypeError, AttributeError) as e:
        raise ConfigError(f"--set {text!r}: the study has no such place ({e}).") from e
    except yaml.YAMLError as e:
        raise ConfigError(f"--set {text!r}: {value!r} is not YAML ({' '.join(str(e).split())}).") from e


def _place(error: ErrorDetails) -> str:
    """Dotted path of the offending key; pydantic's names for the forms of a union, as in "dict[str,float]", are left out."""
    return ".".join(str(part) for part in error["loc"] if "[" not in str(part))


def _explain(error: ErrorDetails, root: type[BaseModel]) -> str:
    if error["type"] == "value_error":
        return error["msg"].removeprefix("Value error, ")
    if error["type"] != "extra_forbidden":
        seen = f", found {error['input']!r}" if isinstance(error["input"], (str, int, float, bool, type(None))) else ""
        return f"{error['msg']}{seen}"
    section = _section_at(root, error["loc"][:-1])
    known = list(section.model_fields) if section else []
    return f"unknown key{_nearest(str(error['loc'][-1]), known)}" + (f" Known here: {', '.join(known)}." if known else "")


def _section_at(root: type[BaseModel], location: tuple) -> type[BaseModel] | None:
    section: Any = root
    for part in location:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part)
        if field is None:
            return None
        inner = field.annotation
        if getattr(inner, "__origin__", None) is list or isinstance(inner, UnionType):
            inner = inner.__args__[0]
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return None
        section = inner
    return section


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else "."
