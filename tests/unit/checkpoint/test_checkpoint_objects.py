"""What Megatron would run when it loads a checkpoint is refused before anyone else is given it."""

import io
import pickle

import numpy as np
import pytest
import torch
from dist_checkpoints import edited_metadata, saved, small_model, write_checkpoint

from megatron_demix.checkpoint.common_state import read_common_state
from megatron_demix.checkpoint.metadata import read_metadata
from megatron_demix.checkpoint.objects import check_object
from megatron_demix.checkpoint.pickles import instance, write_pickle
from megatron_demix.checkpoint.reader import Checkpoint
from megatron_demix.checkpoint.summary import format_summary, summarize
from megatron_demix.errors import CorruptInput, UnsafeInput
from megatron_demix.merge.engine import merge_checkpoints

OBJECT = "decoder.layers.mlp.linear_fc1._extra_state/shard_0_1"


class Attack:
    def __reduce__(self):
        return eval, ("1",)


def in_bytes(value: object) -> torch.Tensor:
    """As Transformer Engine keeps its states."""
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def checked(value: object) -> None:
    check_object(np.frombuffer(saved(value), np.uint8), "x")


@pytest.mark.parametrize(
    "value",
    [
        [None],
        [torch.empty(0, dtype=torch.uint8), {"a": 1.5}],
        {"scale": torch.ones(3), "amax": torch.arange(5.0).bfloat16()},
        [io.BytesIO()],
        [io.BytesIO(pickle.dumps({"scale": torch.ones(2)}))],
        [io.BytesIO(saved({"scale": torch.ones(2)}))],
        [in_bytes({"scale": torch.ones(2), "variables": {"updated": True}})],
        [in_bytes({})],
        [in_bytes({"amax": torch.ones(4, 4)[1:, 2]})],
    ],
)
def test_what_layers_have_is_let_through(value):
    checked(value)


@pytest.mark.parametrize(
    "value",
    [
        [Attack()],
        [in_bytes(Attack())],
        [in_bytes([Attack()])],
        {"a": [torch.ones(2), Attack()]},
        [pickle.Pickler],
        [io.BytesIO(pickle.dumps(Attack()))],
        [io.BytesIO(saved(Attack()))],
        [in_bytes([io.BytesIO(pickle.dumps(Attack()))])],
    ],
)
def test_what_names_more_is_refused(value):
    with pytest.raises(UnsafeInput, match=r"x: refused, .* names '.*(eval|Pickler)', which has no place there"):
        checked(value)


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
def test_pickles_of_every_protocol_are_found_in_tensors(protocol):
    for tail in (b"", b"x"):
        hidden = pickle.dumps([Attack()], protocol) + tail
        with pytest.raises(UnsafeInput, match="eval"):
            checked([torch.frombuffer(bytearray(hidden), dtype=torch.uint8)])
    with pytest.raises(UnsafeInput, match="damaged pickle"):  # its beginning would be run
        checked([torch.frombuffer(bytearray(hidden[: hidden.rindex(b".")] + b"\xff"), dtype=torch.uint8)])


def test_a_part_of_what_is_stored_is_refused():
    """Only the storage's first pickle is looked at, and a layer would unpickle from where the tensor begins."""
    stored = torch.frombuffer(bytearray(b"N." + pickle.dumps(Attack())), dtype=torch.uint8)
    for part in (stored[2:], stored[::2]):
        with pytest.raises(UnsafeInput, match="a part of what is stored"):
            checked([part])


@pytest.mark.parametrize("name", ["transformer_engine.pytorch.module.base.os.system", "torch.nn.Linear"])
def test_names_within_are_those_of_layers(name):
    with pytest.raises(UnsafeInput, match="which has no place there"):
        checked([torch.frombuffer(bytearray(write_pickle(instance(name, "touch x"))), dtype=torch.uint8)])
    recipe = instance("transformer_engine.common.recipe.DelayedScaling", state={"margin": 0})
    checked([torch.frombuffer(bytearray(write_pickle({"recipe": recipe})), dtype=torch.uint8)])


def test_members_of_enums_that_early_pythons_pickle_by_name():
    data = pickle.dumps({"format": 1})
    by_name = b"\x80\x02cbuiltins\ngetattr\nctransformer_engine.common.recipe\nFormat\nX\x06\x00\x00\x00HYBRID\x86R."
    for inner in (data, by_name):
        checked([torch.frombuffer(bytearray(inner), dtype=torch.uint8)])


def test_archives_within_archives_end():
    value = saved([None])
    for _ in range(10):
        value = saved([io.BytesIO(value)])
    with pytest.raises(UnsafeInput, match="more than 4 within one another"):
        check_object(np.frombuffer(value, np.uint8), "x")


def test_an_archive_within_a_pickle_is_looked_at():
    inner = write_pickle(instance("torch.storage._load_from_bytes", saved([Attack()])))
    with pytest.raises(UnsafeInput, match="eval"):
        checked([torch.frombuffer(bytearray(inner), dtype=torch.uint8)])


def test_no_merge_carries_it_along_and_inspecting_finds_it(tmp_path):
    part = write_checkpoint(tmp_path / "a", small_model(0), objects={OBJECT: saved([Attack()])})
    other = write_checkpoint(tmp_path / "b", small_model(1), objects={OBJECT: saved([None])})
    with pytest.raises(UnsafeInput, match=r"linear_fc1\._extra_state.*names '.*eval'"):
        merge_checkpoints({"a": part, "b": other}, {"m": {"a": 0.5, "b": 0.5}}, tmp_path / "out", progress=False)
    with pytest.raises(UnsafeInput):
        summarize(part)
    merge_checkpoints({"b": other, "a": part}, {"m": {"a": 0.5, "b": 0.5}}, tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    "name",
    [
        "torch.serialization.os.system",
        "logging.os.system",
        "torch.utils.cpp_extension.subprocess.getoutput",
        "numpy.testing._private.utils.runstring",
        "torch.hub.load",
    ],
)
def test_what_modules_have_imported_is_theirs_no_more(tmp_path, name):
    folder = write_checkpoint(tmp_path, small_model(0))
    data = write_pickle({"iteration": 1, "x": instance(name, "touch x")})
    archive = io.BytesIO()
    torch.save({}, archive)
    (folder / "common.pt").write_bytes(_with_pickle(archive.getvalue(), data))
    with pytest.raises(UnsafeInput, match="would run or fetch something"):
        read_common_state(Checkpoint(folder))


def _with_pickle(archive: bytes, data: bytes) -> bytes:
    from megatron_demix.checkpoint.archive import read_archive, write_archive

    entries = {name: part.tobytes() for name, (part, _) in read_archive(np.frombuffer(archive, np.uint8), "x").items()}
    return write_archive({name: data if name.endswith("/data.pkl") else part for name, part in entries.items()})


def test_one_list_of_chunks_is_one_tensors(tmp_path):
    write_checkpoint(tmp_path, {f"w{n}": torch.zeros(4) for n in range(3)})

    def share(metadata):
        (chunk,) = metadata.state_dict_metadata["w0"].chunks
        for entry in metadata.state_dict_metadata.values():
            entry.chunks = [chunk] * 1000

    edited_metadata(tmp_path, share)
    with pytest.raises(CorruptInput, match="lists more chunks than the"):
        read_metadata(tmp_path)


def test_names_are_printed_and_not_obeyed(tmp_path):
    write_checkpoint(tmp_path, {"w\x1b]0;title\x07": torch.zeros(4)})
    assert "\x1b" not in format_summary(summarize(tmp_path))
