"""A run of a study as the arguments of stock pretrain_gpt.py, and the user's own flags beside them.

The same model, data order, schedule and seeds as the trainer of this project: only flags, no change to Megatron-LM.
"""

from __future__ import annotations

import importlib.util
import math
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_demix.checkpoint.model_function import PLAIN, by_known_names
from megatron_demix.errors import ConfigError
from megatron_demix.study.training import ModelSpec, ParallelSpec, TrainSpec
from megatron_demix.train.derived import blend_surplus, ffn_hidden_size, padded_vocab_size, warmup_iters, wsd_decay_iters
from megatron_demix.train.job import TrainJob

Flags = dict[str, Any]
"""By option without dashes: a value, a list of values, True for a bare flag; None and False leave it out."""

# Options that a user may not give, and what says the same in a study. Those that we write, first.
OWNED: Mapping[str, str] = {
    **{name: f"model.{name.replace('-', '_')}" for name in (
        "num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads", "num-query-groups", "kv-channels",
        "max-position-embeddings", "position-embedding-type", "rotary-base", "use-rope-scaling", "rope-scaling-factor",
        "normalization", "norm-epsilon", "swiglu", "qk-layernorm", "add-qkv-bias", "untie-embeddings-and-output-weights",
        "init-method-std", "hidden-dropout", "attention-dropout", "make-vocab-size-divisible-by", "num-experts",
        "moe-router-topk", "moe-router-pre-softmax", "moe-ffn-hidden-size", "moe-aux-loss-coeff", "transformer-impl",
    )},
    **{name: f"train.{name.replace('-', '_')}" for name in (
        "seq-length", "micro-batch-size", "global-batch-size", "lr", "min-lr", "lr-decay-style", "weight-decay", "adam-beta1",
        "adam-beta2", "adam-eps", "clip-grad", "use-distributed-optimizer", "recompute-granularity", "save-interval",
    )},
    "group-query-attention": "model.num_query_groups",
    "disable-bias-linear": "model.add_bias_linear",
    "rotary-percent": "model.rotary_base",
    "moe-router-load-balancing-type": "model.moe_aux_loss_coeff",
    "moe-grouped-gemm": "model.transformer_impl",
    "tensor-model-parallel-size": "parallel.tensor",
    "pipeline-model-parallel-size": "parallel.pipeline",
    "context-parallel-size": "parallel.context",
    "expert-model-parallel-size": "parallel.expert",
    "sequence-parallel": "parallel.sequence_parallel",
    "bf16": "train.precision",
    "lr-warmup-iters": "train.lr_warmup_fraction",
    "lr-decay-iters": "the phase's tokens",
    "lr-wsd-decay-style": "train.lr_decay_style",
    "lr-wsd-decay-iters": "train.lr_decay_style",
    "train-iters": "the phase's tokens",
    "eval-iters": "evaluate",
    "eval-interval": "evaluate",
    "distributed-timeout-minutes": "train.timeout",
    "seed": "seed",
    "vocab-size": "tokenizer",
    "null-tokenizer-eod-id": "tokenizer",
    "per-split-data-args-path": "domains",
    "mid-level-dataset-surplus": "domains",
    "data-cache-path": "the run's folder",
    "tensorboard-dir": "the run's folder",
    "pretrained-checkpoint": "base",
    "load": "base",
    "save": "the run's folder",
    "ckpt-format": "the merge, which reads torch_dist",
    "exit-signal-handler": "the launcher, which has a run save when it is stopped",
    "log-interval": "losses.jsonl, which holds every iteration",
    # Not written, but they would contradict what is.
    "padded-vocab-size": "model.padded_vocab_size",
    "data-path": "domains",
    "train-data-path": "domains",
    "valid-data-path": "domains",
    "test-data-path": "domains",
    "data-args-path": "domains",
    "split": "domains",
    "mock-data": "domains",
    "train-samples": "the phase's tokens",
    "rampup-batch-size": "train.global_batch_size",
    "step-batch-size-schedule": "train.global_batch_size",
    "lr-decay-samples": "the phase's tokens",
    "lr-warmup-fraction": "train.lr_warmup_fraction",
    "lr-warmup-samples": "train.lr_warmup_fraction",
    "lr-warmup-init": "train.lr_warmup_fraction",
    "start-weight-decay": "train.weight_decay",
    "end-weight-decay": "train.weight_decay",
    "fp16": "train.precision",
    "finetune": "base",
    "ckpt-step": "base",
    "use-checkpoint-args": "model",
    "no-load-optim": "the launcher, which resumes a run with all its state",
    "no-load-rng": "the launcher, which resumes a run with all its state",
    "no-save-optim": "the launcher, which resumes a run with all its state",
    "no-save-rng": "the launcher, which resumes a run with all its state",
    "skip-train": "the study",
    "use-legacy-models": "the merge, which reads megatron.core's models",
    "use-rotary-position-embeddings": "model.position_embedding_type",
}  # fmt: skip
# Options with which the model gets other weights than any model of a study has.
OTHER_WEIGHTS = frozenset((
    "mtp-num-layers", "mtp-hybrid-override-pattern", "moe-layer-freq", "moe-shared-expert-intermediate-size",
    "moe-shared-expert-gate", "moe-latent-size", "hybrid-layer-pattern", "hybrid-override-pattern", "hybrid-attention-ratio",
    "hybrid-mlp-ratio", "is-hybrid-model", "heterogeneous-layers-config-path", "heterogeneous-layers-config-encoded-json",
    "spec", "yaml-cfg",
))  # fmt: skip
_TOKENIZER = "tokenizer-type"
_NEEDS_EOD = ("reset-position-ids", "reset-attention-mask", "eod-mask-loss")


