"""Reading checkpoints: what torch wrote is found, what is damaged or disagrees is refused."""

import argparse
import gc
import io
import json
import os
import re

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from dist_checkpoints import bits, blob_of, edited_metadata, parallel_cuts, saved, small_model, write_checkpoint

from megatron_demix.checkpoint import metadata as metadata_module
from megatron_demix.checkpoint.common_state import (
    read_common_state,
)
from megatron_demix.checkpoint.metadata import read_metadata
from megatron_demix.checkpoint.payload import read_payload
from megatron_demix.checkpoint.reader import Checkpoint, is_model_key
from megatron_demix.checkpoint.summary import format_summary, summarize
from megatron_demix.checkpoint.tiling import tile
from megatron_demix.errors import CorruptInput, IncompatibleInputs
from megatron_demix.units import format_count


def test_every_chunk_is_found_with_its_bytes(tmp_path):
    tensors = small_model(1)
    write_checkpoint(tmp_path, tensors, parallel_cuts(2), num_files=3, odd=True, objects={"a._extra_state/shard_0_1": b"state"})
    checkpoint = Checkpoint(tmp_path)
    assert set(checkpoint.model_tensors) == set(tensors)
    assert {k: checkpoint.blob(v, k).tobytes() for k, v in checkpoint.model_objects.items()} == {
        "a._extra_state/shard_0_1": b"state"
    }
    for key, info in checkpoint.model_tensors.items():
        assert info.shape == tuple(tensors[key].shape)
        assert info.dtype == "bfloat16"
        for chunk in info.chunks:
            payload = checkpoint.payload(info, chunk)
            box = tuple(slice(o, o + n) for o, n in zip(chunk.offset, chunk.shape, strict=True))
            assert payload.record.tobytes() == bits(tensors[key][box])


@pytest.mark.parametrize(("make", "reason"), [(os.mkfifo, "Invalid argument"), (os.mkdir, "Is a directory")])
def test_what_is_no_regular_file_is_not_waited_for(tmp_path, make, reason):
    write_checkpoint(tmp_path, small_model(1))
    checkpoint = Checkpoint(tmp_path)
    info = next(iter(checkpoint.model_tensors.values()))
    path = checkpoint.location.path / info.chunks[0].location.file
    path.unlink()
    make(path)
    with pytest.raises(CorruptInput, match=rf"distcp: cannot be read \({reason}\), but .metadata refers to it"):
        checkpoint.payload(info, info.chunks[0])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint16, torch.float8_e4m3fn]
)
def test_payloads_of_every_type_of_storage(dtype):
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    payload = read_payload(blob_of(tensor), "x")
    assert (payload.dtype, payload.shape, payload.strides) == (str(dtype).removeprefix("torch."), (3, 4), (4, 1))
    assert payload.record.tobytes() == tensor.view(torch.uint8).numpy().tobytes()


def test_payloads_keep_views():
    whole = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    payload = read_payload(blob_of(whole[1:3, 2:4].t()), "x")
    assert (payload.shape, payload.strides, payload.offset_bytes) == ((2, 2), (1, 6), 4 * 8)
    assert read_payload(blob_of(torch.tensor(1.5)), "x").shape == ()
    assert read_payload(blob_of(torch.zeros(0, 3)), "x").record.nbytes == 0


def test_optimizer_and_random_state_are_not_the_model():
    for key in (
        "optimizer.state.exp_avg.decoder.w",
        "chained_0.optimizer.param_groups",
        "rng_state/shard_0_1",
        "common_state/shard_0_1",
        "rerun_state_machine_state/shard_0.0_1.2",
        "opt_param_scheduler",
    ):
        assert not is_model_key(key)
    for key in ("decoder.layers.mlp.linear_fc1.weight", "rng_state_emb.weight", "opt_param_scheduler_emb", "optimizers.w"):
        assert is_model_key(key)


def test_entries_are_read_without_a_search_for_cycles(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, small_model(0))
    seen, read = [], metadata_module.read_pickle
    monkeypatch.setattr(metadata_module, "read_pickle", lambda *a: seen.append(gc.isenabled()) or read(*a))
    monkeypatch.setattr(metadata_module, "_check_apart", lambda *_: seen.append(gc.isenabled()))
    assert gc.isenabled()
    read_metadata(tmp_path)
    assert (seen, gc.isenabled()) == ([False, False], True)


