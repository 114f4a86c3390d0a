"""Kinds of models that are trained in tests, and what a run has left."""

from pathlib import Path

from megatron_demix.artifact import hash_file

FAMILIES = {
    "qwen3": {"qk_layernorm": True, "untie_embeddings_and_output_weights": True, "add_qkv_bias": True},
    "gpt2": {
        "normalization": "LayerNorm",
        "swiglu": False,
        "position_embedding_type": "learned_absolute",
        "add_bias_linear": True,
        "num_query_groups": None,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
    },
    "moe": {"num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 32},
}


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): hash_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}
