"""The state a checkpoint holds once, not per rank: `common.pt`, or inside the .distcp files from megatron.core 0.19.

It is read without running it, and what is carried into a merged checkpoint is rebuilt from plain values and a short list of
names that Megatron itself treats as safe. Readers of every version prefer `common.pt` where it exists, so that is what we
write.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_demix.checkpoint.archive import check_entry, read_archive, write_archive
from megatron_demix.checkpoint.dtypes import ITEM_BYTES
from megatron_demix.checkpoint.layout import BACKEND, COMMON, unreadable
from megatron_demix.checkpoint.pickles import (
    RUNNING,
    Global,
    Inert,
    check_tree,
    enum_member,
    inert,
    ordered_dict,
    plain_tuple,
    read_pickle,
    write_pickle,
)
from megatron_demix.checkpoint.reader import Checkpoint
from megatron_demix.errors import CorruptInput, UnsafeInput

_INSIDE = "common_state/shard_0_1"

# Names that torch.load(weights_only=True) accepts once megatron.core has registered its own, and that model arguments use.
_CLASSES = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "pathlib.PosixPath",
    "signal.Signals",
    "megatron.core.enums.ModelType",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.CudaGraphScope",
)
_VALUES = tuple(f"torch.{name}" for name in ITEM_BYTES)
_ALLOWED: dict[str, Any] = {
    **{name: inert(name) for name in _CLASSES},
    **{name: Global(name) for name in _VALUES},
    "torch.Size": plain_tuple,
    "collections.OrderedDict": ordered_dict,
}

# Counters that would make a run from the merged checkpoint skip data it has never seen.
_ZEROED = ("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")


# Of a common state. Honest ones have thousands: an argument each, and what the optimizer lists by parameter group.
_MOST_VALUES = 1 << 20


class _Foreign(Inert):
    """An instance of a class that is not carried over (optimizer settings, rerun state, tensors)."""

    name = "foreign"

    def __init__(self, *arguments: Any) -> None: ...
    def __setstate__(self, state: Any) -> None: ...
    def __setitem__(self, key: Any, value: Any) -> None: ...
    def append(self, value: Any) -> None: ...
    def extend(self, values: Any) -> None: ...


# Beside those of RUNNING, modules that run programs, load code or reach the network: no training state is made of what they
# have. And builtins that do.
_RUNNING = frozenset(
    (
        *("code", "codeop", "pdb", "bdb", "timeit", "cProfile", "profile", "trace", "webbrowser", "pickle", "_pickle"),
        *("marshal", "multiprocessing", "asyncio", "threading", "_thread", "site", "pip", "http", "urllib", "ftplib"),
        *("smtplib", "tempfile"),
        *("commands", "thread", "cPickle", "urllib2", "httplib"),  # as pickles of the old protocols name them
    )
)
_RUNNING_BUILTINS = frozenset({"compile", "open", "input", "breakpoint", "globals"})


def _foreign(name: str, what: str) -> type[_Foreign]:
    """Stands in for a class that is not known. Raises UnsafeInput for a name that only an attack has a use for."""
    module, _, attribute = name.partition(".")
    of_python = module in ("builtins", "__builtin__") and attribute.split(".")[0] in _RUNNING_BUILTINS
    if module in _RUNNING or of_python or RUNNING & set(name.split(".")):
        raise UnsafeInput(
            f"{what}: refused, its pickle names {name[:200]!r}, which would run or fetch something. Nothing was executed. "
            "Do not load this checkpoint with other tools before you know where it comes from."
        )
    return _Foreign


def _member(owner: Any, name: Any) -> _Foreign:
    """A member of an enum, as early CPython 3.11 pickles it: by a call that no merged state can hold."""
    enum_member(owner, name)
    return _Foreign()


_MEMBERS = {"builtins.getattr": _member, "__builtin__.getattr": _member}


def missing_files(checkpoint: Checkpoint) -> list[str]:
    """Of the small files without which megatron.core does not load a checkpoint."""
    there = [BACKEND] if (checkpoint.location.path / BACKEND).is_file() else []
    if (checkpoint.location.path / COMMON).is_file() or _INSIDE in checkpoint.metadata.objects:
        there.append(COMMON)
    return [name for name in (BACKEND, COMMON) if name not in there]


def check_loadable(checkpoint: Checkpoint) -> None:
    """Raises CorruptInput naming the small files that it lacks."""
    if missing := missing_files(checkpoint):
        raise CorruptInput(
            f"checkpoint {checkpoint.location.path}: {' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} missing, "
            "without which Megatron does not load it. Copy the whole folder again from where it was saved."
        )


def read_common_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """The common state: plain values, Global for names, Inert for instances. {} where the checkpoint has none.

    Raises CorruptInput if it is damaged, or names what would run something. Nothing in it is executed; classes that are not
    known become inert placeholders.
    """
    path = checkpoint.location.path / COMMON
    if path.is_file():
        try:
            data, what = np.frombuffer(path.read_bytes(), np.uint8), str(path)
        except OSError as e:
            raise unreadable(path, e) from e
    elif _INSIDE in checkpoint.metadata.objects:
        data, what = checkpoint.blob(checkpoint.metadata.objects[_INSIDE], _INSIDE), f"{checkpoint.location.path} ({_INSIDE})"
    else:
        return {}
    entries = read_archive(data, what)
    names = [name for name in entries if name.endswith("/data.pkl")]
    if len(names) != 1:
        raise CorruptInput(f"{what}: not a torch.save archive.")
    pickled = check_entry(entries[names[0]][0].tobytes(), entries[names[0]][1], "data.pkl", what)
    state = read_pickle(
        pickled, _ALLOWED | _MEMBERS, what, persistent=lambda pid: _Foreign(), other=lambda name: _foreign(name, what)
    )
    if isinstance(state, list) and len(state) == 1:
        state = state[0]  # as megatron.core stores objects among the tensors
    if not isinstance(state, dict):
        raise CorruptInput(f"{what}: holds a {type(state).__name__}, expected a dictionary.")
    check_tree(state, _MOST_VALUES, what)
    return state


def model_arguments(state: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron's saved command-line arguments, {} where there are none."""
    arguments = state.get("args")
    return dict(arguments.state) if isinstance(arguments, Inert) and isinstance(arguments.state, dict) else {}


