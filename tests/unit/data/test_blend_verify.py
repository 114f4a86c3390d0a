"""Verification: reading a blend again finds what has changed."""

import errno
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from blends import build, flip_last_byte
from indexed_data import make_indexed, write_view

from megatron_demix import native
from megatron_demix.artifact import hash_file
from megatron_demix.data import source_digest, verify
from megatron_demix.data.pool import Source
from megatron_demix.data.verify import verify_blend
from megatron_demix.errors import ConfigError, CorruptInput, OutputExists, VerificationFailed
from megatron_demix.indexed.reader import read_index
from megatron_demix.mixture import Mixture


def test_verify_reads_everything_again(pool, tmp_path):
    for mode in ("view", "materialise"):
        report = build(pool, tmp_path / mode, mode=mode)
        counts = verify_blend(tmp_path / mode, progress=False)
        assert counts["tokens"] == report["tokens"]
        assert counts["sources"] == "compared"
        assert {n: d["tokens"] for n, d in counts["domains"].items()} == {n: d["tokens"] for n, d in report["domains"].items()}


@pytest.mark.parametrize(
    ("suffix", "message"),
    [(".bin", "content digest"), (".idx", "idx has other bytes"), (".domains.npy", "domains.npy has other bytes")],
)
def test_verify_finds_a_changed_byte(pool, tmp_path, suffix, message):
    build(pool, tmp_path / "b", mode="materialise")
    flip_last_byte(tmp_path / f"b{suffix}")
    with pytest.raises(VerificationFailed, match=message):
        verify_blend(tmp_path / "b", progress=False)


@pytest.mark.parametrize("sources", ["there", "gone"])
def test_verify_finds_a_changed_byte_of_a_view(pool, tmp_path, sources):
    build(pool, tmp_path / "b", mixture=Mixture({"prose": 0.9, "math": 0.1}))
    if sources == "gone":
        shutil.rmtree(tmp_path / "pool")
    whole, math = (tmp_path / "b.bin").read_bytes(), json.loads((tmp_path / "b.blend.json").read_text())["domains"]["math"]
    begin = len(whole) - math["sources"][0]["bin_bytes"]
    for at, domain in ((0, "prose"), (begin - 1, "prose"), (begin, "math"), (len(whole) - 1, "math")):
        changed = bytearray(whole)
        changed[at] ^= 1
        (tmp_path / "b.bin").write_bytes(changed)
        with pytest.raises(VerificationFailed, match=f"b.bin: bytes .*, domain '{domain}', have hash .*, expected"):
            verify_blend(tmp_path / "b", progress=False)
    (tmp_path / "b.bin").write_bytes(whole)
    verify_blend(tmp_path / "b", progress=False)


@pytest.mark.parametrize("mode", ["view", "materialise"])
def test_verify_of_a_blend_of_views(pool, tmp_path, mode):
    """A view that repeats documents is a source like any other: its repeats are not the blend's."""
    build(pool, tmp_path / "repeats", target=30_000, mixture=Mixture({"math": 1}))
    twice = {"all": Source((tmp_path / "repeats",)), "code": pool["code"]}
    build(twice, tmp_path / "b", target=50_000, mixture=Mixture({"all": 0.8, "code": 0.2}), mode=mode)
    assert verify_blend(tmp_path / "b", progress=False)["sources"] == "compared"
    shutil.rmtree(tmp_path / "pool")
    assert "not compared" in verify_blend(tmp_path / "b", progress=False)["sources"]


def test_verify_finds_a_document_that_comes_too_often(pool, tmp_path):
    """In an .idx that someone has put in the place of the blend's, digest and all."""
    build(pool, tmp_path / "b", target=5_000)
    index, manifest = tmp_path / "b.idx", tmp_path / "b.blend.json"
    there = read_index(tmp_path / "b")
    pointers = there.pointers.copy()
    first, second = np.flatnonzero(np.load(tmp_path / "b.domains.npy") == 0)[:2]
    pointers[second] = pointers[first]
    write_view(tmp_path / "c.idx", there.dtype, there.lengths, pointers)
    old, new = hash_file(index), hash_file(tmp_path / "c.idx")
    manifest.write_text(manifest.read_text().replace(old, new))
    (tmp_path / "c.idx").rename(index)
    with pytest.raises(VerificationFailed, match="its order of documents is not the one its sources and seed give"):
        verify_blend(tmp_path / "b", progress=False)