def own_arguments(text: str) -> list[str]:
    """The words of trainer.args. Raises ConfigError for an option that the study decides, one that makes a model which no study
    can describe, or a text that is no shell's."""
    try:
        words = shlex.split(text.replace("\\\n", " "))
    except ValueError as e:
        raise ConfigError(f"trainer.args: cannot be read as a shell would ({e}): {text!r}.") from e
    if words and not words[0].startswith("--"):
        raise ConfigError(f"trainer.args: begins with {words[0]!r}, expected an option such as --num-workers 4.")
    for option in options_of(words):
        if option in OWNED:
            raise ConfigError(
                f"trainer.args: --{option} is decided by {OWNED[option]}. Set it there, so that every run of the study and the "
                "merge agree; trainer.args is for what a study does not say."
            )
        if option in OTHER_WEIGHTS:
            raise ConfigError(
                f"trainer.args: --{option} makes a model with other weights than any model of a study has, which could not be "
                "scored. Leave it out, or train by hand and merge with tools/merge_dist_ckpt.py."
            )
        if by_known_names({option.replace("-", "_"): None}).keys() & PLAIN.keys():
            raise ConfigError(
                f"trainer.args: --{option} makes another function of the weights, and no model of a study has it: proxies "
                "would be scored as another model than was trained. Leave it out."
            )
        if option in _NEEDS_EOD and _TOKENIZER not in options_of(words):
            raise ConfigError(
                f"trainer.args: --{option} needs the tokenizer's end of documents; give --{_TOKENIZER} (and --tokenizer-model) "
                "with it."
            )
    return words


def options_of(words: Iterable[str]) -> list[str]:
    """The options among arguments, without dashes and values."""
    return [word[2:].split("=")[0] for word in words if word.startswith("--")]


def pretrain_arguments(
    job: TrainJob, own: list[str], *, data: Path, start: Path | None, version: tuple[int, int], transformer_engine: bool
) -> list[str]:
    """What follows pretrain_gpt.py on the command line.

    data: the JSON file for --per-split-data-args-path. start: root of the checkpoint whose weights the run begins with: on
    its first start Megatron finds no checkpoint in --load and takes --pretrained-checkpoint, as with --finetune: weights only,
    iteration 0, a fresh optimizer and schedule; later it goes on from --load. version: of the checkout. own: put last.
    """
    flags = (
        _model(job.model, transformer_engine=transformer_engine)
        | _parallel(job.parallel, job.train)
        | _training(job)
        | ({} if _TOKENIZER in options_of(own) else _tokenizer(job, version))
        | {
            "make-vocab-size-divisible-by": _padding_unit(job),
            "per-split-data-args-path": data,
            "data-cache-path": job.index_cache,
            "mid-level-dataset-surplus": blend_surplus(
                sum(weight > 0 for _, weight in job.blend), job.train_iters * job.train.global_batch_size
            ),
            "no-create-attention-mask-in-dataloader": True,
            "pretrained-checkpoint": start,
            "load": job.work,
            "save": job.work,
            "ckpt-format": "torch_dist",
            "save-interval": job.train.save_interval,
            "exit-signal-handler": True,
            "log-interval": 1,
            "tensorboard-dir": job.tensorboard,
        }
    )
    return [*_words(flags), *own]


def _padding_unit(job: TrainJob) -> int:
    """What --make-vocab-size-divisible-by, times tensor parallelism, has to be for our padded vocabulary."""
    tensor = job.parallel.tensor
    if job.model.padded_vocab_size is not None:
        return padded_vocab_size(job.model, job.parallel, job.vocab_size) // tensor
    return math.lcm(job.model.make_vocab_size_divisible_by, tensor) // tensor


