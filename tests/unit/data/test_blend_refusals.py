"""What a blend refuses, and what it says then."""

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from blends import build
from indexed_data import make_indexed

from megatron_demix import native
from megatron_demix.data import blend, blend_data
from megatron_demix.data.blend import Source
from megatron_demix.data.blend_report import blend_table
from megatron_demix.data.pool import Pool, open_pool
from megatron_demix.errors import ConfigError, CorruptInput, IncompatibleInputs, MixtureError
from megatron_demix.indexed.reader import IndexedReader
from megatron_demix.mixture import Mixture


def test_bad_pools(pool, tmp_path):
    good = pool["code"]
    narrow = make_indexed(tmp_path / "wide", [3], vocab_size=100000)
    cases = [
        ({}, ConfigError, "no domains"),
        ({"a": Source(())}, ConfigError, "domain 'a' has no prefixes"),
        ({"a": good, "b": good}, ConfigError, "is given twice, in domain 'a' and 'b'"),
        ({"a": Source(good.prefixes, float("nan"))}, ConfigError, "max_epochs is nan, expected a finite number > 0"),
        ({"a": Source(good.prefixes, float("inf"))}, ConfigError, "max_epochs is inf, expected a finite number > 0"),
        ({"a": Source(good.prefixes, 0)}, ConfigError, "max_epochs is 0"),
        ({"a": good, "b": Source((narrow,))}, IncompatibleInputs, "wide holds int32 tokens, .*code_0 uint16"),
        ({"a": Source((make_indexed(tmp_path / "nil", []),))}, MixtureError, "domain 'a' is empty"),
        ({"a": Source((tmp_path / "absent",))}, CorruptInput, "absent.idx does not exist"),
    ]
    for bad, error, message in cases:
        with pytest.raises(error, match=message):
            build(bad, tmp_path / "out", mixture=Mixture.uniform(bad or ["a"]))
    assert not (tmp_path / "out.bin").exists()


def test_other_names_of_one_data_set(pool, tmp_path):
    """Whatever kind of link gives it another name. Two views of one pool, which share its .bin, are two."""
    prefix = pool["code"].prefixes[0]
    for name, link in (("soft", Path.symlink_to), ("hard", Path.hardlink_to)):
        for suffix in (".bin", ".idx"):
            link(tmp_path / f"{name}{suffix}", Path(f"{prefix}{suffix}"))
        with pytest.raises(ConfigError, match=f"{name} is given twice, in domain 'a' and 'b'"):
            open_pool({"a": pool["code"], "b": Source((tmp_path / name,))})
    views = {n: Source((tmp_path / n,)) for n in ("u", "v")}
    for seed, name in enumerate(views):
        build(pool, tmp_path / name, seed=seed, pool_cache=tmp_path / "cache")
    assert (tmp_path / "u.bin").samefile(tmp_path / "v.bin")
    assert list(open_pool(views).domains) == ["u", "v"]


@pytest.mark.parametrize("prefixes", ["x", "[3]", "[null]", "[[x]]", "{a: b}"])
def test_prefixes_that_are_no_list_of_paths_in_a_pools_file(tmp_path, prefixes):
    (tmp_path / "pool.yaml").write_text(f"domains: {{a: {{prefixes: {prefixes}}}}}")
    with pytest.raises(ConfigError, match=r"domain 'a' is .*, expected {prefixes: \[path, \.\.\.\]"):
        Pool.read(tmp_path / "pool.yaml")


def test_a_domain_given_twice_in_a_pools_file(tmp_path):
    (tmp_path / "pool.yaml").write_text("domains:\n  a: {prefixes: [x]}\n  a: {prefixes: [y]}\n")
    with pytest.raises(ConfigError, match=r"(?s)the key 'a' is given twice, first in line 2.*line 3"):
        Pool.read(tmp_path / "pool.yaml")


