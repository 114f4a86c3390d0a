"""config.json of a Hugging Face folder and Megatron's model arguments: what each says in the other's words.

Only what both can express is converted. A setting that changes the computation and has no counterpart is refused by name:
a model that silently computes something else is worse than none.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_demix.artifact import read_json
from megatron_demix.checkpoint.model_function import DESCRIBING, PLAIN, by_known_names, model_function
from megatron_demix.errors import ConfigError, IncompatibleInputs


@dataclass(frozen=True)
class Family:
    """One model_type of transformers, and what it fixes without saying so in config.json."""

    model_type: str
    architecture: str
    qk_layernorm: bool = False
    add_qkv_bias: bool = False
    moe: bool = False


FAMILIES = {
    f.model_type: f
    for f in (
        Family("llama", "LlamaForCausalLM"),
        Family("qwen2", "Qwen2ForCausalLM", add_qkv_bias=True),
        Family("qwen3", "Qwen3ForCausalLM", qk_layernorm=True),
        Family("qwen3_moe", "Qwen3MoeForCausalLM", qk_layernorm=True, moe=True),
    )
}

# What the supported families are, in Megatron's arguments, and which others they have settings for.
_REQUIRED = {"normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False, "position_embedding_type": "rope"}
_MAPPED = frozenset({"qk_layernorm", "use_rope_scaling", "moe_router_pre_softmax"})

# The one kind of RoPE scaling Megatron has (--use-rope-scaling): Llama 3's, with these constants and a free factor.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class ModelArguments:
    """A model in the words of Megatron's arguments. vocab_size: rows of the embedding that mean something; no padding."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    norm_epsilon: float
    rotary_base: float
    use_rope_scaling: bool
    rope_scaling_factor: float
    qk_layernorm: bool
    add_qkv_bias: bool
    untie_embeddings_and_output_weights: bool
    num_experts: int | None
    moe_router_topk: int
    moe_ffn_hidden_size: int | None
    moe_router_pre_softmax: bool
    moe_aux_loss_coeff: float

    @property
    def family(self) -> Family:
        """The Hugging Face family of this model. Raises IncompatibleInputs where there is none."""
        wanted = (self.qk_layernorm, self.add_qkv_bias, self.num_experts is not None)
        for family in FAMILIES.values():
            if (family.qk_layernorm, family.add_qkv_bias, family.moe) == wanted:
                return family
        raise IncompatibleInputs(
            f"no supported Hugging Face family has qk_layernorm {self.qk_layernorm}, add_qkv_bias {self.add_qkv_bias} and "
            f"{self.num_experts or 'no'} experts; they are {', '.join(FAMILIES)}."
        )

    def megatron(self) -> dict[str, Any]:
        """As Megatron saves them in a checkpoint, without what depends on the layout or the run."""
        named = {k: v for k, v in vars(self).items() if k != "vocab_size"}
        return named | {
            "group_query_attention": True,
            "add_bias_linear": False,
            "add_position_embedding": True,
            "position_embedding_type": "rope",
            "rotary_percent": 1.0,
            "normalization": "RMSNorm",
            "swiglu": True,
        }

    def study(self) -> dict[str, Any]:
        """The `model` section of a study for this model: only what differs from the defaults of every study."""
        section = {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "ffn_hidden_size": self.ffn_hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "num_query_groups": self.num_query_groups,
            "kv_channels": self.kv_channels,
            "max_position_embeddings": self.max_position_embeddings,
            "norm_epsilon": self.norm_epsilon,
            "rotary_base": int(self.rotary_base),
        }
        if self.use_rope_scaling:
            section |= {"use_rope_scaling": True, "rope_scaling_factor": self.rope_scaling_factor}
        section |= {
            k: True for k in ("qk_layernorm", "add_qkv_bias", "untie_embeddings_and_output_weights") if getattr(self, k)
        }
        if self.num_experts is not None:
            names = ("num_experts", "moe_router_topk", "moe_ffn_hidden_size", "moe_aux_loss_coeff")
            section |= {name: getattr(self, name) for name in names}
            section |= {"moe_router_pre_softmax": True} if self.moe_router_pre_softmax else {}
        return section


