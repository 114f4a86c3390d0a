"""Checkpoints that a user gives: what their weights are, for keys, and whether they are the study's model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_demix.checkpoint.common_state import check_loadable
from megatron_demix.checkpoint.digest import weights_digest
from megatron_demix.checkpoint.layout import find_checkpoint
from megatron_demix.checkpoint.model_function import EMBEDDING, differing, model_function, model_sizes
from megatron_demix.checkpoint.reader import Checkpoint
from megatron_demix.checkpoint.run_config import saved_arguments
from megatron_demix.errors import IncompatibleInputs
from megatron_demix.pipeline.inputs import InputDigests
from megatron_demix.study.study import Study
from megatron_demix.study.training import ModelSpec
from megatron_demix.train import derived


@dataclass(frozen=True)
class GivenCheckpoint:
    """path: the folder that holds `.metadata`; "" where it is missing, and may be. digest: of the model's tensors, wherever
    they lie. function, sizes: what the saved arguments say of it (model_function, model_sizes). rows, dtype: of its embedding,
    where it has one."""

    path: str
    digest: str
    function: Mapping[str, Any]
    sizes: Mapping[str, Any]
    rows: int | None
    dtype: str | None


def look_at(checkpoint: Path, digests: InputDigests) -> GivenCheckpoint:
    """What a checkpoint is; its path is as find_checkpoint takes it. Raises as Checkpoint does, unless the digests allow that
    it is gone."""

    def ask() -> dict[str, Any]:
        folder = find_checkpoint(checkpoint).path.resolve()
        files = sorted(file for file in folder.iterdir() if file.is_file())
        return {"path": str(folder), **digests.about(str(folder), files, lambda: _facts(folder), kind="checkpoint facts")}

    absent: dict[str, Any] = {"path": "", "digest": "absent", "function": {}, "sizes": {}, "rows": None, "dtype": None}
    return GivenCheckpoint(**digests.answer(str(checkpoint), ask, kind="checkpoints", absent=absent))


def _facts(folder: Path) -> dict[str, Any]:
    checkpoint = Checkpoint(folder, read_ahead=False)
    check_loadable(checkpoint)
    for key, location in checkpoint.model_objects.items():
        checkpoint.harmless_blob(location, key)  # stock Megatron-LM may be given this folder
    tensors, digest = checkpoint.model_tensors, weights_digest(checkpoint)
    arguments = saved_arguments(checkpoint)
    function, sizes = _as_json(model_function(arguments)), _as_json(model_sizes(arguments))
    embedding = tensors.get(EMBEDDING)
    rows, dtype = (embedding.shape[0], embedding.dtype) if embedding else (None, None)
    return {"digest": digest, "function": function, "sizes": sizes, "rows": rows, "dtype": dtype}


def check_precision(study: Study, base: str, dtype: str | None) -> None:
    """Raises IncompatibleInputs where proxies are merged from what components add to the base, and that is of another type than
    they will be. dtype: of the base's embedding."""
    trained = {"fp32": "float32", "bf16": "bfloat16"}[study.train.precision]
    if study.search.proxies == "merged" and study.merge.needs_base and dtype not in (None, trained):
        raise IncompatibleInputs(
            f"study {study.name!r}: the base {base} is {dtype}, and components are trained as {trained} (train.precision); "
            f"merge.method {study.merge.method} with these options subtracts one from the other, in one type. Give a base that "
            f"is {trained} (tools/merge_dist_ckpt.py CHECKPOINT:1 --dtype {study.train.precision} --output NEW writes it; "
            "tools/convert_hf.py import makes a checkpoint of a Hugging Face folder), set train.precision to its type, or "
            "merge without the base (method linear, no scale)."
        )


def check_function(study: Study, checkpoint: Path, found: GivenCheckpoint) -> None:
    """Raises IncompatibleInputs naming every setting of `model` with which the weights would be of other sizes, or another
    function than the one they were saved as. What the saved arguments do not say is not compared."""
    arguments = derived.model_arguments(study.model, study.train)
    ours = _as_json(model_sizes(arguments) | model_function(arguments))
    theirs = differing(ours, {**found.sizes, **found.function})
    if not theirs:
        return
    if study.model.kv_channels is None and theirs.keys() & {"hidden_size", "num_attention_heads"}:
        theirs.pop("kv_channels", None)  # follows from them
    known = {name: value for name, value in theirs.items() if name in ModelSpec.model_fields}
    said = [f"model.{name}: {value} (the study: {ours[name]})" for name, value in known.items()]
    said += [f"{name} {value}" for name, value in theirs.items() if name not in known]
    todo = "Set these." if known == theirs else "What has no `model.` before it, no model of a study can have."
    raise IncompatibleInputs(
        f"study {study.name!r}: checkpoint {checkpoint} is another model than the study's"
        f"{'' if theirs.keys() & found.sizes.keys() else ', which would make another function of its weights'}. "
        f"It has {', '.join(said)}. {todo}"
    )


def with_sizes_of_base(study: Study, root: Path, digests: InputDigests) -> Study:
    """The study with the embedding as large as that of base.checkpoint, so that nothing of it is cut off, and layers as wide,
    where the study does not say it. Raises ConfigError where tensor parallelism does not divide the embedding."""
    if study.base.checkpoint is None:
        return study
    found, model = look_at(root / study.base.checkpoint, digests), study.model
    if found.rows is not None and model.padded_vocab_size is None:
        model = model.model_copy(update={"padded_vocab_size": found.rows})
        derived.padded_vocab_size(model, study.parallel, found.rows)
    default = model_sizes(derived.model_arguments(model, study.train))
    for name in ("ffn_hidden_size", "moe_ffn_hidden_size"):
        width = found.sizes.get(name)
        # The default is not spelled out: it is in keys, and a base of that width is no other one for it.
        if width is not None and getattr(model, name) is None and default.get(name, width) != width:
            model = model.model_copy(update={name: width})
    return study.model_copy(update={"model": model})


def _as_json(function: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from a JSON file."""
    return json.loads(json.dumps(function, default=str))