def test_a_pools_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"^pool .*pool.yaml: cannot be read: .*No such file"):
        Pool.read(tmp_path / "pool.yaml")
    (tmp_path / "pool.yaml").write_text("domains: {a: {prefixes: [2024-13-01]}}\n")
    with pytest.raises(ConfigError, match=r"pool.yaml: cannot be read: month must be in 1..12"):
        Pool.read(tmp_path / "pool.yaml")


def test_damaged_sources_are_refused(pool, tmp_path):
    for suffix, change in ((".bin", lambda d: d[:-2]), (".idx", lambda d: d[:-1]), (".idx", lambda d: b"PK" + d[2:])):
        path = tmp_path / "pool" / f"code_0{suffix}"
        good = path.read_bytes()
        path.write_bytes(change(good))
        with pytest.raises(CorruptInput, match=r"code_0\.idx: .* Copy it again from its source, or prepare the data again"):
            build(pool, tmp_path / "b")
        path.write_bytes(good)
    assert not list(tmp_path.glob("*b.*"))


@pytest.mark.parametrize("left", [-1, 0, 1 << 19])
@pytest.mark.parametrize("mode", ["view", "materialise"])
def test_a_source_that_becomes_shorter_while_it_is_read(tmp_path, monkeypatch, mode, left):
    """Also by less than a page, where the kernel has zeros for it, and in a document that is written from where it lies."""
    pool = {"a": Source((make_indexed(tmp_path / "a", [700_000, 100, 200]),))}
    path = tmp_path / "a.bin"
    step, real = ("gather", native.gather) if mode == "materialise" else ("_copy_pool", blend_data._copy_pool)

    def after_it_was_cut(*arguments, **options):
        os.truncate(path, path.stat().st_size - 1 if left < 0 else left)
        return real(*arguments, **options)

    monkeypatch.setattr(native if mode == "materialise" else blend_data, step, after_it_was_cut)
    with pytest.raises(CorruptInput, match=r"a\.bin .*became shorter"):
        build(pool, tmp_path / "b", target=700_300, mixture=Mixture({"a": 1}), mode=mode)
    assert not list(tmp_path.glob("b.*"))


@pytest.mark.parametrize("left", [0, 1000])
def test_a_source_that_becomes_shorter_before_it_is_read(pool, tmp_path, monkeypatch, left):
    path, real = tmp_path / "pool" / "code_0.bin", blend_data.write_shards

    def after_it_was_cut(*arguments, **options):
        os.truncate(path, left)
        return real(*arguments, **options)

    monkeypatch.setattr(blend_data, "write_shards", after_it_was_cut)
    with pytest.raises(CorruptInput, match=rf"code_0\.bin has {left:,} bytes, but had .* when the blend began"):
        build(pool, tmp_path / "b", mode="materialise")


def test_an_index_that_becomes_shorter_while_documents_are_chosen(pool, tmp_path, monkeypatch):
    real = blend.quotas

    def after_it_was_cut(*arguments, **options):
        os.truncate(tmp_path / "pool" / "math_0.idx", 0)
        return real(*arguments, **options)

    monkeypatch.setattr(blend, "quotas", after_it_was_cut)
    with pytest.raises(CorruptInput, match=r"math_0\.idx became shorter"):
        build(pool, tmp_path / "b")
    assert not list(tmp_path.glob("b.*"))


def test_more_documents_than_megatron_can_number(tmp_path):
    pool = {"a": Source((make_indexed(tmp_path / "a", [1, 1, 1]),), 1e9)}
    with pytest.raises(IncompatibleInputs, match="the blend has 2,147,483,648 documents; Megatron's GPTDataset numbers"):
        build(pool, tmp_path / "b", target=2**31, mixture=Mixture({"a": 1}))


def test_one_tokenizer_under_two_types_is_one(pool, tmp_path):
    notes = {
        "code_0": {"tokenizer": "bpe", "tokenizer_also": ["huggingface"]},
        "math_0": {"tokenizer": "huggingface", "tokenizer_also": ["bpe"]},
        "prose_0": {"tokenizer": "bpe"},  # of an earlier version
    }
    for name, facts in notes.items():
        (tmp_path / "pool" / f"{name}.meta.json").write_text(json.dumps(facts))
    assert open_pool(pool).tokenizer == "bpe"