def read_config(folder: Path) -> dict[str, Any]:
    """config.json. Raises ConfigError where the folder has none, CorruptInput where it is damaged."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ConfigError(f"{folder}: holds no config.json, expected a Hugging Face model folder.")
    config = read_json(path)
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(config).__name__}.")
    return config


def from_huggingface(config: Mapping[str, Any], where: str) -> ModelArguments:
    """The model that a config.json describes.

    Raises IncompatibleInputs for another architecture, and for a setting Megatron (or this conversion) cannot express.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise IncompatibleInputs(
            f"{where}: model_type is {config.get('model_type')!r}; supported are {', '.join(FAMILIES)}. "
            "Megatron-Bridge converts others: give its torch_dist checkpoint as base.checkpoint."
        )
    _refuse_unsupported(config, family, where)
    rotary_base, rope_factor = _rope(config, where)
    if not rotary_base.is_integer():
        raise IncompatibleInputs(
            f"{where}: config.json has rope_theta {rotary_base}; Megatron's --rotary-base takes whole numbers alone."
        )
    hidden_size, num_heads = _number(config, "hidden_size", where), _number(config, "num_attention_heads", where)
    experts = "num_experts" if "num_experts" in config else "num_local_experts"
    return ModelArguments(
        num_layers=_number(config, "num_hidden_layers", where),
        hidden_size=hidden_size,
        ffn_hidden_size=_number(config, "intermediate_size", where),
        num_attention_heads=num_heads,
        num_query_groups=_number(config, "num_key_value_heads", where, num_heads),
        kv_channels=_number(config, "head_dim", where, hidden_size // num_heads),
        vocab_size=_number(config, "vocab_size", where),
        max_position_embeddings=_number(config, "max_position_embeddings", where),
        norm_epsilon=_real(config, "rms_norm_eps", where, 1e-6),
        rotary_base=rotary_base,
        use_rope_scaling=rope_factor is not None,
        rope_scaling_factor=rope_factor or 8.0,
        qk_layernorm=family.qk_layernorm,
        add_qkv_bias=family.add_qkv_bias,
        untie_embeddings_and_output_weights=not config.get("tie_word_embeddings", False),
        num_experts=_number(config, experts, where) if family.moe else None,
        moe_router_topk=_number(config, "num_experts_per_tok", where) if family.moe else 2,
        moe_ffn_hidden_size=_number(config, "moe_intermediate_size", where) if family.moe else None,
        # Megatron either takes the softmax over the chosen experts, which is what normalising their share of a softmax over
        # all of them comes to, or (pre-softmax) does not normalise.
        moe_router_pre_softmax=family.moe and not config.get("norm_topk_prob", False),
        moe_aux_loss_coeff=_real(config, "router_aux_loss_coef", where, 0.001, least=0.0) if family.moe else 0.0,
    )


def to_huggingface(model: ModelArguments, dtype: str) -> dict[str, Any]:
    """A config.json for a model that has no Hugging Face folder to take it from."""
    family = model.family
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,  # said, because a family's defaults (Llama: 1 and 2) are ids of another tokenizer
        "dtype": dtype,
        "eos_token_id": None,
        "head_dim": model.kv_channels,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": model.max_position_embeddings,
        "num_attention_heads": model.num_attention_heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_query_groups,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rotary_base,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": model.vocab_size,
    }
    if model.use_rope_scaling:
        config["rope_scaling"] = {"rope_type": "llama3", "factor": model.rope_scaling_factor} | _LLAMA3_ROPE
    if model.num_experts is not None:
        config |= {
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": model.moe_ffn_hidden_size,
            "norm_topk_prob": not model.moe_router_pre_softmax,
            "num_experts": model.num_experts,
            "num_experts_per_tok": model.moe_router_topk,
            "router_aux_loss_coef": model.moe_aux_loss_coeff,
        }
    return config


def from_megatron(arguments: Mapping[str, Any], vocab_size: int, where: str) -> ModelArguments:
    """The model that a checkpoint's saved arguments describe. Raises IncompatibleInputs for what no family here has."""
    if missing := sorted(DESCRIBING - arguments.keys()):
        raise IncompatibleInputs(
            f"{where}: the checkpoint's saved arguments do not describe its model (no {missing[0]}). Give a Hugging Face "
            "folder of the same architecture with --reference."
        )
    check_expressible(arguments, where)
    arguments = by_known_names(arguments)
    get = arguments.get
    num_heads, hidden_size = arguments["num_attention_heads"], arguments["hidden_size"]
    num_experts = get("num_experts")
    coefficients = get("moe_aux_loss_coeff") or 0.0  # a list where there are several kinds of load balancing
    return ModelArguments(
        num_layers=arguments["num_layers"],
        hidden_size=hidden_size,
        ffn_hidden_size=arguments["ffn_hidden_size"],
        num_attention_heads=num_heads,
        num_query_groups=(get("num_query_groups") or num_heads) if get("group_query_attention", True) else num_heads,
        kv_channels=get("kv_channels") or hidden_size // num_heads,
        vocab_size=vocab_size,
        max_position_embeddings=get("max_position_embeddings") or arguments["seq_length"],
        norm_epsilon=get("norm_epsilon", 1e-5),
        rotary_base=float(get("rotary_base", 10000)),
        use_rope_scaling=bool(get("use_rope_scaling", False)),
        rope_scaling_factor=float(get("rope_scaling_factor", 8.0)),
        qk_layernorm=bool(get("qk_layernorm", False)),
        add_qkv_bias=bool(get("add_qkv_bias", False)),
        untie_embeddings_and_output_weights=bool(get("untie_embeddings_and_output_weights", False)),
        num_experts=num_experts,
        moe_router_topk=get("moe_router_topk", 2),
        moe_ffn_hidden_size=(get("moe_ffn_hidden_size") or arguments["ffn_hidden_size"]) if num_experts else None,
        moe_router_pre_softmax=bool(get("moe_router_pre_softmax", False)),
        moe_aux_loss_coeff=float(coefficients[0] if isinstance(coefficients, (list, tuple)) else coefficients),
    )


