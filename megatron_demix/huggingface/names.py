"""The parameters of a model under both names, as one table, and how Megatron fuses what Hugging Face keeps apart.

Megatron stacks layers (and experts) in front: a layer's [rows, columns] is one slice of a global [L, rows, columns].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_demix.huggingface.config import ModelArguments

Shape = tuple[int, ...]
Fusion = Literal["one", "qkv", "gate_up"]

# Transformer Engine's layer spec names the norm before experts apart; the local spec saves it under the name it has in a dense
# layer.
MOE_NORMS = {"transformer_engine": "pre_mlp_layernorm.weight", "local": "mlp.linear_fc1.layer_norm_weight"}


@dataclass(frozen=True)
class Parameter:
    """One Megatron tensor (a layer's or an expert's slice of it) and the Hugging Face tensors it is made of.

    key: without the stacking. parts: names with {layer} and {expert} to fill in. shape: of one slice, unpadded. stacked: the
    leading axes of the global tensor, "layer" and "expert". parallel_axis: of the slice, which tensor parallelism cuts.
    """

    key: str
    parts: tuple[str, ...]
    shape: Shape
    stacked: tuple[str, ...] = ("layer",)
    fusion: Fusion = "one"
    parallel_axis: int | None = None
    vocabulary: bool = False

    def names(self, at: Sequence[int]) -> list[str]:
        """Hugging Face's names of the parts of the slice at a position along the stacked axes."""
        place = dict(zip(self.stacked, at, strict=True))
        return [part.format(**place) for part in self.parts]


def parameters(model: ModelArguments, *, moe_norm: str = MOE_NORMS["transformer_engine"]) -> list[Parameter]:
    """Every parameter of the model, in the order of the layers' computation.

    moe_norm: one of MOE_NORMS.
    """
    hidden, heads, groups, head = model.hidden_size, model.num_attention_heads, model.num_query_groups, model.kv_channels
    qkv_rows = (heads + 2 * groups) * head
    attention, layer = "decoder.layers.self_attention.", "model.layers.{layer}."
    qkv = tuple(f"{layer}self_attn.{name}_proj." for name in "qkv")
    table = [
        Parameter("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), (model.vocab_size, hidden), (),
                  parallel_axis=0, vocabulary=True),
        Parameter(f"{attention}linear_qkv.layer_norm_weight", (f"{layer}input_layernorm.weight",), (hidden,)),
        Parameter(f"{attention}linear_qkv.weight", tuple(f"{p}weight" for p in qkv), (qkv_rows, hidden), fusion="qkv",
                  parallel_axis=0),
    ]  # fmt: skip
    if model.add_qkv_bias:
        bias = tuple(f"{p}bias" for p in qkv)
        table.append(Parameter(f"{attention}linear_qkv.bias", bias, (qkv_rows,), fusion="qkv", parallel_axis=0))
    if model.qk_layernorm:
        for name in "qk":
            table.append(Parameter(f"{attention}{name}_layernorm.weight", (f"{layer}self_attn.{name}_norm.weight",), (head,)))
    table.append(
        Parameter(
            f"{attention}linear_proj.weight", (f"{layer}self_attn.o_proj.weight",), (hidden, heads * head), parallel_axis=1
        )
    )
    norm = (f"{layer}post_attention_layernorm.weight",)
    if model.num_experts is None:
        table.append(Parameter("decoder.layers.mlp.linear_fc1.layer_norm_weight", norm, (hidden,)))
        table += _mlp("decoder.layers.mlp.", f"{layer}mlp.", hidden, model.ffn_hidden_size, ("layer",))
    else:
        assert model.moe_ffn_hidden_size is not None
        experts, their_names = "decoder.layers.mlp.experts.experts.", f"{layer}mlp.experts.{{expert}}."
        table.append(Parameter(f"decoder.layers.{moe_norm}", norm, (hidden,)))
        table.append(Parameter("decoder.layers.mlp.router.weight", (f"{layer}mlp.gate.weight",), (model.num_experts, hidden)))
        table += _mlp(experts, their_names, hidden, model.moe_ffn_hidden_size, ("layer", "expert"))
    table.append(Parameter("decoder.final_layernorm.weight", ("model.norm.weight",), (hidden,), ()))
    if model.untie_embeddings_and_output_weights:
        table.append(
            Parameter("output_layer.weight", ("lm_head.weight",), (model.vocab_size, hidden), (), parallel_axis=0,
                      vocabulary=True)
        )  # fmt: skip
    return table


