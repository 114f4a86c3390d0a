"""Pickles of checkpoints: metadata, payloads' descriptions and the common state are read, and nothing in them is run."""

import argparse
import enum
import io
import os
import pickle
import pickletools
import subprocess
import time
from collections import OrderedDict
from decimal import Decimal

import numpy as np
import pytest
import torch
from dist_checkpoints import blob_of, edited_metadata, small_model, write_checkpoint
from torch.distributed.checkpoint.filesystem import _StoragePrefix
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING
from torch.distributed.checkpoint.planner import SavePlan

from megatron_demix.checkpoint.archive import write_archive
from megatron_demix.checkpoint.common_state import (
    merged_common_state,
    model_arguments,
    read_common_state,
    write_common_state,
)
from megatron_demix.checkpoint.metadata import read_metadata
from megatron_demix.checkpoint.payload import read_payload
from megatron_demix.checkpoint.pickles import Global, inert, instance, ordered_dict, plain_tuple, read_pickle, write_pickle
from megatron_demix.checkpoint.reader import Checkpoint
from megatron_demix.errors import CorruptInput


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_malicious_metadata_is_refused_and_never_run(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil(), protocol))
    with pytest.raises(CorruptInput, match=r"\.metadata: refused, its pickle names '(posix|os)\.system'.*Nothing was executed"):
        read_metadata(tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_metadata_that_keeps_the_ranks_plans(tmp_path):
    """As megatron.core writes it from a job's second save on, with --ckpt-assume-constant-structure."""
    write_checkpoint(tmp_path, {"w": torch.zeros(4, 4)})
    plan = SavePlan([], storage_data=_StoragePrefix("__0_"))
    edited_metadata(tmp_path, lambda metadata: setattr(metadata, "all_local_plans", [plan]))
    assert list(read_metadata(tmp_path).tensors) == ["w"]


def test_members_of_enums_that_are_pickled_by_name(tmp_path, monkeypatch):
    """As CPython 3.11.2 does."""
    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", enum.pickle_by_enum_name)
    write_checkpoint(tmp_path, {"w": torch.zeros(4, 4)})
    assert b"getattr" in (tmp_path / ".metadata").read_bytes()
    assert list(read_metadata(tmp_path).tensors) == ["w"]


@pytest.mark.parametrize("owner", [torch.float32, 3, "os"])
def test_getattr_of_anything_else_is_refused(tmp_path, owner):
    class Ask:
        def __reduce__(self):
            return getattr, (owner, "__class__")

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Ask(), 2))
    with pytest.raises(CorruptInput, match=r"\.metadata: its pickle is damaged \(ValueError: getattr of"):
        read_metadata(tmp_path)


