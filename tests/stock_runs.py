"""Runs of every kind a study can ask for, whose arguments Megatron-LM has to know and accept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_demix.study.training import ModelSpec, ParallelSpec, TrainSpec
from megatron_demix.train.job import TrainJob

DENSE = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4}
RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "dense": {},
    "grouped queries, Llama 3's RoPE": {
        "model": {"num_query_groups": 2, "use_rope_scaling": True, "qk_layernorm": True, "kv_channels": 32}
    },
    "GPT-2": {
        "model": {
            "normalization": "LayerNorm",
            "swiglu": False,
            "position_embedding_type": "learned_absolute",
            "add_bias_linear": True,
            "add_qkv_bias": True,
            "hidden_dropout": 0.1,
            "untie_embeddings_and_output_weights": True,
        },
        "train": {"precision": "fp32"},
    },
    "every parallelism": {
        "parallel": {"tensor": 2, "pipeline": 2, "data": 2, "context": 2, "sequence_parallel": True},
        "train": {"use_distributed_optimizer": True, "recompute_granularity": "full", "lr_decay_style": "WSD"},
    },
    "experts": {
        "model": {"num_experts": 4, "moe_ffn_hidden_size": 64, "moe_router_pre_softmax": True},
        "parallel": {"data": 4, "expert": 4},
    },
}


def stock_run(kind: str, folder: Path, blend: list[tuple[Path, float]] | None = None) -> TrainJob:
    sections = RUNS[kind]
    return TrainJob(
        name=kind,
        seed=1,
        model=ModelSpec(**DENSE | sections.get("model", {})),
        parallel=ParallelSpec(**sections.get("parallel", {})),
        train=TrainSpec(**{"seq_length": 64, "global_batch_size": 8} | sections.get("train", {})),
        train_iters=20,
        vocab_size=257,
        eod_id=256,
        blend=blend or [(folder / "a", 0.3), (folder / "b", 0.7)],
        work=folder / "work",
        index_cache=folder / "index",
        tensorboard=folder / "tensorboard",
        heartbeat=folder / "heartbeat",
    )