@pytest.mark.parametrize("change", ["tokens", "documents", "seed", "share", "max_epochs", "domains"])
def test_verify_finds_a_manifest_that_was_changed(pool, tmp_path, change):
    """Where the sources are gone, nothing else could tell."""
    build(pool, tmp_path / "b")
    shutil.rmtree(tmp_path / "pool")
    path = tmp_path / "b.blend.json"
    manifest = json.loads(path.read_text())
    if change == "domains":
        del manifest[change]
    else:
        (manifest if change in manifest else manifest["domains"]["math"])[change] += 1
    path.write_text(json.dumps(manifest))
    with pytest.raises(VerificationFailed, match="does not agree with its own key and totals"):
        verify_blend(tmp_path / "b", progress=False)


def test_verify_finds_documents_that_are_said_to_be_of_each_others_domains(pool, tmp_path):
    """Of one length, so that all counts stay the same."""
    build(pool, tmp_path / "b")
    owners, manifest = tmp_path / "b.domains.npy", tmp_path / "b.blend.json"
    lengths, domain_of = read_index(tmp_path / "b").lengths, np.load(owners)
    first, second = next(
        (i, j) for i in range(len(lengths)) for j in range(i) if lengths[i] == lengths[j] and domain_of[i] != domain_of[j]
    )
    old = hash_file(owners)
    domain_of[[first, second]] = domain_of[[second, first]]
    np.save(owners, domain_of)
    manifest.write_text(manifest.read_text().replace(old, hash_file(owners)))
    with pytest.raises(VerificationFailed, match="its order of documents is not the one its sources and seed give"):
        verify_blend(tmp_path / "b", progress=False)


def test_verify_says_when_sources_are_gone_or_changed(pool, tmp_path):
    build(pool, tmp_path / "b")
    flip_last_byte(tmp_path / "pool" / "math_0.bin")
    assert "has changed since" in verify_blend(tmp_path / "b", progress=False)["sources"]
    (tmp_path / "pool" / "math_0.bin").unlink()
    assert "does not exist" in verify_blend(tmp_path / "b", progress=False)["sources"]


@pytest.mark.parametrize("vocab_size", [50_000, 100_000])
def test_verify_says_when_sources_no_longer_make_a_pool(pool, tmp_path, vocab_size):
    """Empty, or of another dtype than the others."""
    build(pool, tmp_path / "b")
    make_indexed(tmp_path / "pool" / "math_0", [] if vocab_size == 50_000 else [1], vocab_size=vocab_size)
    assert "not compared: " in verify_blend(tmp_path / "b", progress=False)["sources"]


