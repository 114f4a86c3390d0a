"""run_config.yaml, which Megatron-Bridge keeps in each checkpoint: from it alone it builds the model, to go on training it or
to export it for Hugging Face. What Megatron-LM saves as its arguments, Bridge says there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_demix.checkpoint.common_state import model_arguments, read_common_state
from megatron_demix.checkpoint.layout import CheckpointDir, unreadable
from megatron_demix.checkpoint.reader import Checkpoint
from megatron_demix.errors import CorruptInput

RUN_CONFIG = "run_config.yaml"

# A merged checkpoint has neither, and whoever loads it as an iteration asks here whether to expect them.
_NOT_SAVED = ("save_optim", "save_rng")

_WHAT_TO_DO = "Correct it, or take it away and go without what it says of the model."

# Fields of Bridge's models that Megatron-LM's arguments call otherwise (or, for newer ones, model_function.py).
_ARGUMENTS = {
    "num_moe_experts": "num_experts",
    "rope_scaling": "use_rope_scaling",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
}


def saved_arguments(checkpoint: Checkpoint, state: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Megatron's arguments of the model: as Megatron-LM saves them in the common state, or else what Bridge says of it; {}
    where there is neither. state: the common state, where it was read. Raises as read_common_state does, and CorruptInput."""
    arguments = model_arguments(read_common_state(checkpoint) if state is None else state)
    return arguments or _model(_read(checkpoint.location) or {})


def merged_run_config(location: CheckpointDir, dtype: str | None = None) -> bytes | None:
    """The file for a merged checkpoint, of its first component's; None where that has none. dtype: that tensors are written in,
    if it may not be what the file says. Raises CorruptInput."""
    config = _read(location)
    if config is None:
        return None
    import yaml

    if "checkpoint" in config:
        config["checkpoint"] |= dict.fromkeys(_NOT_SAVED, False)
    if dtype is not None:
        model = config.get("model", {})
        named = {"_target_": f"torch.{dtype}", "_call_": False}
        precision = {"bf16": dtype == "bfloat16", "fp16": dtype == "float16", "params_dtype": named, "pipeline_dtype": named}
        for section in (model, model.get("transformer")):
            if isinstance(section, dict):
                section |= {name: value for name, value in precision.items() if section.get(name) is not None}
    return yaml.safe_dump(config, sort_keys=False).encode()


def _read(location: CheckpointDir) -> dict[str, Any] | None:
    path = location.path / RUN_CONFIG
    if not path.is_file():
        return None
    import yaml

    try:
        config = yaml.safe_load(path.read_bytes())
    except OSError as e:
        raise unreadable(path, e) from e
    except (yaml.YAMLError, ValueError, RecursionError) as e:  # a date that is none is a ValueError
        raise CorruptInput(f"{path}: cannot be read ({getattr(e, 'problem', None) or e}). {_WHAT_TO_DO}") from e
    if not isinstance(config, dict) or not all(isinstance(config.get(name, {}), dict) for name in ("checkpoint", "model")):
        raise CorruptInput(f"{path}: not a run's configuration. {_WHAT_TO_DO}")
    return config


def _model(config: Mapping[str, Any]) -> dict[str, Any]:
    """The section `model` in the words of Megatron's arguments: all fields side by side or, of newer versions, those of the
    transformer in a section of their own."""
    fields: dict[str, Any] = dict(config.get("model", {}))
    transformer = fields.pop("transformer", None)
    if isinstance(transformer, dict):
        fields = transformer | fields
    found: dict[str, Any] = {_ARGUMENTS.get(name, name): value for name, value in fields.items()}
    if not found:
        return {}
    if isinstance(shared := found.pop("share_embeddings_and_output_weights", None), bool):
        found["untie_embeddings_and_output_weights"] = not shared
    found["group_query_attention"] = found.get("num_query_groups") is not None
    gated, activation = found.get("gated_linear_unit"), found.pop("activation_func", None)
    name = activation.get("_target_") if isinstance(activation, dict) else activation
    if isinstance(gated, bool) and isinstance(name, str):
        kind = name.rpartition(".")[2]
        found["swiglu"] = gated and kind == "silu"
        found["quick_geglu"] = gated and kind == "quick_gelu"
        found["squared_relu"] = not gated and kind == "squared_relu"
    return found