def test_a_merge_keeps_nothing_of_an_optimizer(tmp_path):
    tensors = small_model(0)
    states = {f"optimizer.state.exp_avg.{key}": tensor.float() for key, tensor in tensors.items()}
    folder = write_checkpoint(tmp_path, tensors | states, objects={"rng_state/shard_0_1": b"x"})
    checkpoint = Checkpoint(folder, model_only=True)
    assert set(checkpoint.metadata.tensors) == set(tensors)
    assert set(Checkpoint(folder).metadata.tensors) == set(tensors | states)
    # Where it lies is looked at all the same.
    edited_metadata(folder, lambda m: setattr(list(m.storage_data.values())[-1], "offset", 0))
    with pytest.raises(CorruptInput, match="lie at the same bytes"):
        Checkpoint(folder, model_only=True)


# --- damage ---------------------------------------------------------------------------------------------------------


def test_a_name_that_is_no_text(tmp_path):
    folder = write_checkpoint(tmp_path / os.fsdecode(b"caf\xe9"), small_model(0))
    checkpoint = Checkpoint(folder)
    info = checkpoint.metadata.tensors["decoder.final_layernorm.weight"]
    assert checkpoint.payload(info, info.chunks[0]).shape == (8,)
    (folder / info.chunks[0].location.file).unlink()
    with pytest.raises(CorruptInput, match=r"cannot be read \(No such file or directory\)"):
        Checkpoint(folder).payload(info, info.chunks[0])


def test_truncated_distcp_is_named(tmp_path):
    write_checkpoint(tmp_path, small_model(0))
    file = tmp_path / "__0_0.distcp"
    os.truncate(file, file.stat().st_size - 10)
    checkpoint = Checkpoint(tmp_path)
    info = checkpoint.metadata.tensors["decoder.final_layernorm.weight"]
    with pytest.raises(
        CorruptInput, match=r"__0_0\.distcp: has \d+ bytes, but 'decoder.final_layernorm.weight' lies at .* truncated"
    ):
        checkpoint.payload(info, info.chunks[0])
    file.unlink()
    with pytest.raises(CorruptInput, match=r"cannot be read .* but .metadata refers to it"):
        Checkpoint(tmp_path).payload(info, info.chunks[0])


def test_a_summary_finds_files_that_are_too_short_for_what_is_not_the_model(tmp_path):
    write_checkpoint(
        tmp_path, {"optimizer.state.exp_avg.decoder.w": torch.ones(100)}, objects={"rng_state/shard_0_1": b"x" * 50}
    )
    file = tmp_path / "__0_0.distcp"
    summarize(tmp_path)
    for size, key in ((file.stat().st_size - 10, "optimizer"), (20, "rng_state")):
        os.truncate(file, size)
        with pytest.raises(CorruptInput, match=key):
            summarize(tmp_path)


@pytest.mark.parametrize("cut", [1, 21, 22, 60, 300, 700])
def test_truncated_archive(cut):
    blob = blob_of(torch.zeros(4, 4))
    with pytest.raises(CorruptInput, match=r"x: not a whole torch.save archive"):
        read_payload(blob[:-cut], "x")


def test_archive_of_something_else():
    with pytest.raises(CorruptInput, match=r"describes something else than one dense tensor"):
        read_payload(blob_of([1, 2]), "x")  # type: ignore[arg-type]
    with pytest.raises(CorruptInput, match=r"not a whole torch.save archive"):
        read_payload(np.zeros(0, np.uint8), "x")


@pytest.mark.parametrize(
    ("edit", "promised"),
    [
        (lambda info: object.__setattr__(info.chunks[0], "shape", (4, 3)), r"bfloat16 \(4, 3\)"),
        (lambda info: object.__setattr__(info, "dtype", "float16"), r"float16 \(4, 4\)"),  # of as many bytes
    ],
)
def test_metadata_that_disagrees_with_the_file(tmp_path, edit, promised):
    checkpoint = Checkpoint(write_checkpoint(tmp_path, {"w": torch.zeros(4, 4, dtype=torch.bfloat16)}))
    info = checkpoint.metadata.tensors["w"]
    edit(info)
    with pytest.raises(CorruptInput, match=rf"holds bfloat16 \(4, 4\), but .metadata promises {promised}"):
        checkpoint.payload(info, info.chunks[0])