def test_malicious_payload(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blob = blob_of(Evil())  # type: ignore[arg-type]
    with pytest.raises(CorruptInput, match=r"names '(posix|os)\.system'"):
        read_payload(blob, "x")
    assert not (tmp_path / "pwned").exists()


def test_a_pickle_cannot_ask_for_more_memory_than_it_has_bytes():
    bomb = b"\x80\x02" + b"N" + b"r\xff\xff\xff\x7f" + b"."  # remember one object under index 2^31
    with pytest.raises(CorruptInput, match=r"its pickle is damaged"):
        read_pickle(bomb, {}, "bomb")


def framed(content: bytes) -> bytes:
    return b"\x95" + len(content).to_bytes(8, "little") + content


def test_frames_are_one_after_another():
    """As all writers make them. Where one is within another, Python's reader in C skips bytes of the first: it would read other
    opcodes than were looked at."""
    one, two = b"]" + b"K\x01a" * 40, b"K\x02a" * 40
    assert read_pickle(b"\x80\x04" + framed(one) + framed(two + b"."), {}, "sound") == [1] * 40 + [2] * 40
    assert read_pickle(b"\x80\x04" + framed(one) + two + b".", {}, "sound") == [1] * 40 + [2] * 40
    inside = one + framed(two + b".")
    for bad in (framed(inside[: len(one) + 20]) + inside[len(one) + 20 :], framed(one + b"K") + b"\x01a."):
        with pytest.raises(CorruptInput, match=r"its pickle is damaged \(at byte"):
            read_pickle(b"\x80\x04" + bad, {}, "damaged")
    with pytest.raises(CorruptInput, match=r"its pickle is damaged \(at byte 2\)"):
        read_pickle(b"\x80\x04" + framed(b"N.")[:-1], {}, "cut short")


def nested(depth: int, kind: type) -> object:
    """Two of two of two ...: 2^depth values for who does not see that they are one."""
    value: object = kind("x")
    for _ in range(depth):
        value = kind((value, value))
    return value


def refused_at_once(read) -> None:
    started = time.perf_counter()
    with pytest.raises(CorruptInput):
        read()
    assert time.perf_counter() - started < 1


def _first(mapping: dict):
    return next(iter(mapping.values()))


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize(
    "put",
    [
        lambda m, many: object.__setattr__(next(iter(m.storage_data)), "fqn", many),
        lambda m, many: object.__setattr__(next(iter(m.storage_data)), "offset", many),
        lambda m, many: setattr(_first(m.storage_data), "relative_path", many),
        lambda m, many: setattr(_first(m.storage_data), "offset", many),
        lambda m, many: setattr(_first(m.storage_data), "transform_descriptors", many),
        lambda m, many: setattr(_first(m.state_dict_metadata), "size", many),
        lambda m, many: setattr(_first(m.state_dict_metadata), "chunks", many),
        lambda m, many: setattr(_first(m.state_dict_metadata), "properties", many),
        lambda m, many: setattr(_first(m.state_dict_metadata).properties, "dtype", many),
        lambda m, many: setattr(m, "storage_data", many),
        lambda m, many: setattr(m, "state_dict_metadata", many),
    ],
)
def test_parts_shared_many_times_over_in_metadata(tmp_path, put, kind):
    """Wherever something is looked up, or shown in a message."""
    write_checkpoint(tmp_path, small_model(0))
    edited_metadata(tmp_path, lambda metadata: put(metadata, nested(40, kind)))
    refused_at_once(lambda: read_metadata(tmp_path))


def test_keys_that_share_parts_many_times_over():
    for opcodes in (b"}%sNs.", b"}(%sNu.", b"(%sNd.", b"\x8f(%s\x90.", b"(%s\x91."):
        deep = b"\x80\x04" + opcodes % (b"K\x01" + b"2\x86" * 40)
        refused_at_once(lambda deep=deep: read_pickle(deep, {}, "hostile"))
        flat = b"\x80\x04" + opcodes % (b"K\x01" + b"2\x86" * 10)
        read_pickle(flat, {}, "honest")
    # torch.Size of a list is a tuple of what is in it by then.
    deep = b"}K\x01" + b"q\x000ctorch\nSize\n](h\x00h\x00e\x85R" * 40
    refused_at_once(lambda: read_pickle(b"\x80\x02" + deep + b"Ns.", {"torch.Size": plain_tuple}, "hostile"))
    pairs = b"ccollections\nOrderedDict\n](K\x01" + b"2\x86" * 40 + b"N\x86e\x85R."
    refused_at_once(lambda: read_pickle(b"\x80\x02" + pairs, {"collections.OrderedDict": ordered_dict}, "hostile"))


@pytest.mark.parametrize("kind", [tuple, list])
def test_parts_shared_many_times_over_in_arguments(tmp_path, kind):
    folder = write_checkpoint(tmp_path, small_model(0), common={"args": argparse.Namespace(data_path=nested(30, kind))})
    refused_at_once(lambda: read_common_state(Checkpoint(folder)))
    endless, deep = b"]q\x00h\x00a", b"]" * 5000 + b"a" * 4999
    for value in (endless, deep):
        pickled = b"\x80\x02}X\x04\0\0\0args" + value + b"s."
        (folder / "common.pt").write_bytes(write_archive({"a/data.pkl": pickled}))
        with pytest.raises(CorruptInput, match="more than 100 deep, or one in itself"):
            read_common_state(Checkpoint(folder))
    shared = {"args": argparse.Namespace(a=(one := ["x"] * 1000), b=one, c=[one] * 100)}
    assert model_arguments(read_common_state(Checkpoint(write_checkpoint(tmp_path / "b", small_model(0), common=shared))))["b"]


def test_what_stands_for_an_instance_is_not_iterated():
    """Its state may have an item for every number: torch.Size of it would fill the memory."""
    allowed = {"torch.Size": plain_tuple, "m.Size": inert("m.Size"), "collections.OrderedDict": OrderedDict}
    endless = b"\x80\x02ctorch\nSize\n(cm\nSize\n)\x81ccollections\nOrderedDict\nbtR."
    with pytest.raises(CorruptInput, match=r"not iterable"):
        read_pickle(endless, allowed, "endless")


# --- common state ---------------------------------------------------------------------------------------------------


def test_common_state_keeps_the_arguments_and_forgets_the_counters(tmp_path):
    folder = write_checkpoint(tmp_path / "c", small_model(0))
    state = read_common_state(Checkpoint(folder))
    assert model_arguments(state)["consumed_train_samples"] == 640
    merged, _ = merged_common_state(state, 0)
    write_common_state(tmp_path / "common.pt", merged)
    loaded = torch.load(tmp_path / "common.pt", weights_only=False)
    assert vars(loaded["args"]) == {
        "consumed_train_samples": 0,
        "hidden_size": 8,
        "params_dtype": torch.bfloat16,
        "iteration": 0,
    }
    assert loaded["checkpoint_version"] == 3.0


def test_common_state_of_core_0_19_lies_inside_the_distcp_files(tmp_path):
    buffer = io.BytesIO()
    torch.save([{"iteration": 12, "checkpoint_version": 3.0}], buffer)
    folder = write_checkpoint(tmp_path, small_model(0), objects={"common_state/shard_0_1": buffer.getvalue()})
    (folder / "common.pt").unlink()
    assert read_common_state(Checkpoint(folder)) == {"iteration": 12, "checkpoint_version": 3.0}


def test_no_common_state_and_a_foreign_one(tmp_path):
    folder = write_checkpoint(tmp_path, small_model(0))
    torch.save([1, 2], folder / "common.pt")
    with pytest.raises(CorruptInput, match=r"holds a list, expected a dictionary"):
        read_common_state(Checkpoint(folder))
    (folder / "common.pt").write_bytes(b"PK")
    with pytest.raises(CorruptInput, match=r"common.pt: not a whole torch.save archive"):
        read_common_state(Checkpoint(folder))
    (folder / "common.pt").unlink()
    assert read_common_state(Checkpoint(folder)) == {}


class _Attack:
    def __init__(self, run, *arguments):
        self.call = run, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("run", "name"), [(os.system, r"posix\.system"), (eval, r"__builtin__\.eval"), (subprocess.Popen, "commands")]
)
@pytest.mark.parametrize("inside", [False, True])
def test_a_common_state_that_would_run_something_is_refused_by_name(tmp_path, run, name, inside):
    mark = tmp_path / "ran"
    buffer = io.BytesIO()
    torch.save({"iteration": 1, "optimizer": {"x": _Attack(run, f"touch {mark}")}}, buffer)
    folder = write_checkpoint(tmp_path / "c", small_model(0), objects={"common_state/shard_0_1": buffer.getvalue()})
    (folder / "common.pt").unlink() if inside else (folder / "common.pt").write_bytes(buffer.getvalue())
    with pytest.raises(CorruptInput, match=rf"refused, its pickle names '{name}.*Nothing was executed"):
        read_common_state(Checkpoint(folder))
    assert not mark.exists()


def test_a_common_state_of_classes_that_are_not_known(tmp_path):
    """As runs have them: enumerations and dataclasses of anyone's training script, tensors, arrays."""
    foreign = {"a": Decimal("1.5"), "b": np.arange(3), "c": torch.ones(2), "d": {frozenset({1})}, "e": OrderedDict(x=1)}
    folder = write_checkpoint(tmp_path, small_model(0), common={"iteration": 3, "rerun_state_machine": foreign})
    assert read_common_state(Checkpoint(folder))["iteration"] == 3


def test_written_pickles_are_what_pickle_reads():
    value = {
        "a": [1, 2.5, "x", None, True, (1, 2)],
        "b": b"bytes",
        "dtype": Global("torch.bfloat16"),
        "size": instance("torch.Size", (2, 3)),
    }
    data = write_pickle(value)
    pickletools.dis(data, out=io.StringIO())
    loaded = pickle.loads(data)
    assert loaded == {
        "a": [1, 2.5, "x", None, True, (1, 2)],
        "b": b"bytes",
        "dtype": torch.bfloat16,
        "size": torch.Size((2, 3)),
    }


# --- what a checkpoint promises of itself ---------------------------------------------------------------------------