def merged_common_state(state: Mapping[str, Any], iteration: int, dtype: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """(the common state of a merged checkpoint, names of what was left out).

    Carries the arguments (with consumed samples at zero), the checkpoint version and the content metadata; leaves out
    optimizer, scheduler and random state, and every value that is not plain. dtype: that tensors are written in, if it may not
    be what the arguments say.
    """
    left_out = sorted(str(k) for k in state if k not in ("args", "checkpoint_version", "content_metadata", "iteration"))
    merged: dict[str, Any] = {"iteration": iteration, "checkpoint_version": state.get("checkpoint_version", 3.0)}
    if arguments := model_arguments(state):
        kept = {}
        for name, value in arguments.items():
            if _is_plain(value):
                kept[name] = 0 if name in _ZEROED else value
            else:
                left_out.append(f"args.{name}")
        if dtype is not None:
            precision = {"bf16": dtype == "bfloat16", "fp16": dtype == "float16", "params_dtype": Global(f"torch.{dtype}")}
            kept |= {name: value for name, value in precision.items() if name in kept}
        merged["args"] = _namespace(kept | {"iteration": iteration})
    if _is_plain(state.get("content_metadata")) and state.get("content_metadata") is not None:
        merged["content_metadata"] = state["content_metadata"]
    return merged, left_out


def new_common_state(arguments: Mapping[str, Any], iteration: int) -> dict[str, Any]:
    """The common state of a checkpoint that is not made from others. arguments: Megatron's, by name; plain values."""
    return {"iteration": iteration, "checkpoint_version": 3.0, "args": _namespace({**arguments, "iteration": iteration})}


def _namespace(arguments: dict[str, Any]) -> Inert:
    namespace = inert("argparse.Namespace")()
    namespace.arguments, namespace.state = None, arguments
    return namespace


def write_common_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write common.pt so that torch.load reads it. state: as merged_common_state or new_common_state return it."""
    entries = {
        "common/byteorder": b"little",
        "common/version": b"3\n",
        "common/data.pkl": write_pickle(dict(state)),
    }
    path.write_bytes(write_archive(entries))


def _is_plain(value: Any) -> bool:
    if value is None or isinstance(value, (bool, int, float, str, bytes, Global)):
        return True
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(_is_plain(k) and _is_plain(v) for k, v in value.items())
    if isinstance(value, Inert):
        return not isinstance(value, _Foreign) and _is_plain(value.arguments) and _is_plain(value.state)
    return False
