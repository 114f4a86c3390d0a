"""A Hugging Face folder becomes a Megatron distributed checkpoint: a `release` that loads with a plain --load."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_demix.artifact import hash_file
from megatron_demix.checkpoint.archive import write_archive
from megatron_demix.checkpoint.common_state import new_common_state
from megatron_demix.checkpoint.output import Output, is_published, resolved
from megatron_demix.checkpoint.pickles import write_pickle
from megatron_demix.checkpoint.writer import CopiedItem, TensorItem, metadata_files, place
from megatron_demix.errors import ConfigError, IncompatibleInputs, storage_errors
from megatron_demix.huggingface.config import ModelArguments, from_huggingface, read_config
from megatron_demix.huggingface.folder import COMPANIONS, HuggingFaceFolder, companions, copy_companions
from megatron_demix.huggingface.names import MOE_NORMS, Parameter, extra_state_keys, fuse, parameters, part_shapes, stack_shape
from megatron_demix.progress import progress_bar

PROVENANCE = "demix_import.json"
TransformerImpl = Literal["transformer_engine", "local"]
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Layout:
    """What the checkpoint is cut and padded for; it loads at any other layout too."""

    tensor: int = 1
    pipeline: int = 1
    make_vocab_size_divisible_by: int = 128

    def padded_vocab_size(self, vocab_size: int) -> int:
        """As Megatron-LM pads it."""
        multiple = self.make_vocab_size_divisible_by * self.tensor
        return -(-vocab_size // multiple) * multiple


def import_folder(
    source: Path,
    output: Path,
    *,
    layout: Layout | None = None,
    transformer_impl: TransformerImpl = "transformer_engine",
    progress: bool = True,
) -> ModelArguments:
    """Write output/{release/, latest_checkpointed_iteration.txt, huggingface/} and return the model's arguments.

    Elements keep their type and bits. Rows that pad the vocabulary are zero: until they are trained, they take part in the
    softmax with a logit of 0. huggingface/ holds config.json and the tokenizer.
    layout: how chunks are cut, so that ranks of that layout read no more than they need. transformer_impl: whose names
    the norm before experts has; dense models are the same for both. One slice of a tensor is in memory at a time.

    Raises ConfigError, IncompatibleInputs, CorruptInput, OutputExists, StorageError; nothing is then at `output`.
    """
    source, output, layout = Path(source), resolved(output), layout or Layout()
    model = from_huggingface(read_config(source), str(source))
    _check_layout(model, layout)
    folder = HuggingFaceFolder(source)
    table = parameters(model, moe_norm=MOE_NORMS[transformer_impl])
    dtypes = _check_tensors(folder, table, model)
    provenance = {
        "format": 2,  # 1 had no extra states of norms
        "source": {file.name: hash_file(file) for file in [*folder.files, *companions(source)]},
        "layout": vars(layout) | {"transformer_impl": transformer_impl},
    }
    if is_published(output, "release", provenance, PROVENANCE):
        return model
    items = [item for parameter in table for item in _items(parameter, dtypes[parameter.key], model, layout)]
    objects = [CopiedItem(key, memoryview(_EMPTY_STATE)) for key in extra_state_keys(model)]
    placements = place([*items, *objects])
    common = new_common_state(_arguments(model, layout, dtypes), 0)
    out = Output(output, "release", PROVENANCE)
    try:
        with storage_errors(f"writing {output}"):
            output.parent.mkdir(parents=True, exist_ok=True)
            out.create(placements)
            (out.temporary / COMPANIONS).mkdir()
            copy_companions(source, out.temporary / COMPANIONS)
            crcs = []
            arrays = _chunks(folder, table, model, layout)
            total = sum(item.num_bytes for item in items)
            with progress_bar(f"importing {source.name}", total, unit="bytes", enabled=progress) as advance:
                for placement, array in zip(placements, arrays, strict=False):
                    crcs.append(out.write_elements(placement, array))
                    advance(array.nbytes)
        out.complete(placements, crcs)
        out.finish()
        out.seal(placements, common, provenance, "release", metadata_files(placements))
        out.publish()
    except BaseException:
        out.discard()
        raise
    return model


# torch.save([None]): the extra state of a layer that has none, as Megatron writes it.
_EMPTY_STATE = write_archive(
    {"archive/byteorder": b"little", "archive/version": b"3\n", "archive/data.pkl": write_pickle([None])}
)


def _check_layout(model: ModelArguments, layout: Layout) -> None:
    if layout.tensor < 1 or layout.pipeline < 1 or layout.make_vocab_size_divisible_by < 1:
        raise ConfigError(f"layout {vars(layout)}: expected numbers of 1 or more.")
    if model.num_attention_heads % layout.tensor:
        raise ConfigError(f"--tensor {layout.tensor} does not divide the model's {model.num_attention_heads} attention heads.")
    if model.num_layers % layout.pipeline:
        raise ConfigError(f"--pipeline {layout.pipeline} does not divide the model's {model.num_layers} layers.")


def _check_tensors(folder: HuggingFaceFolder, table: list[Parameter], model: ModelArguments) -> dict[str, str]:
    """The dtype of every parameter. Raises IncompatibleInputs where names, shapes or types are not what config.json says."""
    dtypes: dict[str, str] = {}
    expected: set[str] = set()
    for parameter in table:
        shapes = part_shapes(parameter, model)
        found = set()
        for at in np.ndindex(*stack_shape(parameter, model)):
            for name, shape in zip(parameter.names(at), shapes, strict=True):
                dtype, stored = folder.describe(name)
                if stored != shape:
                    raise IncompatibleInputs(
                        f"{folder.path}: {name!r} has shape {list(stored)}, but config.json makes it {list(shape)}."
                    )
                found.add(dtype)
                expected.add(name)
        if len(found) > 1:
            raise IncompatibleInputs(
                f"{folder.path}: the tensors that make {parameter.key!r} have several types ({', '.join(sorted(found))})."
            )
        dtypes[parameter.key] = found.pop()
    unknown = {n for n in folder.names - expected if not n.endswith("rotary_emb.inv_freq")}
    if not model.untie_embeddings_and_output_weights and _HEAD in unknown:  # some files repeat the tied embedding
        if folder.describe(_HEAD) != folder.describe(_EMBEDDING) or not _same_bits(folder.read(_HEAD), folder.read(_EMBEDDING)):
            raise IncompatibleInputs(
                f"{folder.path}: config.json ties {_HEAD!r} to {_EMBEDDING!r}, but their weights differ, and transformers 5 "
                "does not tie them then. Set tie_word_embeddings: false in config.json."
            )
        unknown.discard(_HEAD)
    if unknown:
        raise IncompatibleInputs(
            f"{folder.path}: its weights have {len(unknown)} tensors that a {model.family.model_type} model has not, such as "
            f"{sorted(unknown)[0]!r}. Converting without them would give another model."
        )
    return dtypes


def _same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    return np.array_equal(left.view(np.uint8), right.view(np.uint8))


def _padded(parameter: Parameter, layout: Layout) -> tuple[int, ...]:
    if not parameter.vocabulary:
        return parameter.shape
    return (layout.padded_vocab_size(parameter.shape[0]), *parameter.shape[1:])


def _boxes(parameter: Parameter, layout: Layout) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offset, shape) of the chunks of one slice: what each tensor-parallel rank holds of it."""
    shape = _padded(parameter, layout)
    axis = parameter.parallel_axis
    parts = layout.tensor * (2 if parameter.fusion == "gate_up" else 1)
    if axis is None or shape[axis] % parts:
        return [((0,) * len(shape), shape)]
    edges = [shape[axis] * i // parts for i in range(parts + 1)]
    return [
        (
            tuple(a if d == axis else 0 for d in range(len(shape))),
            tuple(b - a if d == axis else n for d, n in enumerate(shape)),
        )
        for a, b in itertools.pairwise(edges)
    ]


def _items(parameter: Parameter, dtype: str, model: ModelArguments, layout: Layout) -> Iterator[TensorItem]:
    stack = stack_shape(parameter, model)
    for at in np.ndindex(*stack_shape(parameter, model)):
        for offset, shape in _boxes(parameter, layout):
            global_shape = (*stack, *_padded(parameter, layout))
            yield TensorItem(parameter.key, dtype, global_shape, (*at, *offset), ((1,) * len(at)) + shape)


def _chunks(folder: HuggingFaceFolder, table: list[Parameter], model: ModelArguments, layout: Layout) -> Iterator[np.ndarray]:
    """The elements of every item, in the items' order."""
    for parameter in table:
        rows = _padded(parameter, layout)[0]
        for at in np.ndindex(*stack_shape(parameter, model)):
            fused = fuse(parameter, [folder.read(name) for name in parameter.names(at)], model)
            if rows > fused.shape[0]:
                fused = np.concatenate([fused, np.zeros((rows - fused.shape[0], *fused.shape[1:]), fused.dtype)])
            for offset, shape in _boxes(parameter, layout):
                yield fused[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]


def _arguments(model: ModelArguments, layout: Layout, dtypes: dict[str, str]) -> dict[str, Any]:
    dtype = dtypes["embedding.word_embeddings.weight"]
    return model.megatron() | {
        "seq_length": model.max_position_embeddings,
        "make_vocab_size_divisible_by": layout.make_vocab_size_divisible_by,
        "padded_vocab_size": layout.padded_vocab_size(model.vocab_size),
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "ckpt_format": "torch_dist",
        "consumed_train_samples": 0,
        "skipped_train_samples": 0,
        "consumed_valid_samples": 0,
    }