def test_a_summary_counts_what_is_there(tmp_path):
    tensors = small_model(0)
    states = {f"optimizer.state.exp_avg.{key}": tensor.float() for key, tensor in tensors.items()}
    write_checkpoint(
        tmp_path / "iter_0000100",
        tensors | states,
        parallel_cuts(2),
        num_files=3,
        objects={"rng_state/shard_0_1": b"x", "a._extra_state/shard_0_1": saved([1])},
    )
    facts = summarize(tmp_path / "iter_0000100")
    num = sum(tensor.numel() for tensor in tensors.values())
    assert (facts["iteration"], facts["files"]) == (100, 3)
    assert (facts["parameters"], facts["model_bytes"]) == (num, 2 * num)
    assert (facts["other_tensors"], facts["other_bytes"]) == (len(tensors), 4 * num)
    assert facts["objects"] == ["a._extra_state/shard_0_1", "rng_state/shard_0_1"]
    assert {t["key"]: t["shape"] for t in facts["tensors"]} == {key: list(t.shape) for key, t in tensors.items()}
    (qkv,) = (t for t in facts["tensors"] if t["key"].endswith("linear_qkv.weight"))
    assert (qkv["dtype"], qkv["chunks"], qkv["grid"]) == ("bfloat16", 4, [2, 2, 1])
    text = format_summary(facts)
    assert f"(iter, iteration 100)\n{format_count(num)} parameters in {len(tensors)} tensors, " in text
    assert "\nhidden_size 8, consumed_train_samples 640\n" in text
    assert re.search(r"linear_qkv\.weight +bfloat16 +\[2, 24, 8\] +4 chunks \(2 x 2 x 1\)", text)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda m: m.storage_data.clear(), "is listed but stored nowhere"),
        (lambda m: setattr(m.state_dict_metadata["w"].chunks[0], "sizes", torch.Size((9, 9))), "leaves its tensor"),
        (
            lambda m: setattr(m.state_dict_metadata["w"].chunks[0], "sizes", torch.Size((4,))),
            "has 2 dimensions, its tensor 2|dimensions",
        ),
        (
            lambda m: setattr(next(iter(m.storage_data.values())), "relative_path", "../../etc/passwd"),
            "expected a file of the checkpoint's",
        ),
        (lambda m: setattr(next(iter(m.storage_data.values())), "offset", -5), "lies at bytes -5"),
        (lambda m: setattr(next(iter(m.storage_data.values())), "transform_descriptors", ["zstd"]), "is stored transformed"),
        (lambda m: setattr(m, "state_dict_metadata", None), "is not the metadata of a torch_dist checkpoint"),
        (lambda m: m.state_dict_metadata.update(w=3), "is not the metadata of a torch_dist checkpoint"),
    ],
)
def test_inconsistent_metadata(tmp_path, edit, says):
    write_checkpoint(tmp_path, {"w": torch.zeros(4, 4)})
    edited_metadata(tmp_path, edit)
    with pytest.raises(CorruptInput, match=says):
        read_metadata(tmp_path)


def test_other_backends_and_damaged_files(tmp_path):
    write_checkpoint(tmp_path, {"w": torch.zeros(4)})
    (tmp_path / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    with pytest.raises(IncompatibleInputs, match=r"format is 'zarr', expected 'torch_dist'"):
        read_metadata(tmp_path)
    (tmp_path / "metadata.json").write_text("{")
    with pytest.raises(CorruptInput, match=r"metadata\.json: cannot be read"):
        read_metadata(tmp_path)
    (tmp_path / "metadata.json").unlink()
    data = (tmp_path / ".metadata").read_bytes()
    (tmp_path / ".metadata").write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptInput, match=r"its pickle is damaged"):
        read_metadata(tmp_path)
    (tmp_path / ".metadata").unlink()
    with pytest.raises(CorruptInput, match=r"cannot be read"):
        read_metadata(tmp_path)


def test_formats_that_no_file_names(tmp_path):
    """As Megatron-LM saves torch_dcp and fsdp_dtensor: torch.distributed.checkpoint flattens the state dictionary."""
    state = {
        "args": argparse.Namespace(num_layers=2),
        "model": {"module.decoder.layers.0.mlp.linear_fc1.weight": torch.ones(4, 2)},
        "optimizer": {"state": {"module.decoder.layers.0.mlp.linear_fc1.weight": {"exp_avg": torch.zeros(4, 2)}}},
    }
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    for of_interest in (None, is_model_key):
        with pytest.raises(IncompatibleInputs, match=r"'torch_dcp' or 'fsdp_dtensor' .*, expected 'torch_dist'\. Train with"):
            read_metadata(tmp_path, of_interest)


def test_a_description_that_differs_from_its_checksum(tmp_path):
    """A stride that has changed would give other elements of the same record."""
    blob = blob_of(torch.arange(64.0).reshape(8, 8)).copy()
    at = blob.tobytes().find(b"K\x08K\x01\x86")
    assert at > 0
    blob[at + 1] = 4
    with pytest.raises(CorruptInput, match=r"x: the bytes of data.pkl differ from their checksum"):
        read_payload(blob, "x")
    folder = write_checkpoint(tmp_path, small_model(0))
    data = (folder / "common.pt").read_bytes()
    (folder / "common.pt").write_bytes(data.replace(b"consumed_train_samples", b"consumed_train_sampler"))
    with pytest.raises(CorruptInput, match=r"common.pt: the bytes of data.pkl differ"):
        read_common_state(Checkpoint(folder))


