"""Parts of a tokenizing run, made in any order by any processes, give the bytes of one run; so does what a kill leaves."""

import gzip
import json
import os
import random
import resource
import signal
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from folders import contents
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_demix.data import inputs as inputs_module
from megatron_demix.data import outputs
from megatron_demix.data import prefix as prefix_module
from megatron_demix.data.encode_blocks import Recipe
from megatron_demix.data.inputs import read_blocks
from megatron_demix.data.prepare import prepare_domain, preprocess
from megatron_demix.data.tokenizer import load_tokenizer
from megatron_demix.errors import ConfigError, CorruptInput, OutputExists, StorageError
from megatron_demix.study.data import TokenizerSpec

BYTE = load_tokenizer(TokenizerSpec(type="byte"))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Files of every kind, the first much larger than a block, with empty and bad documents all over."""
    folder = tmp_path_factory.mktemp("mixed")
    rng = random.Random(0)

    def lines(name, number):
        bad = ("", '{"text": ""}', '{"body": 1}', "nonsense")
        good = [json.dumps({"text": f"{name} {n} " + "ab 你 " * rng.randrange(60)}) for n in range(number)]
        return "\n".join(rng.choice(bad) if rng.random() < 0.1 else line for line in good).encode() + b"\n"

    (folder / "a.jsonl").write_bytes(lines("a", 300))
    (folder / "b.jsonl").write_bytes(lines("b", 20)[:-1])
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines("c", 50)))
    pq.write_table(
        pa.table({"text": [f"row {n}" if n % 7 else None for n in range(90)]}), folder / "d.parquet", row_group_size=8
    )
    (folder / "e.txt").write_text("one document " * 50)
    (folder / "f.jsonl").write_bytes(b'{"text": "' + b"long " * 4000 + b'"}\n' + lines("f", 30))
    return sorted(folder.iterdir())


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(inputs_module, "BLOCK_BYTES", 2048)


def tokenized(inputs, prefix, **options):
    return preprocess(inputs, BYTE, prefix, on_bad_document="reject", progress=False, **options)


@pytest.fixture(scope="module")
def whole(mixed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    tokenized(mixed, folder / "x")
    assert sorted(contents(folder)) == ["x.bin", "x.idx", "x.meta.json", "x.rejected.jsonl"]
    return contents(folder)


@pytest.mark.parametrize("number", [2, 3, 7, 64])
def test_parts_in_any_order_are_the_whole(mixed, whole, tmp_path, number):
    order = random.Random(number).sample(range(number), number)
    for part in order[:-1]:
        assert tokenized(mixed, tmp_path / "x", part=(part, number)) is None
        assert not (tmp_path / "x.bin").exists()
    counts = tokenized(mixed, tmp_path / "x", part=(order[-1], number))
    assert contents(tmp_path) == whole
    meta = json.loads((tmp_path / "x.meta.json").read_text())
    assert counts == {what: meta[what] for what in ("documents", "tokens", "bytes", "rejected")}
    assert counts == tokenized(mixed, tmp_path / "x", part=(0, number)) == tokenized(mixed, tmp_path / "x")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 40), max_size=12), min_size=1, max_size=3), st.integers(1, 9))
def test_parts_end_to_end_are_the_stream(tmp_path_factory, files, number):
    folder = tmp_path_factory.mktemp("files")
    for name, lengths in enumerate(files):
        (folder / f"{name}.jsonl").write_bytes(b"".join(b"x" * n + b"\n" for n in lengths))
    paths = sorted(folder.iterdir())
    everything = b"".join(b.data for b in read_blocks(paths, block_bytes=16))
    parts = [[b.data for b in read_blocks(paths, block_bytes=16, part=(i, number))] for i in range(number)]
    assert b"".join(data for part in parts for data in part) == everything


def test_an_error_in_a_part_names_the_line_of_the_file(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "good"}\n' * 900 + "bad\n" + '{"text": "good"}\n' * 99)
    with pytest.raises(CorruptInput, match=r"x\.jsonl:901: not JSON"):
        preprocess([tmp_path / "x.jsonl"], BYTE, tmp_path / "out", part=(6, 7), progress=False)
    with pytest.raises(ConfigError, match="part is 7 of 7, expected 0 <= part < parts"):
        preprocess([tmp_path / "x.jsonl"], BYTE, tmp_path / "out", part=(7, 7), progress=False)


def test_a_domain_in_parts(mixed, tmp_path, monkeypatch):
    options = {"seed": 5, "on_bad_document": "reject", "progress": False}
    stats = prepare_domain(mixed, BYTE, tmp_path / "whole", **options)
    for part in (2, 0, 1):
        assert prepare_domain(mixed, BYTE, tmp_path / "parts", part=(part, 3), **options) is None
    monkeypatch.setattr(Recipe, "__call__", lambda self, block: pytest.fail("tokenized again"))
    assert prepare_domain(mixed, BYTE, tmp_path / "parts", **options) == stats
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_parts_of_other_inputs_are_made_again(mixed, whole, tmp_path):
    tokenized(mixed[:2], tmp_path / "x", part=(0, 2))
    assert tokenized(mixed, tmp_path / "x", part=(1, 2)) is None
    tokenized(mixed, tmp_path / "x", part=(0, 2))
    assert contents(tmp_path) == whole


def test_something_else_at_the_prefix_is_kept(mixed, tmp_path):
    tokenized(mixed[:1], tmp_path / "x")
    before = contents(tmp_path)
    for options in ({}, {"part": (0, 2)}):
        with pytest.raises(OutputExists, match=r"x\.bin exists, and was not made from these inputs with these settings"):
            tokenized(mixed, tmp_path / "x", **options)
    with pytest.raises(OutputExists, match="not made from these inputs with these settings"):
        tokenized(mixed[:1], tmp_path / "x", append_eod=False)
    assert contents(tmp_path) == before
    (tmp_path / "x.meta.json").unlink()
    with pytest.raises(OutputExists, match=r"x\.bin exists"):
        tokenized(mixed[:1], tmp_path / "x")


def test_damage_to_a_finished_one_is_seen(mixed, tmp_path):
    tokenized(mixed[:1], tmp_path / "x")
    with open(tmp_path / "x.bin", "r+b") as file:
        file.truncate(100)
    with pytest.raises(CorruptInput, match=r"x\.idx"):
        tokenized(mixed[:1], tmp_path / "x")


@pytest.mark.parametrize("renames", range(5))
def test_killed_while_publishing(mixed, whole, tmp_path, monkeypatch, renames):
    """After any number of the renames, the next run ends with the same files; other inputs in between are refused."""
    done = []

    def rename(source, target):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(target)
        os.replace(source, target)

    monkeypatch.setattr(prefix_module.os, "rename", rename)
    if renames < 4:
        with pytest.raises(KeyboardInterrupt):
            tokenized(mixed, tmp_path / "x")
    monkeypatch.undo()
    monkeypatch.setattr(inputs_module, "BLOCK_BYTES", 2048)
    if 0 < renames < 4:
        with pytest.raises(OutputExists):
            tokenized(mixed[:1], tmp_path / "x")
        monkeypatch.setattr(Recipe, "__call__", lambda self, block: pytest.fail("tokenized again"))
    tokenized(mixed, tmp_path / "x")
    assert contents(tmp_path) == whole


def test_a_full_disk_is_said_and_what_was_written_goes_on(mixed, whole, tmp_path, monkeypatch):
    """At whatever file the disk becomes full; then there is room, and the same call ends with the same bytes."""
    monkeypatch.setattr(outputs, "CHECKPOINT_S", 0.0)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for limit in (100, 1000, 5000, 20_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            with pytest.raises(StorageError, match=r"File too large\. Free space or choose another disk, then run again"):
                tokenized(mixed, tmp_path / str(limit) / "x")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert not list((tmp_path / str(limit)).glob("x*"))
        tokenized(mixed, tmp_path / str(limit) / "x")
        assert contents(tmp_path / str(limit)) == whole


def test_two_builders_on_one_target(mixed, whole, tmp_path):
    counts = []
    threads = [threading.Thread(target=lambda: counts.append(tokenized(mixed, tmp_path / "x"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [counts[0]] * 3
    assert contents(tmp_path) == whole


def test_a_journal_of_other_inputs_is_gone_before_their_files_are_overwritten(mixed, tmp_path, monkeypatch):
    """Killed after the files were opened, with no journal of its own yet: a later run must not go on with the bytes in them."""
    monkeypatch.setattr(outputs, "CHECKPOINT_S", 0.0)
    original = Recipe.__call__

    def killed_at(number):
        def call(self, block):
            if block.number == number:
                raise KeyboardInterrupt
            return original(self, block)

        return call

    for inputs, number, interval in ((mixed, 3, 0.0), (mixed[::-1], 6, 1e9)):
        monkeypatch.setattr(Recipe, "__call__", killed_at(number))
        monkeypatch.setattr(outputs, "CHECKPOINT_S", interval)
        with pytest.raises(KeyboardInterrupt):
            tokenized(inputs, tmp_path / "a" / "x")
    monkeypatch.setattr(Recipe, "__call__", original)
    tokenized(mixed, tmp_path / "a" / "x")
    tokenized(mixed, tmp_path / "b" / "x")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