def check_expressible(arguments: Mapping[str, Any], where: str) -> None:
    """Raises IncompatibleInputs for a saved argument that makes the model another function than any family here."""
    for name, wanted in _REQUIRED.items():
        if arguments.get(name, wanted) != wanted:
            raise IncompatibleInputs(
                f"{where}: was trained with {name} {arguments[name]!r}; the supported families ({', '.join(FAMILIES)}) have "
                f"{wanted!r}."
            )
    for name, value in model_function(arguments).items():
        if name in PLAIN and name not in _MAPPED and value != PLAIN[name]:
            raise IncompatibleInputs(
                f"{where}: was trained with {name} {value!r}, which the supported families ({', '.join(FAMILIES)}) cannot "
                f"express; they are what {name} {PLAIN[name]!r} means. Exported, it would be another model."
            )


def _number(config: Mapping[str, Any], name: str, where: str, default: int | None = None) -> int:
    """default: what null and an absent key mean; None: they are refused."""
    value = config.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{where}: config.json has {name} {value!r}, expected a number of 1 or more.")
    return value


def _real(
    config: Mapping[str, Any], name: str, where: str, default: float | None = None, *, least: float = sys.float_info.min
) -> float:
    value = default if config.get(name) is None else config[name]
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value <= sys.float_info.max:
        raise ConfigError(f"{where}: config.json has {name} {value!r}, expected a positive number{'' if least else ', or 0'}.")
    return float(value)


def _rope(config: Mapping[str, Any], where: str) -> tuple[float, float | None]:
    """(base, factor of Llama 3's scaling or None), from the old keys or the new `rope_parameters`."""
    said = [_rope_section(config, name, where) for name in ("rope_parameters", "rope_scaling") if config.get(name)]
    if said and said[0] != said[-1]:
        raise ConfigError(
            f"{where}: config.json has rope_parameters {config['rope_parameters']} and rope_scaling {config['rope_scaling']}, "
            "expected one of them, or both to mean the same. Delete the one that the model was not trained with."
        )
    base, scaling = said[0] if said else (_real(config, "rope_theta", where, 10000.0), None)
    if scaling is None:
        return base, None
    if scaling["rope_type"] != "llama3" or any(
        not math.isclose(_real(scaling, k, where, v), v) for k, v in _LLAMA3_ROPE.items()
    ):
        raise IncompatibleInputs(
            f"{where}: config.json scales RoPE as {scaling}; Megatron's --use-rope-scaling has only "
            f"llama3 with {_LLAMA3_ROPE} and any factor. Extend the context after pre-training, from a base without scaling."
        )
    return base, _real(scaling, "factor", where)


def _rope_section(config: Mapping[str, Any], name: str, where: str) -> tuple[float, dict[str, Any] | None]:
    """(base, scaling with its rope_type or None for none) that one of the two sections means."""
    section = config[name]
    if not isinstance(section, Mapping):
        raise ConfigError(f"{where}: config.json has {name} {section!r}, expected a JSON object or null.")
    scaling = dict(section)
    base = _real(scaling if scaling.get("rope_theta") is not None else config, "rope_theta", where, 10000.0)
    scaling.pop("rope_theta", None)
    old = scaling.pop("type", "default")
    kind = scaling.pop("rope_type", old)
    if any(isinstance(value, Mapping) for value in scaling.values()):
        raise IncompatibleInputs(f"{where}: config.json has {name} {section}; layers that differ in RoPE are not supported.")
    if (share := scaling.pop("partial_rotary_factor", None)) not in (None, 1):
        raise IncompatibleInputs(f"{where}: config.json has partial_rotary_factor {share!r}; only 1.0 is supported.")
    return base, None if kind == "default" else {"rope_type": kind} | dict(sorted(scaling.items()))


def _refuse_unsupported(config: Mapping[str, Any], family: Family, where: str) -> None:
    expected: dict[str, Any] = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
        "partial_rotary_factor": 1.0,
        "quantization_config": None,
    }
    if family.moe:
        expected |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "shared_expert_intermediate_size": None}
    for name, wanted in expected.items():
        found = wanted if config.get(name) is None else config[name]
        if found != wanted:
            raise IncompatibleInputs(
                f"{where}: config.json has {name} {found!r}; only {wanted!r} is supported for {family.model_type}."
            )
    if unlike := [kind for kind in config.get("layer_types") or () if kind != "full_attention"]:
        raise IncompatibleInputs(f"{where}: config.json has layers of {unlike[0]!r}; only 'full_attention' is supported.")
    if own := [name for name in config.get("auto_map") or () if str(name).startswith("AutoModel")]:
        raise IncompatibleInputs(
            f"{where}: config.json names code of the folder's own for the model (auto_map, {own[0]}), which is never run: "
            f"whether it is a {family.model_type} cannot be known. Take auto_map away if transformers' own class is meant."
        )