@pytest.mark.parametrize("noted", ["[1, 2]", '{"tokenizer": {"name": "gpt2"}}'])
def test_a_note_of_other_software_says_nothing_of_the_tokenizer(pool, tmp_path, noted):
    (tmp_path / "pool" / "code_0.meta.json").write_text(noted)
    assert open_pool(pool).tokenizer == ""


def test_different_tokenizers_are_refused(pool, tmp_path):
    (tmp_path / "pool" / "code_0.meta.json").write_text('{"tokenizer": "aaa"}')
    (tmp_path / "pool" / "math_0.meta.json").write_text('{"tokenizer": "bbb"}')
    with pytest.raises(IncompatibleInputs, match=r"domain 'math': .*math_0 was made with tokenizer bbb, .*code_0 with aaa"):
        build(pool, tmp_path / "b")
    for mode in ("view", "materialise"):
        name = f"of_{mode}"
        build({"code": pool["code"]}, tmp_path / name, target=5000, mixture=Mixture({"code": 1}), mode=mode)
        blends = {"all": Source((tmp_path / name,))}
        again = build(blends, tmp_path / f"again_{mode}", target=100, mixture=Mixture({"all": 1}))
        assert again["tokenizer"] == "aaa"
        with pytest.raises(
            IncompatibleInputs, match=rf"domain 'math': .*math_0 was made with tokenizer bbb, .*{name} with aaa"
        ):
            build({**blends, "math": pool["math"]}, tmp_path / "b", target=100, mixture=Mixture.uniform(["all", "math"]))


def test_documents_of_several_sequences_are_refused(tmp_path):
    """Sentences, or sequences that were packed: what lies there does not say which."""
    from megatron_demix.indexed.writer import IndexedWriter

    with IndexedWriter(tmp_path / "s", np.dtype("<u2"), sentences=True) as writer:
        writer.add(np.arange(10), np.array([4, 6]), sequences_a_document=np.array([2]))
    with pytest.raises(IncompatibleInputs, match=r"2 sequences in 1 documents, expected one .* sentences, .* packed"):
        build({"a": Source((tmp_path / "s",))}, tmp_path / "b", target=5, mixture=Mixture({"a": 1}))


def test_shortfall_says_what_would_fit(pool, tmp_path):
    available = IndexedReader(tmp_path / "pool" / "math_0").index.num_tokens
    with pytest.raises(MixtureError) as raised:
        build(pool, tmp_path / "b", target=120_000)
    message = str(raised.value)
    assert f"'math' has {available:,} tokens x 4 epochs = {4 * available:,} tokens, but a share of 0.3 of 120,000" in message
    fits = int(4 * available / 0.3)
    assert f"a target of at most {fits:,} tokens" in message
    assert build(pool, tmp_path / "fits", target=fits)["tokens"] >= fits
    assert f"math={4 * available / 120_000:.4g}" in message
    assert f"math to {36000 / available:.4g}" in message


def test_cap_and_redistribute(pool, tmp_path):
    available = IndexedReader(tmp_path / "pool" / "math_0").index.num_tokens
    capped = build(pool, tmp_path / "c", target=120_000, on_shortfall="cap")
    spread = build(pool, tmp_path / "r", target=120_000, on_shortfall="redistribute")
    for report in (capped, spread):
        assert report["domains"]["math"]["tokens"] == report["domains"]["math"]["planned_tokens"] == 4 * available
        assert report["domains"]["math"]["epochs"] == 4
    assert sum(d["planned_tokens"] for d in capped["domains"].values()) == 84_000 + 4 * available
    assert spread["tokens"] >= 120_000
    planned = {n: d["planned_tokens"] for n, d in spread["domains"].items()}
    assert planned["code"] / planned["prose"] == pytest.approx(2.5, rel=1e-3)
    with pytest.raises(MixtureError, match="at this target nothing does: all its domains together allow"):
        build(pool, tmp_path / "n", target=10**7, on_shortfall="redistribute")