def _mlp(key: str, name: str, hidden: int, width: int, stacked: tuple[str, ...]) -> list[Parameter]:
    gate_up = (f"{name}gate_proj.weight", f"{name}up_proj.weight")
    return [
        Parameter(f"{key}linear_fc1.weight", gate_up, (2 * width, hidden), stacked, fusion="gate_up", parallel_axis=0),
        Parameter(f"{key}linear_fc2.weight", (f"{name}down_proj.weight",), (hidden, width), stacked, parallel_axis=1),
    ]


def part_shapes(parameter: Parameter, model: ModelArguments) -> list[Shape]:
    """Shapes of the Hugging Face tensors that make one slice."""
    rest = parameter.shape[1:]
    if parameter.fusion == "qkv":
        heads, groups, head = model.num_attention_heads, model.num_query_groups, model.kv_channels
        return [(heads * head, *rest), (groups * head, *rest), (groups * head, *rest)]
    if parameter.fusion == "gate_up":
        return [(parameter.shape[0] // 2, *rest)] * 2
    return [parameter.shape]


def fuse(parameter: Parameter, parts: Sequence[np.ndarray], model: ModelArguments) -> np.ndarray:
    """One slice of the Megatron tensor. Queries, keys and values are interleaved by query group; gate and up are stacked."""
    if parameter.fusion == "qkv":
        by_group = [part.reshape(model.num_query_groups, -1, *part.shape[1:]) for part in parts]
        return np.concatenate(by_group, axis=1).reshape(parameter.shape)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def split(parameter: Parameter, fused: np.ndarray, model: ModelArguments) -> list[np.ndarray]:
    """The inverse of fuse."""
    if parameter.fusion == "qkv":
        rows, rest = model.kv_channels, fused.shape[1:]
        queries = model.num_attention_heads // model.num_query_groups * rows
        by_group = fused.reshape(model.num_query_groups, queries + 2 * rows, *rest)
        cuts = np.split(by_group, [queries, queries + rows], axis=1)
        return [part.reshape(-1, *rest) for part in cuts]
    return [fused] if parameter.fusion == "one" else np.split(fused, 2)


def extra_state_keys(model: ModelArguments) -> list[str]:
    """Keys of the (empty) extra states that Transformer Engine's layers ask for when they load, norms from its version 2 on.
    Megatron's loader stops where one is missing, and passes over those that nobody asks for."""
    layers = ["self_attention.core_attention", "self_attention.linear_qkv", "self_attention.linear_proj"]
    per_expert = model.num_experts is not None
    layers += ["self_attention.q_layernorm", "self_attention.k_layernorm"] if model.qk_layernorm else []
    layers += ["pre_mlp_layernorm"] if per_expert else []  # elsewhere it is a part of the layer behind it
    mlp = "mlp.experts.experts." if per_expert else "mlp."

    def shards(name: str, counts: Shape) -> list[str]:
        total = ".".join(map(str, counts))
        return [f"decoder.layers.{name}._extra_state/shard_{'.'.join(map(str, at))}_{total}" for at in np.ndindex(*counts)]

    fc_counts = (model.num_layers, model.num_experts) if model.num_experts else (model.num_layers,)
    keys = [key for name in layers for key in shards(name, (model.num_layers,))]
    keys += [key for name in ("linear_fc1", "linear_fc2") for key in shards(mlp + name, fc_counts)]
    return [*keys, "decoder.final_layernorm._extra_state/shard_0_1"]


def stack_shape(parameter: Parameter, model: ModelArguments) -> Shape:
    """Sizes of the axes in front of a parameter's slices."""
    sizes = {"layer": model.num_layers, "expert": model.num_experts or 0}
    return tuple(sizes[axis] for axis in parameter.stacked)
