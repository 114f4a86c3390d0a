"""The kernel's limit on a process's maps: seen before anything is read where it can be, and named where it is met."""

import errno
import os
import re

import pytest
import torch
from dist_checkpoints import even_cuts, small_model, write_checkpoint

from megatron_demix.checkpoint import maps, reader, writer
from megatron_demix.checkpoint.maps import check_maps
from megatron_demix.checkpoint.reader import Checkpoint
from megatron_demix.errors import ConfigError
from megatron_demix.merge.engine import merge_checkpoints


def allow(monkeypatch, tmp_path, limit):
    (tmp_path / "max_map_count").write_text(f"{limit}\n")
    monkeypatch.setattr(maps, "_LIMIT", tmp_path / "max_map_count")


def in_use():
    with open("/proc/self/maps") as lines:
        return sum(1 for _ in lines)


class NoMore(reader.MappedFile):
    def __init__(self, path, place=0):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), str(path))


def test_files_are_counted_against_what_is_left(tmp_path, monkeypatch):
    allow(monkeypatch, tmp_path, in_use() + 5000)
    check_maps(3000, "parts")
    with pytest.raises(ConfigError, match=r"parts lie in 70000 files, .* of the \d+ maps it may have.*max_map_count=131072\)"):
        check_maps(70_000, "parts")
    monkeypatch.setattr(maps, "_LIMIT", tmp_path / "absent")  # another system
    check_maps(70_000, "parts")


def test_a_merge_counts_the_files_of_all_components(tmp_path, monkeypatch):
    parts = {n: write_checkpoint(tmp_path / n, small_model(0), num_files=4) for n in "ab"}
    allow(monkeypatch, tmp_path, in_use())
    with pytest.raises(ConfigError, match=r"the tensors of 2 components lie in 8 files, .* or share the work .*\(--workers"):
        merge_checkpoints(parts, {"m": {"a": 0.5, "b": 0.5}}, tmp_path / "out", progress=False)


def test_a_file_that_cannot_be_mapped_is_not_called_damaged(tmp_path, monkeypatch):
    checkpoint = Checkpoint(write_checkpoint(tmp_path / "a", small_model(0)))
    info = next(iter(checkpoint.model_tensors.values()))
    monkeypatch.setattr(reader, "MappedFile", NoMore)
    with pytest.raises(ConfigError, match=r"__0_0.distcp: the system maps no more of it .* \(ulimit -v\)"):
        checkpoint.payload(info, info.chunks[0])
    allow(monkeypatch, tmp_path, in_use())
    with pytest.raises(ConfigError, match=r"__0_0.distcp is one file too many, .*sysctl -w vm.max_map_count=\d+"):
        checkpoint.payload(info, info.chunks[0])


def test_a_worker_maps_what_its_part_is_made_of(tmp_path, monkeypatch):
    """To know its components it reads something of every file, but of one component at a time."""
    monkeypatch.setattr(writer, "_FILE_BYTES", 256)
    cuts = {"w": even_cuts((64, 8), (16, 1))}
    parts = {n: write_checkpoint(tmp_path / n, {"w": torch.rand(64, 8)}, cuts, num_files=16) for n in "abcdefgh"}

    def mapped():
        with open("/proc/self/maps") as lines:
            return sum(bool(re.search(rf"{tmp_path}/[a-h]/.*\.distcp", line)) for line in lines)

    most = 0

    class Counted(reader.MappedFile):
        def __init__(self, path, place=0):
            nonlocal most
            super().__init__(path, place)
            most = max(most, mapped())

    monkeypatch.setattr(reader, "MappedFile", Counted)
    mixtures = {"m": dict.fromkeys(parts, 1 / 8)}
    merge_checkpoints(parts, mixtures, tmp_path / "alone", progress=False)
    assert most == 8 * 16
    most = 0
    for worker in range(8):
        merge_checkpoints(parts, mixtures, tmp_path / "out", progress=False, verify="none", worker=(worker, 8))
    assert 16 < most < 4 * 16
    for path in (tmp_path / "alone" / "m" / "release").iterdir():
        assert (tmp_path / "out" / "m" / "release" / path.name).read_bytes() == path.read_bytes()
