"""The weights of a Hugging Face folder: safetensors files, one or many with an index."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_demix.artifact import read_json
from megatron_demix.checkpoint.dtypes import ARRAY_DTYPES
from megatron_demix.errors import ConfigError, CorruptInput, IncompatibleInputs

COMPANIONS = "huggingface"
"""The folder beside an imported checkpoint that keeps what is not weights."""

_ONE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# safetensors' names of the types that are converted.
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# What belongs to a model beside its weights. Never .py files: nothing that comes along is ever run.
_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)


class HuggingFaceFolder:
    """A model's tensors by name; each is read when asked for. Nothing in the folder is executed."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError where the folder has no safetensors, CorruptInput where a shard is missing or damaged."""
        self.path = Path(path)
        self.files = self._files()
        self._opened = {file: _open(file) for file in self.files}
        self._file_of: dict[str, Path] = {}
        for file, opened in self._opened.items():
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                self._file_of[name] = file

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    def describe(self, name: str) -> tuple[str, tuple[int, ...]]:
        """(dtype, shape) of a tensor. Raises IncompatibleInputs if it is missing, or of a type that is not converted."""
        if name not in self._file_of:
            some = f"{len(self._file_of)} tensors, such as {', '.join(sorted(self._file_of)[:3])}"
            raise IncompatibleInputs(
                f"{self.path}: its weights have no {name!r}, which its config.json promises. They have "
                f"{some if self._file_of else 'no tensors at all'}."
            )
        entry = self._opened[self._file_of[name]].get_slice(name)
        if entry.get_dtype() not in _DTYPES:
            raise IncompatibleInputs(
                f"{self.path}: {name!r} is stored as {entry.get_dtype()}, expected one of {', '.join(_DTYPES)}. Quantised "
                "weights are not converted: take the model's bf16 weights."
            )
        return _DTYPES[entry.get_dtype()], tuple(entry.get_shape())

    def read(self, name: str) -> np.ndarray:
        """A whole tensor, as ARRAY_DTYPES says."""
        import torch

        dtype, _ = self.describe(name)
        tensor = self._opened[self._file_of[name]].get_tensor(name)
        return (tensor.view(torch.uint16) if dtype == "bfloat16" else tensor).numpy().astype(ARRAY_DTYPES[dtype], copy=False)

    def _files(self) -> list[Path]:
        if not self.path.is_dir():
            raise ConfigError(f"{self.path}: no such folder. Give a Hugging Face model folder on this machine.")
        if (index := self.path / _INDEX).is_file():
            try:
                named = sorted(set(read_json(index)["weight_map"].values()))
            except (KeyError, TypeError, AttributeError) as e:
                raise CorruptInput(f"{index}: not an index of safetensors files ({e!r}).") from e
            if outside := [name for name in named if not isinstance(name, str) or "/" in name]:
                raise CorruptInput(f"{index}: names {outside[0]!r}, expected names of files beside it. Put the files there.")
            if not named:
                raise CorruptInput(f"{index}: names no files. Finish the download.")
            if _ONE not in named and (self.path / _ONE).is_file():
                raise ConfigError(
                    f"{self.path}: holds two sets of weights, {_ONE} and the files that {_INDEX} names. Move one of them away, "
                    "the index with its files."
                )
            files = [self.path / name for name in named]
            if missing := [f.name for f in files if not f.is_file()]:
                raise CorruptInput(
                    f"{self.path}: {len(missing)} of the {len(files)} files that {_INDEX} names are missing, the first is "
                    f"{missing[0]}. Finish the download."
                )
            return files
        if (self.path / _ONE).is_file():
            return [self.path / _ONE]
        raise ConfigError(
            f"{self.path}: holds neither {_ONE} nor {_INDEX}. Weights in pickle files (.bin, .pt) are not read: save the model "
            "again with transformers' save_pretrained."
        )


def companions(folder: Path) -> list[Path]:
    """Configuration and tokenizer files of a Hugging Face folder."""
    return sorted({p for pattern in _COMPANIONS for p in Path(folder).glob(pattern) if p.is_file()})


def copy_companions(folder: Path, target: Path) -> None:
    """Copy them into an existing folder, durably."""
    for path in companions(folder):
        shutil.copyfile(path, target / path.name)
        with open(target / path.name, "rb") as file:
            os.fsync(file.fileno())


def _safetensors() -> Any:
    try:
        import safetensors
    except ImportError as e:
        raise ConfigError("safetensors is not installed: pip install 'megatron-demix[hf]'.") from e
    return safetensors


def _open(file: Path) -> Any:
    safetensors = _safetensors()
    try:
        return safetensors.safe_open(file, framework="pt")
    except (safetensors.SafetensorError, OSError) as e:
        raise CorruptInput(f"{file}: not a whole safetensors file ({e}).") from e


def write_weights(
    folder: Path, sizes: Mapping[str, int], tensors: Iterator[tuple[str, str, np.ndarray]], shard_bytes: int
) -> None:
    """Write safetensors files of at most about `shard_bytes`, one in memory at a time, and their index where there are several.

    sizes: bytes of every tensor, in the order of `tensors`, which yields (name, dtype, array). Raises OSError, and
    ConfigError where safetensors is not installed.
    """
    import torch

    safetensors = _safetensors()
    from safetensors.torch import save_file

    shards = _shards(sizes, shard_bytes)
    files = [_ONE] if len(shards) == 1 else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        held = {}
        for expected in names:
            name, dtype, array = next(tensors)
            assert name == expected
            tensor = torch.from_numpy(np.ascontiguousarray(array))
            held[name] = tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor
        try:
            save_file(held, folder / file, metadata={"format": "pt"})
        except safetensors.SafetensorError as e:
            # What the operating system said is in the text only: "I/O error: No space left on device (os error 28)".
            if not (code := re.search(r"\(os error (\d+)\)", str(e))):
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(folder / file)) from e
    if len(shards) > 1:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (folder / _INDEX).write_text(json.dumps(index, indent=1) + "\n")


def _shards(sizes: Mapping[str, int], shard_bytes: int) -> Sequence[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