@pytest.mark.parametrize("how", ["cap", "redistribute"])
def test_where_domains_have_too_little_the_target_that_fits_is_named(pool, tmp_path, how):
    """Less of all keeps the shares, and no larger target does."""
    fits = int(4 * IndexedReader(tmp_path / "pool" / "math_0").index.num_tokens / 0.3)
    with pytest.warns(UserWarning, match="are not those asked for") as said:
        build(pool, tmp_path / "b", target=120_000, on_shortfall=how)
    (message,) = [str(warning.message) for warning in said]
    assert message.endswith(
        f"math: too few tokens within max_epochs for this target; a target of at most {fits:,} tokens keeps the shares, and so "
        "does a larger max_epochs."
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(pool, tmp_path / "c", target=fits, on_shortfall=how)


def test_no_target_keeps_the_share_of_what_is_used_up(pool, tmp_path):
    available = 4 * IndexedReader(tmp_path / "pool" / "math_0").index.num_tokens
    with pytest.warns(UserWarning, match="for this target; what keeps them is a larger max_epochs"):
        build(pool, tmp_path / "b", target=10_000, on_shortfall="cap", begin={"math": (0, available)})


def test_bad_arguments(pool, tmp_path):
    for options, message in (
        ({"target": 0}, "target is 0 tokens, expected at least 1"),
        ({"mode": "copy"}, "blend mode is 'copy', expected one of view, materialise, args"),
        ({"on_shortfall": "ignore"}, "on_shortfall is 'ignore', expected error, cap or redistribute"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(pool, tmp_path / "b", **options)
    with pytest.raises(MixtureError, match=r"mixture.json: unknown domain 'cod'"):
        build(pool, tmp_path / "b", mixture=Mixture({"cod": 1}, label="mixture.json"))


def test_stale_index_caches_are_named(pool, tmp_path):
    cache = tmp_path / "cache" / "GPTDataset_indices"
    cache.mkdir(parents=True)
    (cache / "0-description.txt").write_text(json.dumps({"dataset_path": str(tmp_path / "b")}))
    (cache / "1-description.txt").write_text(json.dumps({"dataset_path": str(tmp_path / "other")}))
    with pytest.warns(UserWarning, match=r"cached indexes of other data under .*b \(.*0-description\.txt\)"):
        build(pool, tmp_path / "b", index_cache=tmp_path / "cache")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(pool, tmp_path / "b", index_cache=tmp_path / "cache")
        build(pool, tmp_path / "c", index_cache=tmp_path / "cache")


def test_shares_that_are_not_those_asked_for_are_named(pool, tmp_path):
    """One document dwarfs its domain's part of the budget: it comes whole, or not at all."""
    pool["math"] = Source((make_indexed(tmp_path / "m", [30_000]),))
    message = "shares of its tokens are not those asked for: .*math 0.* instead of 0.3.* a larger target"
    with pytest.warns(UserWarning, match=f"^blend {tmp_path / 'b'}: the {message}"):
        report = build(pool, tmp_path / "b")
    with pytest.warns(UserWarning, match=f"^blend/found: the {message}"):
        build(pool, tmp_path / "c", label="blend/found")
    assert report["domains"]["math"]["tokens"] / report["tokens"] > 0.4
    table = [line.split() for line in blend_table(report).splitlines()]
    shares = {row[0]: (float(row[1]), float(row[2])) for row in table[1:4]}
    assert shares["math"] == (pytest.approx(30_000 / report["tokens"], abs=1e-4), 0.3)
    assert sum(share for share, _ in shares.values()) == pytest.approx(1, abs=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build({n: pool[n] for n in ("code", "prose")}, tmp_path / "d", mixture=Mixture({"code": 0.5, "prose": 0.5}))
