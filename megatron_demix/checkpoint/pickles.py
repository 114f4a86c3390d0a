"""Reading pickles without running them: every class becomes an inert stand-in, and only allow-listed names are accepted.

Neither torch nor Megatron is imported, and nothing the file names is ever called.
"""

from __future__ import annotations

import io
import pickle
import reprlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from megatron_demix.errors import CorruptInput, UnsafeInput
from megatron_demix.native import scan_pickle


@dataclass(frozen=True)
class Global:
    """A module-level name in a pickle, e.g. torch.bfloat16, that is neither imported nor called."""

    name: str


class Inert:
    """Stands in for an instance of the class `name`: its constructor's arguments (None: made without a call) and its state."""

    name = ""
    arguments: tuple | None = None
    state: Any = None
    # Without this, Python would ask __getitem__ for 0, 1, 2, ..., and a state that answers all of them fills the memory.
    __iter__ = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __getitem__(self, field: str) -> Any:
        return self.state[field]

    def get(self, field: str) -> Any:
        return self.state.get(field) if isinstance(self.state, dict) else None


@lru_cache(maxsize=256)
def inert(name: str) -> type[Inert]:
    """A class whose instances carry the name of what they stand for."""
    return type(name.rsplit(".", 1)[-1], (Inert,), {"name": name})


def instance(name: str, *arguments: Any, state: Any = None) -> Inert:
    """An instance of the class or function `name`, to be written: called with arguments, or (without any) given its state."""
    made = inert(name)(*arguments)
    if not arguments:
        made.arguments = None
    made.state = state
    return made


RUNNING = frozenset(
    (
        *("os", "posix", "nt", "subprocess", "sys", "importlib", "runpy", "pty", "shutil", "socket", "ctypes", "_ctypes"),
        *("loads", "Unpickler", "_Unpickler", "cpp_extension", "hub", "testing", "system", "popen"),
        *("eval", "exec", "execfile", "__import__", "getattr", "__globals__", "__builtins__"),
    )
)
"""Parts of names that only an attack has a use for. Most modules have imported some: torch.serialization.os.system is one."""


def enum_member(owner: Any, name: Any) -> Inert:
    """getattr(class, name): how early CPython 3.11 (Debian 12 has 3.11.2) pickles the members of an enum. Raises ValueError for
    anything else that is asked of getattr."""
    if not (isinstance(owner, type) and issubclass(owner, Inert) and isinstance(name, str) and name[:1] != "_"):
        raise ValueError(f"getattr of {shown(owner)}")
    return owner(name)


def plain_tuple(*arguments: Any) -> tuple:
    """torch.Size(iterable) as a tuple."""
    return tuple(arguments[0]) if arguments else ()


def ordered_dict() -> OrderedDict:
    """collections.OrderedDict as pickles make it, empty: filled in its call, it would hash what no one has looked at."""
    return OrderedDict()


def shown(value: Any) -> str:
    """A value of a pickle for a message, short whatever it is: written out, parts that are shared many times over never end."""
    return _REPR.repr(value)


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 3, 200, 200


_DEEPEST = 100


def check_tree(value: Any, most: int, what: str) -> None:
    """That who follows lists, tuples, dicts and instances wherever they lead visits at most `most` values, 100 deep. A pickle
    can share one part many times over, or have it in itself. Raises CorruptInput naming `what`."""
    sizes: dict[int, int | None] = {}  # by id; None: begun
    todo, depth = [value], 0
    while todo:
        one = todo[-1]
        parts = _parts(one)
        if sizes.get(id(one)) is not None or not parts:
            sizes.setdefault(id(one), 1)
            todo.pop()
        elif id(one) not in sizes:
            sizes[id(one)] = None
            todo += [part for part in parts if id(part) not in sizes]
            depth += 1
            if depth > _DEEPEST or any(sizes.get(id(part), 0) is None for part in parts):
                raise CorruptInput(f"{what}: its pickle nests values more than {_DEEPEST} deep, or one in itself.")
        else:
            sizes[id(one)] = size = 1 + sum(sizes[id(part)] or 0 for part in parts)
            todo.pop()
            depth -= 1
            if size > most:
                raise CorruptInput(f"{what}: its pickle shares parts so often that it stands for more than {most} values.")


def _parts(value: Any) -> Sequence[Any]:
    if isinstance(value, (list, tuple)):
        return value
    if isinstance(value, dict):
        return [*value, *value.values()]
    return (value.arguments, value.state) if isinstance(value, Inert) else ()


def read_pickle(
    data: bytes | memoryview,
    allowed: Mapping[str, Any],
    what: str,
    *,
    persistent: Callable[[Any], Any] | None = None,
    other: Callable[[str], Any] | None = None,
) -> Any:
    """The object of a pickle. allowed: "module.name" -> what to put there (a class or function of ours, or a value).

    persistent: called for torch's persistent ids; other: called for names not allowed, instead of refusing. Raises
    UnsafeInput naming `what` and the forbidden name, CorruptInput where the stream is damaged.
    """

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            full = f"{module}.{name}"
            if full in allowed:
                return allowed[full]
            if other is not None:
                return other(full)
            raise UnsafeInput(
                f"{what}: refused, its pickle names {full[:200]!r}, which has no place there. Nothing was executed. Do not "
                "load this checkpoint with other tools before you know where it comes from."
            )

        def persistent_load(self, pid: Any) -> Any:
            if persistent is None:
                raise CorruptInput(f"{what}: its pickle refers to tensor storage, which has no place there.")
            return persistent(pid)

    # Python's reader allocates memory for any memo index a stream names; a look at the opcodes first keeps that in bounds.
    if (at := scan_pickle(bytes(data))) >= 0:
        raise CorruptInput(f"{what}: its pickle is damaged (at byte {at}).")
    try:
        return Reader(io.BytesIO(data)).load()
    except CorruptInput:
        raise
    except Exception as e:  # a damaged stream can make the reader raise almost anything
        raise CorruptInput(f"{what}: its pickle is damaged ({type(e).__name__}: {str(e)[:200]}).") from e


_Pickler: Any = pickle._Pickler  # the Python one: the C one insists on importing what it names


class Pickled(bytes):
    """The opcodes of a value, as pickled() makes them: part of a pickle that is written once and used many times."""


class _Writer(_Pickler):
    """Writes Global, Inert and Pickled as what they stand for, without importing it."""

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, Pickled):
            self.write(obj)
        elif isinstance(obj, Global):
            self._name(obj.name)
        elif isinstance(obj, Inert):
            self._name(obj.name)
            if obj.arguments is None:
                self.write(pickle.EMPTY_TUPLE + pickle.NEWOBJ)
            else:
                super().save(obj.arguments)
                self.write(pickle.REDUCE)
            if obj.state is not None:
                super().save(obj.state)
                self.write(pickle.BUILD)
        else:
            super().save(obj, save_persistent_id)

    def _name(self, name: str) -> None:
        module, _, attribute = name.rpartition(".")
        self.write(pickle.GLOBAL + f"{module}\n{attribute}\n".encode())


def pickled(value: Any) -> Pickled:
    """What write_pickle makes of a value that is part of another one."""
    return Pickled(write_pickle(value)[2:-1])  # without the protocol's header and the stop


def write_pickle(value: Any) -> bytes:
    """A protocol-2 pickle of plain values (None, numbers, text, bytes, lists, tuples, dicts), Global, Inert and Pickled."""
    out = io.BytesIO()
    writer = _Writer(out, 2)
    writer.fast = True  # no sharing of equal objects: the bytes depend on the values only
    writer.dump(value)
    return out.getvalue()
