"""Blends, small enough to count by hand, and read by stock megatron.core."""

import errno
import os

import numpy as np
import pytest
import torch
from blends import MIXTURE, build
from indexed_data import make_indexed

from megatron_demix.data.blend import Source, build_blend
from megatron_demix.data.blend_files import read_manifest
from megatron_demix.data.verify import verify_blend
from megatron_demix.errors import ConfigError, CorruptInput, MixtureError, OutputExists
from megatron_demix.indexed.reader import IndexedReader
from megatron_demix.mixture import Mixture


def test_a_view_of_data_on_another_file_system(pool, tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    build(pool, tmp_path / "near")
    monkeypatch.setattr(os, "copy_file_range", refused)
    build(pool, tmp_path / "far")
    assert (tmp_path / "far.bin").read_bytes() == (tmp_path / "near.bin").read_bytes()


def test_view_and_materialised_are_the_same_documents(pool, tmp_path):
    view, written = build(pool, tmp_path / "view"), build(pool, tmp_path / "written", mode="materialise")
    assert view["domains"] == written["domains"]
    a, b = IndexedReader(tmp_path / "view"), IndexedReader(tmp_path / "written")
    assert a.index.is_view
    assert not b.index.is_view
    assert a.num_documents == b.num_documents == view["documents"]
    assert all(np.array_equal(a.tokens(i), b.tokens(i)) for i in range(a.num_documents))


def test_counts_are_exact(pool, tmp_path):
    report = build(pool, tmp_path / "blend")
    index, domain_of = IndexedReader(tmp_path / "blend").index, np.load(tmp_path / "blend.domains.npy")
    longest = index.lengths.max()
    assert sum(d["requested_tokens"] for d in report["domains"].values()) == 60_000
    for number, d in enumerate(report["domains"].values()):
        own = index.lengths[domain_of == number]
        assert (len(own), own.sum()) == (d["documents"], d["tokens"])
        assert abs(d["tokens"] - d["requested_tokens"]) < longest
        assert d["epochs"] == d["tokens"] / d["available_tokens"]
    assert 60_000 <= index.num_tokens == report["tokens"] < 60_000 + longest


@pytest.mark.parametrize("mode", ["view", "materialise"])
def test_stock_data_with_empty_texts(tmp_path, mode):
    """Megatron's preprocess_data.py ends a document for each, and gives it no sequence."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    texts = [np.arange(n) + n for n in (0, 5, 7, 0, 0, 9, 0)]
    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.uint16)
    for text in texts:
        builder.add_document(torch.from_numpy(text), [len(text)] if len(text) else [])
    builder.finalize(str(tmp_path / "a.idx"))
    pool = {"a": Source((tmp_path / "a",)), "b": Source((make_indexed(tmp_path / "b", [7, 7, 7]),))}
    mixture = Mixture({"a": 2 / 3, "b": 1 / 3})
    report = build(pool, tmp_path / "blend", target=63, mixture=mixture, mode=mode)
    a = report["domains"]["a"]
    assert (a["documents"], a["tokens"], a["available_documents"], a["sources"][0]["documents"]) == (6, 42, 3, 3)
    reader, domain_of = IndexedReader(tmp_path / "blend"), np.load(tmp_path / "blend.domains.npy")
    seen = [tuple(reader.tokens(d)) for d in np.flatnonzero(domain_of == 0)]
    assert sorted(seen) == sorted(2 * [tuple(text) for text in texts if len(text)])
    assert verify_blend(tmp_path / "blend", progress=False)["sources"] == "compared"


def test_stock_gpt_dataset_uses_it_exactly_once(pool, tmp_path):
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    class Ids:
        vocab_size, eod, pad, unique_identifiers = 50000, 0, 0, {"name": "ids"}

    sequence, samples = 64, 900
    build(pool, tmp_path / "blend", target=sequence * samples + 1)
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=sequence,
        blend=([str(tmp_path / "blend")], None),
        split="1,0,0",
        path_to_cache=str(tmp_path / "cache"),
        tokenizer=Ids(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    train, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config).build()
    assert len(train) >= samples
    documents = np.asarray(train.document_index)
    assert sorted(documents.tolist()) == list(range(read_manifest(tmp_path / "blend")["documents"]))  # one epoch, all documents
    served = np.concatenate([train[i]["tokens"].numpy() for i in range(len(train))])
    whole = np.concatenate([IndexedReader(tmp_path / "blend").tokens(int(d)) for d in documents])
    assert sorted(served.tolist()) == sorted(whole[: len(served)].tolist())


def test_same_settings_again_is_done_at_once(pool, tmp_path):
    first = build(pool, tmp_path / "b")
    modified = (tmp_path / "b.idx").stat().st_mtime_ns
    assert build(pool, tmp_path / "b") == first
    assert (tmp_path / "b.idx").stat().st_mtime_ns == modified
    with pytest.raises(OutputExists, match="it was built from other data or settings"):
        build(pool, tmp_path / "b", target=50_000)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_bytes_depend_on_seed_and_data_only(pool, tmp_path):
    build(pool, tmp_path / "x" / "b", threads=1)
    build(pool, tmp_path / "y" / "b", threads=3)
    build_blend(pool, MIXTURE, 60_000, tmp_path / "z" / "b", seed=4, progress=False)
    names = ("b.bin", "b.idx", "b.domains.npy", "b.blend.json")
    assert all((tmp_path / "x" / n).read_bytes() == (tmp_path / "y" / n).read_bytes() for n in names)
    assert (tmp_path / "x" / "b.idx").read_bytes() != (tmp_path / "z" / "b.idx").read_bytes()


@pytest.mark.parametrize("name", ["plan", "plan-idx", "shard-0"])
def test_an_output_may_have_any_name(pool, tmp_path, name):
    """Also one that files of the working folder begin with."""
    report = build(pool, tmp_path / "b" / name, mode="materialise")
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [
        f"{name}{suffix}" for suffix in (".bin", ".blend.json", ".domains.npy", ".idx")
    ]
    assert list(report["files"]) == [".bin", ".domains.npy", ".idx"]
    assert verify_blend(tmp_path / "b" / name, progress=False)["sources"] == "compared"


def test_zero_weight_is_dropped_and_said(pool, tmp_path):
    report = build(pool, tmp_path / "b", mixture=Mixture({"code": 0.4, "prose": 0.6, "math": 0}))
    assert report["dropped_domains"] == ["math"]
    assert list(report["domains"]) == ["code", "prose"]
    assert (tmp_path / "b.bin").stat().st_size == sum(
        (tmp_path / "pool" / f"{n}_0.bin").stat().st_size for n in ("code", "prose")
    )


def test_views_share_a_pool(pool, tmp_path):
    other = Mixture({"code": 0.2, "prose": 0.5, "math": 0.3})
    build(pool, tmp_path / "a", pool_cache=tmp_path / "cache")
    (shared,) = (tmp_path / "cache").iterdir()
    lock = shared.with_name(f".{shared.name}.lock")
    lock.touch()  # as of one that was killed once the pool was there
    build(pool, tmp_path / "b", mixture=other, pool_cache=tmp_path / "cache")
    assert not lock.exists()
    (shared,) = (tmp_path / "cache").iterdir()
    assert shared.stat().st_nlink == 3
    build(pool, tmp_path / "c")
    assert (tmp_path / "c.bin").read_bytes() == (tmp_path / "a.bin").read_bytes()
    shared.unlink()
    shared.write_bytes(b"short")
    with pytest.raises(CorruptInput, match=r"has 5 bytes, expected .* Delete it to have it made anew"):
        build(pool, tmp_path / "d", pool_cache=tmp_path / "cache")


def test_epochs_are_a_decimal_number(tmp_path):
    """1.2 is a little less as a binary number."""
    pool = {"a": Source((make_indexed(tmp_path / "a", [1] * 1000),), 1.2)}
    assert build(pool, tmp_path / "b", target=1200, mixture=Mixture({"a": 1}))["tokens"] == 1200


def test_a_stage_that_a_cap_leaves_nothing(pool, tmp_path):
    from megatron_demix.data.curriculum import Stage, build_curriculum

    stages = [Stage(Mixture({"math": 1}), 10**6), Stage(Mixture({"math": 1}), 500)]
    with pytest.raises(
        MixtureError, match=r"stage 2 of 2: a blend of 500 tokens would hold none .*: its domains, math, have no"
    ):
        build_curriculum(pool, stages, tmp_path / "c", seed=3, on_shortfall="cap", progress=False)
    assert not list(tmp_path.glob("c*"))


def test_curriculum(pool, tmp_path):
    from megatron_demix.data.curriculum import Stage, build_curriculum

    later = Mixture({"code": 0.2, "prose": 0.7, "math": 0.1})
    stages = [Stage(MIXTURE, 40_000), Stage(later, 30_000)]
    one, two = build_curriculum(pool, stages, tmp_path / "c", seed=3, progress=False)
    for name in MIXTURE:
        assert two["domains"][name]["begin"] == one["domains"][name]["documents"]
    pointers = []
    for n in (1, 2):
        index, owner = IndexedReader(tmp_path / f"c-stage{n}").index, np.load(tmp_path / f"c-stage{n}.domains.npy")
        pointers.append(index.pointers[owner == 1])  # prose: less than one epoch in both together
        assert verify_blend(tmp_path / f"c-stage{n}", progress=False)["sources"] == "compared"
    assert two["domains"]["prose"]["epochs"] + one["domains"]["prose"]["epochs"] < 1
    assert not set(pointers[0].tolist()) & set(pointers[1].tolist())
    available = one["domains"]["math"]["available_tokens"]
    with pytest.raises(
        MixtureError,
        match=f"stage 2 of 2: .*{4 * available - one['domains']['math']['tokens']:,} left after the earlier stages",
    ):
        build_curriculum(pool, [*stages[:1], Stage(MIXTURE, 80_000)], tmp_path / "f" / "c", seed=3, progress=False)
    assert not (tmp_path / "f").exists()  # all stages are planned before the first is built
    with pytest.raises(ConfigError, match="curriculum: no stages"):
        build_curriculum(pool, [], tmp_path / "e", seed=3)
