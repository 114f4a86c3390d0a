"""Pickled objects of a model's layers (`_extra_state`). Megatron runs what they name when it loads a checkpoint, so they are
looked at, and none is carried into another checkpoint that names more than layers have."""

from __future__ import annotations

import itertools
import math
import operator
import pickletools
from contextlib import suppress
from typing import Any

import numpy as np

from megatron_demix.checkpoint.archive import read_archive
from megatron_demix.checkpoint.dtypes import ITEM_BYTES
from megatron_demix.checkpoint.pickles import RUNNING, Inert, enum_member, inert, ordered_dict, plain_tuple, read_pickle
from megatron_demix.errors import CorruptInput, UnsafeInput

_ARCHIVE = b"PK\3\4"
_LEGACY = 5
"""Pickles in a torch.save file of the old kind, in front of the elements: magic number, version, system, object, storages."""
_DEEPEST = 4
_STORAGES = ("Byte", "Char", "Short", "Int", "Long", "Bool", "Half", "BFloat16", "Float", "Double", "Untyped")


def check_object(blob: np.ndarray, what: str) -> None:
    """Raises UnsafeInput where a pickle in a torch.save archive, or in a tensor of it, names anything else, CorruptInput where
    it is no archive."""
    _Look(what, 0).archive(blob)


def _names_something(data: bytes) -> bool:
    """Whether a pickle names a class or a function before it ends, or is damaged."""
    with suppress(Exception):
        for opcode, _, _ in pickletools.genops(data):
            if opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
                return True
    return False


class _Look:
    """depth: how many others this one is within."""

    def __init__(self, what: str, depth: int) -> None:
        self._what, self._depth = what, depth
        self._names: dict[str, Any] = {
            **{f"torch.{name}": name for name in ITEM_BYTES},
            **{f"torch.{kind}Storage": inert(f"torch.{kind}Storage") for kind in _STORAGES},
            **{name: inert(name) for name in ("torch.storage.UntypedStorage", "torch.storage.TypedStorage", "torch.device")},
            "torch._utils._rebuild_parameter": inert("torch._utils._rebuild_parameter"),
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch.storage._load_from_bytes": self._storage,
            "torch.Size": plain_tuple,
            "collections.OrderedDict": ordered_dict,
            "_io.BytesIO": self._file_type(),
            "_codecs.encode": self._encoded,
            "__builtin__.bytes": bytes,  # of nothing, as protocol 2 has no bytes
            "builtins.getattr": enum_member,
            "__builtin__.getattr": enum_member,
        }

    def archive(self, blob: np.ndarray) -> None:
        for name, (data, _) in read_archive(blob, self._what).items():
            if name.endswith("/data.pkl"):
                self._pickle(data.tobytes())
            elif "/data/" in name and data.nbytes and self._depth == 0:  # tensors of what a layer unpickles are tensors
                self._within().elements(data.tobytes())

    def elements(self, data: bytes) -> None:
        """Of a tensor, or a file in memory: Transformer Engine keeps a pickle, or an archive, in one, and unpickles that."""
        if data.startswith(_ARCHIVE):
            self.archive(np.frombuffer(data, np.uint8))
            return
        try:
            self._pickles(data, 1)
        except UnsafeInput:
            raise
        except CorruptInput as e:
            # Numbers; or a pickle with a damaged end, whose beginning is run all the same.
            if _names_something(data):
                raise self._refused("it holds a damaged pickle") from e

    def _pickles(self, data: bytes, number: int) -> None:
        """The first ones of several, one behind the other."""
        for _ in range(number):
            try:
                *_, (_, _, last) = pickletools.genops(data)
            except Exception as e:  # a damaged stream can make it raise almost anything
                raise CorruptInput(f"{self._what}: a pickle in it is damaged ({type(e).__name__}: {str(e)[:200]}).") from e
            end = (last or 0) + 1
            self._pickle(data[:end])
            data = data[end:]

    def _pickle(self, data: bytes) -> None:
        read_pickle(data, self._names, self._what, persistent=lambda pid: None, other=self._other)

    def _other(self, name: str) -> Any:
        """Classes of Transformer Engine's, in what it pickles itself."""
        if self._depth and name.startswith("transformer_engine.") and not RUNNING & set(name.split(".")):
            return inert(name)
        raise self._refused(f"its pickle names {name[:200]!r}, which has no place there")

    def _tensor(self, storage: Any, offset: int, size: tuple, stride: tuple, *rest: Any) -> Inert:
        """Of one that a layer may unpickle, the elements are the storage's from the first on: those were looked at."""
        steps = (*itertools.accumulate(reversed(size[1:]), operator.mul, initial=1),)
        if self._depth == 0 and (offset != 0 or (math.prod(size) and tuple(stride) != steps[::-1][: len(size)])):
            raise self._refused("a tensor in it is a part of what is stored")
        return inert("torch.Tensor")()

    def _storage(self, data: bytes) -> None:
        """A file of torch.save within a pickle."""
        within = self._within()
        if data.startswith(_ARCHIVE):
            within.archive(np.frombuffer(data, np.uint8))
        else:
            within._pickles(data, _LEGACY)

    def _file_type(self) -> type[Inert]:
        """io.BytesIO, which is made with its bytes, or has them first in its state."""

        def made(file: Inert, *arguments: Any) -> None:
            file.__setstate__((*arguments, b""))

        def set_state(file: Inert, state: Any) -> None:
            if state[0]:
                self._within().elements(bytes(state[0]))

        return type("BytesIO", (Inert,), {"name": "_io.BytesIO", "__init__": made, "__setstate__": set_state})

    def _encoded(self, text: str, encoding: str) -> bytes:
        """Bytes, as pickles of protocol 2 have them."""
        if encoding != "latin1":
            raise self._refused(f"its pickle encodes text as {encoding[:40]!r}")
        return text.encode("latin1")

    def _within(self) -> _Look:
        if self._depth == _DEEPEST:
            raise self._refused(f"it holds archives or pickles more than {_DEEPEST} within one another")
        return _Look(self._what, self._depth + 1)

    def _refused(self, why: str) -> UnsafeInput:
        return UnsafeInput(
            f"{self._what}: refused, {why}. Nothing was executed. Do not load this checkpoint with other tools before you know "
            "where it comes from."
        )