def test_objects_are_compared_with_their_checksums(tmp_path):
    buffer = io.BytesIO()
    torch.save({"state": torch.arange(8)}, buffer)
    folder = write_checkpoint(tmp_path, small_model(0), objects={"a._extra_state/shard_0_1": buffer.getvalue()})
    sound = Checkpoint(folder)
    ((key, location),) = sound.model_objects.items()
    assert sound.sound_blob(location, key).tobytes() == buffer.getvalue()
    file = folder / location.file
    data = file.read_bytes()
    # A byte of the tensor, and one of what tells that this is an archive.
    for offset in (buffer.getvalue().find(torch.arange(8).numpy().tobytes()) + 9, 0, len(buffer.getvalue()) - 22):
        changed = bytearray(data)
        changed[location.position + offset] ^= 1
        file.write_bytes(changed)
        with pytest.raises(CorruptInput, match=r"a._extra_state/shard_0_1'\): (the bytes of .* differ|not a whole)"):
            Checkpoint(folder).sound_blob(location, key)


def test_missing_shards_of_an_object(tmp_path):
    shards = {f"a._extra_state/shard_{e}.{layer}_2.3": b"x" for e in range(2) for layer in range(3)}
    whole = write_checkpoint(tmp_path / "a", {"w": torch.ones(2)}, objects=shards)
    assert set(Checkpoint(whole).model_objects) == set(shards)
    shards["a._extra_state/shard_1.2_2.2"] = shards.pop("a._extra_state/shard_1.2_2.3")
    part = write_checkpoint(tmp_path / "b", {"w": torch.ones(2)}, objects=shards)
    with pytest.raises(CorruptInput, match=r"[15] of [46] shards of 'a._extra_state' are there"):
        _ = Checkpoint(part).model_objects


def test_archives_saved_without_checksums():
    computes = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        blob = blob_of(torch.arange(5.0))
    finally:
        torch.serialization.set_crc32_options(computes)
    payload = read_payload(blob, "x")
    assert payload.record.tobytes() == torch.arange(5.0).numpy().tobytes()
    assert payload.crc == read_payload(blob_of(torch.arange(5.0)), "x").crc


def test_a_view_of_nothing_may_begin_anywhere():
    payload = read_payload(blob_of(torch.zeros(3, 3)[3:, 2:]), "x")
    assert (payload.shape, payload.offset_bytes) == ((0, 1), 0)


def test_two_items_at_the_same_bytes(tmp_path):
    """What a rank's file name with one other digit looks like."""
    write_checkpoint(tmp_path, {"v": torch.zeros(4, 4), "w": torch.ones(4, 4)}, num_files=2)
    edited_metadata(tmp_path, lambda m: setattr(list(m.storage_data.values())[1], "relative_path", "__0_0.distcp"))
    with pytest.raises(CorruptInput, match=r"'[vw]' and '[vw]' lie at the same bytes of __0_0.distcp"):
        read_metadata(tmp_path)


@pytest.mark.parametrize(
    ("shape", "boxes", "tiles"),
    [
        ((4, 6), [((0, 0), (4, 3)), ((0, 3), (4, 3))], True),
        ((4, 6), [((0, 0), (3, 3)), ((3, 0), (1, 5)), ((0, 3), (3, 3)), ((3, 5), (1, 1))], True),
        ((4, 6), [((0, 0), (4, 3)), ((0, 2), (4, 3))], False),  # the right number of elements
        ((8,), [((0,), (4,)), ((5,), (2,)), ((5,), (2,))], False),
        ((4, 4), [((0, 0), (2, 2)), ((2, 2), (2, 2)), ((0, 2), (2, 2)), ((0, 0), (2, 2))], False),
        ((4, 4), [((0, 0), (4, 4)), ((1, 1), (0, 2))], True),
        ((0, 4), [((0, 0), (0, 2)), ((0, 2), (0, 2))], True),
        ((), [((), ())], True),
        ((), [], False),
        ((3,), [], False),
        ((0,), [], True),
    ],
)
def test_chunks_tile_their_tensor_or_not(shape, boxes, tiles):
    assert tile(shape, tuple(boxes)) is tiles


def test_whether_the_kernel_shows_which_pages_are_cached(tmp_path, monkeypatch):
    """mincore(2) says of other users' files that all are."""
    checkpoint = Checkpoint(write_checkpoint(tmp_path / "a", small_model(0)))
    info = next(iter(checkpoint.model_tensors.values()))
    checkpoint.payload(info, info.chunks[0])
    assert checkpoint.shows_cached
    monkeypatch.setattr(os, "access", lambda path, mode, effective_ids: False)
    assert checkpoint.shows_cached
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert not checkpoint.shows_cached
