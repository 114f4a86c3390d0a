"""Pickled objects of a model's layers (`_extra_state`). Megatron runs what they name when it loads a checkpoint, so they are
looked at, and none is carried into another checkpoint that names more than layers have."""

from __future__ import annotations

import pickletools
from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_demix.checkpoint.archive import read_archive
from megatron_demix.checkpoint.dtypes import ITEM_BYTES
from megatron_demix.checkpoint.pickles import inert, ordered_dict, plain_tuple, read_pickle
from megatron_demix.errors import CorruptInput, UnsafeInput


def _encoded(text: str, encoding: str) -> bytes:
    """_codecs.encode: bytes, as pickles of protocol 2 have them."""
    return text.encode("latin1") if encoding == "latin1" else b""


_NAMES: dict[str, Any] = {
    **{f"torch.{name}": name for name in ITEM_BYTES},
    **{
        name: inert(name)
        for name in (
            *("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "torch.device", "_io.BytesIO"),
            *(f"torch.{kind}Storage" for kind in ("Byte", "Char", "Short", "Int", "Long", "Bool")),
            *(f"torch.{kind}Storage" for kind in ("Half", "BFloat16", "Float", "Double", "Untyped")),
            *("torch.storage.UntypedStorage", "torch.storage.TypedStorage"),
        )
    },
    "torch.Size": plain_tuple,
    "collections.OrderedDict": ordered_dict,
    "_codecs.encode": _encoded,
}
_ARCHIVE = b"PK\3\4"
_LEGACY = 5
"""Pickles in a torch.save file of the old kind, in front of the elements: magic number, version, system, object, storages."""


def check_object(blob: np.ndarray, what: str) -> None:
    """Raises UnsafeInput where a pickle in a torch.save archive names anything else, or tensors hold what may be a pickle and
    cannot be told, CorruptInput where it is no archive."""
    for name, (data, _) in read_archive(blob, what).items():
        if name.endswith("/data.pkl"):
            read_pickle(data.tobytes(), _NAMES, what, persistent=lambda pid: None)
        elif "/data/" in name and data.nbytes:
            _check_elements(data.tobytes(), what)


def _check_elements(data: bytes, what: str) -> None:
    """Of a tensor: Transformer Engine keeps a pickle, or an archive, in one of bytes, and unpickles that."""
    if data.startswith(_ARCHIVE):
        check_object(np.frombuffer(data, np.uint8), what)
        return
    try:
        _check_pickles(data, 1, what)
    except UnsafeInput:
        raise
    except CorruptInput as e:
        raise UnsafeInput(
            f"{what}: refused, it holds a tensor of {len(data)} bytes that is neither a pickle nor an archive, so that nobody "
            "can tell what a layer makes of it. Save the checkpoint without it."
        ) from e


def _check_pickles(data: bytes, number: int, what: str) -> None:
    """The first ones of several, one behind the other."""
    for _ in range(number):
        try:
            *_, (_, _, last) = pickletools.genops(data)
        except Exception as e:  # a damaged stream can make it raise almost anything
            raise CorruptInput(f"{what}: a pickle within it is damaged ({type(e).__name__}: {str(e)[:200]}).") from e
        end = (last or 0) + 1
        read_pickle(data[:end], _INNER, what, persistent=lambda pid: None, other=lambda full: _inner(full, what))
        data = data[end:]


def _inner(name: str, what: str) -> Any:
    if name.startswith("transformer_engine."):
        return inert(name)
    raise UnsafeInput(
        f"{what}: refused, a pickle within it names {name[:200]!r}, which has no place there. Nothing was executed. Do not "
        "load this checkpoint with other tools before you know where it comes from."
    )


def _storage(data: bytes) -> None:
    """torch.storage._load_from_bytes: a file of torch.save within a pickle."""
    what = "a tensor within an extra state"
    if data.startswith(_ARCHIVE):
        check_object(np.frombuffer(data, np.uint8), what)
    else:
        _check_pickles(data, _LEGACY, what)


_INNER: Mapping[str, Any] = _NAMES | {"torch.storage._load_from_bytes": _storage}
