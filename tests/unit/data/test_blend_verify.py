"""Verification: reading a blend again finds what has changed."""

import os

import numpy as np
import pytest
from blends import build, flip_last_byte

from megatron_demix import native
from megatron_demix.data.verify import verify_blend
from megatron_demix.errors import ConfigError, CorruptInput, VerificationFailed


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


def test_verify_says_when_sources_are_gone_or_changed(pool, tmp_path):
    build(pool, tmp_path / "b")
    flip_last_byte(tmp_path / "pool" / "math_0.bin")
    assert "has changed since" in verify_blend(tmp_path / "b", progress=False)["sources"]
    (tmp_path / "pool" / "math_0.bin").unlink()
    assert "does not exist" in verify_blend(tmp_path / "b", progress=False)["sources"]


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
    assert "has changed since" in verify_blend(tmp_path / "d", progress=False)["sources"]


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
        seen.add(whole)
    assert len(seen) == 5