def _model(model: ModelSpec, *, transformer_engine: bool) -> Flags:
    flags: Flags = {
        "num-layers": model.num_layers,
        "hidden-size": model.hidden_size,
        "ffn-hidden-size": ffn_hidden_size(model),
        "num-attention-heads": model.num_attention_heads,
        "group-query-attention": model.num_query_groups is not None,
        "num-query-groups": model.num_query_groups,
        "kv-channels": model.kv_channels,
        "position-embedding-type": model.position_embedding_type,
        "normalization": model.normalization,
        "norm-epsilon": model.norm_epsilon,
        "swiglu": model.swiglu,
        "qk-layernorm": model.qk_layernorm,
        "disable-bias-linear": not model.add_bias_linear,
        "add-qkv-bias": model.add_qkv_bias,
        "untie-embeddings-and-output-weights": model.untie_embeddings_and_output_weights,
        "init-method-std": model.init_method_std,
        "hidden-dropout": model.hidden_dropout,
        "attention-dropout": model.attention_dropout,
        "attention-softmax-in-fp32": True,
        "transformer-impl": "transformer_engine" if transformer_engine else "local",
    }
    if model.position_embedding_type == "rope":
        flags |= {"rotary-base": model.rotary_base, "rotary-percent": 1.0, "use-rope-scaling": model.use_rope_scaling}
        flags |= {"rope-scaling-factor": model.rope_scaling_factor} if model.use_rope_scaling else {}
    if not transformer_engine:  # fused kernels that come with apex
        flags |= {f"no-{name}": True for name in ("masked-softmax-fusion", "persist-layer-norm", "rope-fusion")}
    # With Transformer Engine, too: the output layer is megatron.core's own, whose fused gradients are a kernel of apex.
    if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:
        flags |= {"no-gradient-accumulation-fusion": True}
    if model.num_experts is not None:
        flags |= {
            "num-experts": model.num_experts,
            "moe-router-topk": model.moe_router_topk,
            "moe-router-pre-softmax": model.moe_router_pre_softmax,
            "moe-ffn-hidden-size": model.moe_ffn_hidden_size or ffn_hidden_size(model),
            "moe-router-load-balancing-type": "aux_loss",
            "moe-aux-loss-coeff": model.moe_aux_loss_coeff,
            "moe-grouped-gemm": transformer_engine,
            "moe-token-dispatcher-type": "alltoall",
        }
    return flags


def _parallel(parallel: ParallelSpec, train: TrainSpec) -> Flags:
    return {
        "tensor-model-parallel-size": parallel.tensor,
        "pipeline-model-parallel-size": parallel.pipeline,
        "context-parallel-size": parallel.context,
        "expert-model-parallel-size": parallel.expert if parallel.expert > 1 else None,
        "sequence-parallel": parallel.sequence_parallel,
        "use-distributed-optimizer": train.use_distributed_optimizer,
        "distributed-timeout-minutes": math.ceil(train.timeout / 60),
    }


def _training(job: TrainJob) -> Flags:
    train, steps = job.train, job.decay_iters
    flags: Flags = {
        "seq-length": train.seq_length,
        "max-position-embeddings": job.model.max_position_embeddings or train.seq_length,
        "micro-batch-size": train.micro_batch_size,
        "global-batch-size": train.global_batch_size,
        "train-iters": job.train_iters,
        "lr": train.lr,
        "min-lr": train.min_lr,
        "lr-decay-style": train.lr_decay_style,
        "lr-warmup-iters": warmup_iters(train, steps),
        "lr-decay-iters": steps,
        "weight-decay": train.weight_decay,
        "adam-beta1": train.adam_beta1,
        "adam-beta2": train.adam_beta2,
        "adam-eps": train.adam_eps,
        "clip-grad": train.clip_grad,
        "bf16": train.precision == "bf16",
        "eval-iters": 0,
        "eval-interval": job.train_iters,  # divided by, even where nothing is evaluated
        "seed": job.seed,
    }
    if train.lr_decay_style == "WSD":
        flags |= {"lr-wsd-decay-style": "linear", "lr-wsd-decay-iters": wsd_decay_iters(steps)}
    if train.recompute_granularity is not None:
        flags |= {
            "recompute-granularity": train.recompute_granularity,
            "recompute-method": "uniform",
            "recompute-num-layers": 1,
        }
    return flags


def _tokenizer(job: TrainJob, version: tuple[int, int]) -> Flags:
    """Data that is tokenized already needs the number of ids and no tokenizer. The null tokenizer counted its end of documents,
    which is its last id, on top of --vocab-size until 0.17, and within from 0.18 on."""
    null = {_TOKENIZER: "NullTokenizer"}
    if version < (0, 18):
        return null | {"vocab-size": job.vocab_size - 1}
    return null | {"vocab-size": job.vocab_size, "null-tokenizer-eod-id": job.eod_id}


def _words(flags: Flags) -> list[str]:
    words: list[str] = []
    for option, value in flags.items():
        if value is None or value is False:
            continue
        words.append(f"--{option}")
        if value is not True:
            words.append(str(value))
    return words


def data_arguments(job: TrainJob) -> dict[str, list[str] | None]:
    """The content of the file that --per-split-data-args-path names: all data is for training. Paths may hold blanks."""
    used = [(prefix, weight) for prefix, weight in job.blend if weight > 0]
    if len(used) == 1:
        return {"train": [str(used[0][0])], "valid": None, "test": None}
    return {"train": [word for prefix, weight in used for word in (repr(weight), str(prefix))], "valid": None, "test": None}