def test_sources_are_found_from_behind_a_link(pool, tmp_path):
    (tmp_path / "deep" / "er" / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er" / "real")
    build(pool, tmp_path / "link" / "b")
    for folder in ("link", "deep/er/real"):
        assert verify_blend(tmp_path / folder / "b", progress=False)["sources"] == "compared"


@pytest.mark.parametrize("mode", ["view", "materialise"])
def test_verify_holds_few_long_documents_at_once(pool, tmp_path, monkeypatch, mode):
    held, hash_documents = [], native.hash_documents
    monkeypatch.setattr(
        native, "hash_documents", lambda data, *a, **o: (held.append(len(data)), hash_documents(data, *a, **o))[1]
    )
    monkeypatch.setattr(verify, "_BATCH_TOKENS", 150)  # fewer than some of its documents have
    report = build(pool, tmp_path / "b", mode=mode)
    assert verify_blend(tmp_path / "b", progress=False)["sources"] == "compared"
    assert sum(held) == 2 * report["tokens"]
    assert max(held) < 2 * 200


def test_verify_needs_a_blend(pool, tmp_path):
    with pytest.raises(ConfigError, match=r"none\.blend\.json does not exist"):
        verify_blend(tmp_path / "none")
    build(pool, tmp_path / "a", mode="args")
    with pytest.raises(ConfigError, match="has no data of its own to verify"):
        verify_blend(tmp_path / "a")
    build(pool, tmp_path / "b")
    (tmp_path / "b.bin").write_bytes(b"")
    with pytest.raises(CorruptInput, match=r"b\.bin has 0 bytes, expected"):
        verify_blend(tmp_path / "b")


def test_a_source_is_hashed_whole_and_once(pool, tmp_path, monkeypatch):
    """The note beside a .bin is believed while size and modification time are the same, by blends but not by verification."""
    hashed, hash_file = [], native.hash_file
    monkeypatch.setattr(native, "hash_file", lambda *a, **o: (hashed.append(a), hash_file(*a, **o))[1])
    bins = sorted((tmp_path / "pool").glob("*.bin"))
    for path in bins:
        os.utime(path, ns=(1, 1))  # long finished
    first = build(pool, tmp_path / "a", remember_hashes=True)
    assert len(hashed) == len(bins)
    assert len(list((tmp_path / "pool").glob(".*.bin.hash.json"))) == len(bins)
    assert build(pool, tmp_path / "b", target=50_000, remember_hashes=True)["pool"] == first["pool"]
    assert len(hashed) == len(bins)
    flip_last_byte(bins[0])
    assert build(pool, tmp_path / "c", target=40_000, remember_hashes=True)["pool"] != first["pool"]
    assert len(hashed) == len(bins) + 1
    flip_last_byte(bins[1])
    os.utime(bins[1], ns=(1, 1))  # what no honest program does: the note is believed, but verification is not deceived
    build(pool, tmp_path / "d", target=30_000, remember_hashes=True)
    with pytest.raises(VerificationFailed, match="have hash"):
        verify_blend(tmp_path / "d", progress=False)


@pytest.mark.parametrize("remember", [True, False])
def test_what_cannot_be_noted_beside_a_source_is_noted_beside_the_blend(pool, tmp_path, monkeypatch, remember):
    """For stages, workers and a second call. Without remember_hashes, as studies build, nothing is left in the end."""
    for path in (tmp_path / "pool").glob("*.bin"):
        os.utime(path, ns=(1, 1))
    hashed, hash_file, write = [], native.hash_file, source_digest.write_json

    def refused(path, value):
        if path.parent == tmp_path / "pool":
            raise PermissionError(errno.EACCES, "Permission denied")
        write(path, value)

    monkeypatch.setattr(source_digest, "write_json", refused)
    monkeypatch.setattr(native, "hash_file", lambda *a, **o: (hashed.append(a), hash_file(*a, **o))[1])
    options = {"mode": "materialise", "remember_hashes": remember}
    for worker in (0, 1, 2):
        whole = build(pool, tmp_path / "out" / "b", worker=(worker, 3), **options)
    assert build(pool, tmp_path / "out" / "b", **options) == whole
    assert len(hashed) == len(pool)
    hidden = [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]
    if remember:
        build(pool, tmp_path / "out" / "c", target=50_000, **options)
        assert len(hashed) == len(pool)
        flip_last_byte(tmp_path / "pool" / "math_0.bin")
        with pytest.raises(OutputExists):
            build(pool, tmp_path / "out" / "b", **options)
        assert len(hashed) == len(pool) + 1
    else:
        assert hidden == []


def test_workers_do_not_hash_the_same_sources_side_by_side(pool, tmp_path, monkeypatch):
    for path in (tmp_path / "pool").glob("*.bin"):
        os.utime(path, ns=(1, 1))
    hashed, hash_bin = [], source_digest.hash_bin

    def slow(path, size, **options):
        hashed.append(path)
        time.sleep(0.1)
        return hash_bin(path, size, **options)

    monkeypatch.setattr(source_digest, "hash_bin", slow)
    with ThreadPoolExecutor(3) as threads:
        options = {"mode": "materialise", "remember_hashes": True}
        list(threads.map(lambda i: build(pool, tmp_path / "b", worker=(i, 3), **options), range(3)))
    assert len(hashed) == len(pool)


def test_hash_is_of_every_byte(tmp_path):
    block = native.HASH_BLOCK
    data = np.random.default_rng(0).integers(0, 256, 2 * block + 77, np.uint8)
    seen = set()
    for changed in (None, 0, block - 1, block, 2 * block + 76):
        other = data.copy()
        if changed is not None:
            other[changed] ^= 1
        (tmp_path / "x").write_bytes(other.tobytes())
        with open(tmp_path / "x", "rb") as file:
            whole = native.hash_file(file.fileno(), 0, len(data), threads=3)
            parts = [(0, block), (block, 2 * block), (2 * block, len(data))]
            assert sum(native.hash_file(file.fileno(), a, b) for a, b in parts) % 2**64 == whole
            with pytest.raises(OSError, match="Input/output error"):
                native.hash_file(file.fileno(), 0, len(data) + 1)
        (tmp_path / "y").write_bytes(bytes(5) + other.tobytes())
        with open(tmp_path / "y", "rb") as file:
            assert native.hash_file(file.fileno(), 5, 5 + len(data), base=5) == whole
            with pytest.raises(ValueError, match="do not begin at a block"):
                native.hash_file(file.fileno(), 5, 6)
        seen.add(whole)
    assert len(seen) == 5
