"""What a model computes from its weights, and how large they are, as Megatron's saved arguments say it.

Most of it does not show in the weights' names and shapes: checkpoints that fit each other may be different functions. Left out
is what only training or the makeup of a batch decides (dropout, auxiliary losses, capacities), what is a matter of precision,
and what always shows in names and shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EMBEDDING = "embedding.word_embeddings.weight"
"""The tensor that every GPT model has, with a row for each id."""
# With these, saved arguments describe a model, and an argument that is not among them has its plain value.
DESCRIBING = frozenset({"num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "seq_length"})

PLAIN: dict[str, Any] = {
    "multi_latent_attention": False,
    "experimental_attention_variant": None,
    "linear_attention_freq": None,
    "attention_output_gate": False,
    "softmax_scale": None,
    "softmax_type": "vanilla",
    "qk_layernorm": False,
    "qk_l2_norm": False,
    "window_size": None,
    "window_attn_skip_freq": None,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": 1,
    "use_rope_scaling": False,
    "no_rope_freq": None,
    "mrope_section": None,
    "apply_layernorm_1p": False,
    "apply_residual_connection_post_layernorm": False,
    "enable_mhc_connections": False,
    "use_mup": False,
    "quick_geglu": False,
    "squared_relu": False,
    "openai_gelu": False,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "moe_router_pre_softmax": False,
    "moe_router_score_function": "softmax",
    "moe_router_topk_scaling_factor": 1.0,
    "moe_router_enable_expert_bias": False,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_router_topk_limited_devices": None,
    "moe_router_force_load_balancing": False,
    "moe_router_force_biased": None,
    "moe_apply_probs_on_input": False,
    "moe_mlp_glu_interleave_size": None,
    "moe_shared_expert_glu_interleave_size": None,
    "moe_router_load_balancing_type": "aux_loss",
}
"""Arguments with a value that adds nothing to an ordinary transformer; None always means it."""

_SIZES = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_experts", "moe_ffn_hidden_size"),
    "untie_embeddings_and_output_weights",
)

# Those that every model has a value of its own for.
_OWN = (
    *("num_attention_heads", "num_query_groups", "kv_channels", "position_embedding_type", "rotary_base"),
    *("rope_scaling_factor", "normalization", "norm_epsilon", "swiglu", "moe_router_topk"),
    *("qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "rope_type", "rotary_scaling_factor"),
    *("original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    *("yarn_original_max_position_embeddings", "yarn_beta_fast", "yarn_beta_slow", "yarn_correction_range_round_to_int"),
    *("dsa_indexer_topk", "dsa_indexer_n_heads", "dsa_indexer_head_dim", "dsa_indexer_topk_freq"),
    *("dsa_indexer_skip_topk_offset", "dsa_indexer_rope_interleaved", "dsa_indexer_rotate_activation"),
    *("dsa_indexer_scoring_relu", "dsa_indexer_k_norm_epsilon"),
    *("linear_key_head_dim", "linear_value_head_dim", "linear_num_key_heads", "linear_num_value_heads"),
    *("mup_width_mult", "mup_embedding_mult", "mup_output_mult", "mup_base_hidden_size", "mup_base_head_dim"),
    *("mup_attn_scale_power", "mhc_num_residual_streams", "mhc_sinkhorn_iterations"),
    *("mamba_state_dim", "mamba_head_dim", "mamba_num_groups", "gdp_num_householder"),
)

# Arguments that count only where one of others is set: beginnings of their names.
_COUNT_WITH = (
    (("num_query_groups",), ("group_query_attention",)),
    (("window_attn_skip_freq",), ("window_size",)),
    (("rope_scaling_factor",), ("use_rope_scaling",)),
    (("moe_",), ("num_experts",)),
    (("qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "rope_type"), ("multi_latent_attention",)),
    (("rotary_scaling_factor", "original_max_", "beta_", "mscale", "yarn_"), ("multi_latent_attention", "yarn")),
    (("dsa_", "linear_"), ("experimental_attention_variant", "linear_attention_freq")),
    (("mup_",), ("use_mup",)),
    (("mhc_",), ("enable_mhc_connections",)),
    (("mamba_", "gdp_"), ("is_hybrid_model", "hybrid_override_pattern", "hybrid_layer_pattern")),
)

# Names since Megatron-LM generates arguments from its configuration classes.
_RENAMED = {"layernorm_epsilon": "norm_epsilon", "layernorm_zero_centered_gamma": "apply_layernorm_1p"}


def by_known_names(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, with those that newer versions of Megatron-LM save under other names under the names used here."""
    return {_RENAMED.get(name, name): value for name, value in arguments.items()}


def model_function(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What the saved arguments say of the function, by argument; without what does not count, and what they do not say."""
    said = by_known_names(arguments)
    # Of the ways (one, or a list) to balance experts, this one alone also routes otherwise.
    sinkhorn = "sinkhorn" in str(said.pop("moe_router_load_balancing_type", None))
    said |= {"moe_router_load_balancing_type": "sinkhorn"} if sinkhorn else {}
    said["yarn"] = said.get("position_embedding_type") == "yarn"
    whole = said.keys() >= DESCRIBING
    found = {}
    for name, plain in (PLAIN | dict.fromkeys(_OWN)).items():
        value = plain if said.get(name) is None else said[name]
        known = name in said or (whole and name in PLAIN)
        if known and _counts(name, said) and (value is not None or name in PLAIN):
            found[name] = tuple(value) if isinstance(value, list) else value
    return found


def model_sizes(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What the saved arguments say of the names and shapes of the weights, by argument; without what does not count. Empty
    where they describe no model."""
    if not arguments.keys() >= DESCRIBING:
        return {}
    found = {name: arguments[name] for name in _SIZES if name in arguments}
    width, of_experts = found.pop("ffn_hidden_size"), found.pop("moe_ffn_hidden_size", None)
    return found | ({"moe_ffn_hidden_size": of_experts or width} if found.get("num_experts") else {"ffn_hidden_size": width})


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """What `theirs` says of the function, in which it is another one than `ours`, by argument. What one of them does not say is
    not compared."""
    return {name: theirs[name] for name in ours if name in theirs and theirs[name] != ours[name]}


def _counts(name: str, said: Mapping[str, Any]) -> bool:
    for names, needed in _COUNT_WITH:
        if name.startswith(names) and name not in needed:
            return any(said.get(other) for other in needed)
    return True
