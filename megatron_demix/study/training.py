"""The sections about training: model, parallelism, optimiser, what is trained for how long. Keys are Megatron's own names."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_demix.mixture import Mixture
from megatron_demix.study.section import ExpandedPath, MixtureSpec, Name, Seconds, Section, Share, Tokens

PhaseName = Literal["base", "component", "proxy", "final"]
LrDecayStyle = Literal["constant", "linear", "cosine", "WSD"]
MAX_SEEDS = 100
"""Each is a training run and a stage of its own; the interval of a mean over so many hardly narrows any more."""


class ModelSpec(Section):
    """megatron.core TransformerConfig and GPTModel, by Megatron's argument names."""

    num_layers: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_query_groups: int | None = Field(None, ge=1)
    ffn_hidden_size: int | None = Field(None, ge=1)
    """Default: that of base.checkpoint, else 4 x hidden_size, or 8/3 of it rounded up to a multiple of 64 with swiglu."""
    kv_channels: int | None = Field(None, ge=1)
    max_position_embeddings: int | None = Field(None, ge=1)
    """Default: train.seq_length."""
    position_embedding_type: Literal["rope", "learned_absolute", "none"] = "rope"
    rotary_base: int = Field(10000, ge=1)
    use_rope_scaling: bool = False
    """Llama 3's scaling of low frequencies, by rope_scaling_factor."""
    rope_scaling_factor: float = Field(8.0, gt=0)
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    norm_epsilon: float = Field(1e-5, gt=0)
    swiglu: bool = True
    qk_layernorm: bool = False
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    untie_embeddings_and_output_weights: bool = False
    init_method_std: float = Field(0.02, gt=0)
    hidden_dropout: float = Field(0.0, ge=0, lt=1)
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    make_vocab_size_divisible_by: int = Field(128, ge=1)
    padded_vocab_size: int | None = Field(None, ge=2)
    """Rows of the embedding. Default: the tokenizer's ids, rounded up to a multiple of the former."""
    num_experts: int | None = Field(None, ge=2)
    moe_router_topk: int = Field(2, ge=1)
    moe_router_pre_softmax: bool = False
    moe_ffn_hidden_size: int | None = Field(None, ge=1)
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
        head = self.kv_channels or self.hidden_size // self.num_attention_heads
        if self.position_embedding_type == "rope" and head % 2:
            raise ValueError(
                f"kv_channels {head} (default: hidden_size / num_attention_heads) is odd, but rope turns pairs of channels; "
                "make it even, or choose another position_embedding_type"
            )
        if self.num_experts is not None and self.moe_router_topk > self.num_experts:
            raise ValueError(f"moe_router_topk {self.moe_router_topk} is more than num_experts {self.num_experts}")
        if self.num_experts is not None and self.moe_router_topk == 1 and not self.moe_router_pre_softmax:
            raise ValueError("moe_router_topk 1 needs moe_router_pre_softmax: true, without which the router learns nothing")
        return self


class ParallelSpec(Section):
    tensor: int = Field(1, ge=1)
    pipeline: int = Field(1, ge=1)
    data: int = Field(1, ge=1)
    context: int = Field(1, ge=1)
    expert: int = Field(1, ge=1)
    sequence_parallel: bool = False

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data * self.context


class TrainSpec(Section):
    """Settings every training run of the study shares, by Megatron's argument names."""

    seq_length: int = Field(ge=8)
    micro_batch_size: int = Field(1, ge=1)
    global_batch_size: int = Field(ge=1)
    """Sequences in one optimiser step."""
    lr: float = Field(3e-4, gt=0)
    min_lr: float = Field(0.0, ge=0)
    lr_decay_style: LrDecayStyle = "cosine"
    lr_warmup_fraction: float = Field(0.01, ge=0, lt=1)
    weight_decay: float = Field(0.1, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    adam_eps: float = Field(1e-8, ge=0)
    clip_grad: float = Field(1.0, ge=0)
    precision: Literal["fp32", "bf16"] = "bf16"
    use_distributed_optimizer: bool = False
    recompute_granularity: Literal["full"] | None = None
    save_interval: int = Field(500, ge=1)
    """Optimiser steps between the checkpoints a killed run resumes from."""
    keep_checkpoints: int = Field(2, ge=2)
    """While a run goes on: if the newest turns out damaged, the one before is resumed from. A study's finished run keeps its
    last."""
    loss_spike_factor: float = Field(1.5, gt=1)
    """A loss above this times its recent median is a spike."""
    loss_spike_window: int = Field(64, ge=2)
    """Iterations of that median; before there are as many, nothing counts as a spike. Spikes do not enter it."""
    loss_spike_patience: int = Field(32, ge=1)
    """Consecutive spikes after which the run is stopped as diverged. NaN and infinity stop it at once."""
    log_interval: int = Field(10, ge=1)
    timeout: Seconds = 1800
    """A collective that waits longer than this has lost a rank: the run is stopped."""


def check_layout(model: ModelSpec, parallel: ParallelSpec, train: TrainSpec) -> None:
    """Raises ValueError where a model, its batches or its sequences cannot be cut as they would have to be."""
    batch = train.micro_batch_size * parallel.data
    if train.global_batch_size % batch:
        raise ValueError(
            f"train.global_batch_size {train.global_batch_size} is not a multiple of micro_batch_size x parallel.data = {batch}"
        )
    if model.num_layers % parallel.pipeline:
        raise ValueError(f"model.num_layers {model.num_layers} is not a multiple of parallel.pipeline {parallel.pipeline}")
    if model.num_attention_heads % parallel.tensor:
        raise ValueError(
            f"model.num_attention_heads {model.num_attention_heads} is not a multiple of parallel.tensor {parallel.tensor}"
        )
    groups = model.num_query_groups or model.num_attention_heads
    if groups % parallel.tensor and parallel.tensor % groups:
        raise ValueError(
            f"model.num_query_groups {groups} is neither a multiple nor a divisor of parallel.tensor {parallel.tensor}"
        )
    if model.num_experts and parallel.tensor > 1 and not parallel.sequence_parallel:
        raise ValueError(
            f"parallel.tensor is {parallel.tensor} and the model has experts, which megatron.core trains only with "
            "parallel.sequence_parallel: true"
        )
    parts = (parallel.tensor if parallel.sequence_parallel else 1) * (2 * parallel.context if parallel.context > 1 else 1)
    if train.seq_length % parts:
        raise ValueError(
            f"train.seq_length {train.seq_length} is not a multiple of {parts}: parallel.context cuts it into twice "
            "as many parts, parallel.sequence_parallel into parallel.tensor"
        )
    positions = model.max_position_embeddings
    if model.position_embedding_type == "learned_absolute" and positions and positions < train.seq_length:
        raise ValueError(
            f"model.max_position_embeddings {positions} is less than train.seq_length {train.seq_length}, and "
            "learned_absolute has no position beyond it"
        )
    if parallel.expert > 1 and (model.num_experts or 1) % parallel.expert:
        found = "the model has none" if model.num_experts is None else f"found {model.num_experts}"
        raise ValueError(
            f"parallel.expert {parallel.expert} shares experts out, so model.num_experts has to be a multiple of it; {found}"
        )
    if (replicas := parallel.data * parallel.context) % parallel.expert:
        raise ValueError(
            f"parallel.data x parallel.context is {replicas}, expected a multiple of parallel.expert "
            f"{parallel.expert}: experts are shared out among these ranks"
        )


class TrainerSpec(Section):
    """Who trains. Settings of megatron_lm are kept, and not used, while the backend is megatron_core."""

    backend: Literal["megatron_core", "megatron_lm"] = "megatron_core"
    """megatron_core: this project's trainer. megatron_lm: stock Megatron-LM from `checkout`, which is never changed."""
    checkout: ExpandedPath | None = None
    """Folder of Megatron-LM, relative to the study file."""
    script: ExpandedPath = Path("pretrain_gpt.py")
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
        return self if self.checkout is None else self.model_copy(update={"checkout": root / self.checkout})


class Phase(Section):
    """One kind of training run; its settings override `train`."""

    tokens: Tokens
    lr: float | None = Field(None, gt=0)
    min_lr: float | None = Field(None, ge=0)
    lr_decay_style: LrDecayStyle | None = None
    lr_warmup_fraction: float | None = Field(None, ge=0, lt=1)


OVERRIDES = tuple(key for key in Phase.model_fields if key != "tokens")
"""The settings of `train` that a phase may have another of."""


class BaseSpec(Phase):
    tokens: Tokens | None = None  # type: ignore[assignment]
    mixture: MixtureSpec = "natural"
    checkpoint: ExpandedPath | None = None
    """A Megatron torch_dist checkpoint to start from instead of training a base."""
    huggingface: ExpandedPath | None = None
    """The same with a Hugging Face folder of a supported family, which is made a checkpoint first."""

    @model_validator(mode="after")
    def _one_start(self) -> BaseSpec:
        if sum(start is not None for start in (self.tokens, self.checkpoint, self.huggingface)) != 1:
            raise ValueError("base needs one of `tokens` (train one), `checkpoint` and `huggingface` (start from one)")
        return self


class AnchorSpec(Section):
    mixture: MixtureSpec = "uniform"
    share: Share = 0.5
    """Part of every component's data that is the anchor mixture; the rest is its own domain. The paper: 0.5."""


class ComponentSpec(Phase):
    anchor: AnchorSpec = AnchorSpec()
    average: list[Annotated[float, Field(gt=0, le=1)]] | None = Field(None, min_length=2)
    """Parts of the run, ascending, whose checkpoints' mean is the component. It ends with the last. Null: its end alone."""
    mixed: Literal["centroid", "pairs"] | Annotated[dict[Name, dict[str, float]], Field(min_length=1)] | None = None
    """More components, trained on mixed merge weights, that correct proxies to second order: on all domains in equal parts, on
    every two of them, or on mixtures by name."""
    maturity_seeds: int | None = Field(None, ge=0, le=MAX_SEEDS)
    """Models trained on the centroid mixture, one a seed, that the merged centroid is compared with, and that interpolated
    scores go through. 0: none. Null: 1 where scores are interpolated (Study.maturity_seeds)."""

    def mixed_weights(self, domains: Sequence[str]) -> dict[str, Mixture]:
        """Merge weights of the mixed components, by name. Raises MixtureError where those of the study are none."""
        if self.mixed == "centroid":
            return {"centroid": Mixture.uniform(domains)}
        if self.mixed == "pairs":
            return {f"{a}+{b}": Mixture.uniform((a, b)).over(domains) for a, b in combinations(domains, 2)}
        return {
            name: Mixture(weights, label=f"component.mixed.{name}").over(domains)
            for name, weights in (self.mixed or {}).items()
        }

    @model_validator(mode="after")
    def _ascending(self) -> ComponentSpec:
        if self.average and any(a >= b for a, b in pairwise(self.average)):
            raise ValueError(f"average: {self.average} has to ascend: parts of the run, such as [0.6, 0.65, 0.7, 0.75]")
        return self


class FinalSpec(Phase):
    init: Literal["base", "scratch"] = "base"
    baselines: list[Literal["uniform", "natural"]] = ["uniform", "natural"]
    """Mixtures trained at the same budget, to compare the found one with. Empty: train the found mixture only."""
    seeds: int = Field(1, ge=1, le=MAX_SEEDS)
    """Runs of each mixture: how else would one know the noise?"""
    blend: Literal["view", "materialise"] = "view"
