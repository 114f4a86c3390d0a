"""Blends, small enough to count by hand, and read by stock megatron.core."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from indexed_data import make_indexed, make_pool

from megatron_demix.data.blend import Pool, Source, build_blend, feasible_max_shares
from megatron_demix.data.blend_files import read_manifest
from megatron_demix.data.verify import verify_blend
from megatron_demix.errors import ConfigError, CorruptInput, IncompatibleInputs, MixtureError, OutputExists, VerificationFailed
from megatron_demix.indexed.reader import IndexedReader
from megatron_demix.mixture import Mixture

ROOT = Path(__file__).parents[3]
MIXTURE = Mixture({"code": 0.5, "prose": 0.2, "math": 0.3})


@pytest.fixture
def pool(tmp_path):
    rng = np.random.default_rng(0)
    sizes = {"code": 300, "prose": 500, "math": 80}
    return make_pool(tmp_path / "pool", {name: rng.integers(1, 200, n) for name, n in sizes.items()})


def build(pool, output, target=60_000, mixture=MIXTURE, **options):
    return build_blend(pool, mixture, target, output, seed=3, progress=False, **options)


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


def test_verify_reads_everything_again(pool, tmp_path):
    for mode in ("view", "materialise"):
        report = build(pool, tmp_path / mode, mode=mode)
        counts = verify_blend(tmp_path / mode, progress=False)
        assert counts["tokens"] == report["tokens"]
        assert counts["sources"] == "compared"
        assert {n: d["tokens"] for n, d in counts["domains"].items()} == {n: d["tokens"] for n, d in report["domains"].items()}


def flip_last_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


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


def test_foreign_file_at_the_target_is_kept(pool, tmp_path):
    (tmp_path / "b.bin").write_bytes(b"mine")
    with pytest.raises(OutputExists, match=r"b\.bin exists, but no finished blend does"):
        build(pool, tmp_path / "b")
    assert (tmp_path / "b.bin").read_bytes() == b"mine"


def test_killed_while_publishing(pool, tmp_path, monkeypatch):
    expected = build(pool, tmp_path / "whole")
    rename, done = os.rename, []

    def dies(source, target):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", dies)
    with pytest.raises(KeyboardInterrupt):
        build(pool, tmp_path / "b")
    monkeypatch.undo()
    assert not (tmp_path / "b.blend.json").exists()
    assert build(pool, tmp_path / "b") == expected
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_zero_weight_is_dropped_and_said(pool, tmp_path):
    report = build(pool, tmp_path / "b", mixture=Mixture({"code": 0.4, "prose": 0.6, "math": 0}))
    assert report["dropped_domains"] == ["math"]
    assert list(report["domains"]) == ["code", "prose"]
    assert (tmp_path / "b.bin").stat().st_size == sum(
        (tmp_path / "pool" / f"{n}_0.bin").stat().st_size for n in ("code", "prose")
    )


def test_args_mode(pool, tmp_path):
    two = make_pool(tmp_path / "more", {"code": [[10] * 30, [10] * 10], "prose": [5] * 90, "math": [7]})
    report = build(two, tmp_path / "a", target=600, mixture=Mixture({"code": 0.5, "prose": 0.5, "math": 0}), mode="args")
    words = (tmp_path / "a.args.txt").read_text().split()
    assert words[1::2] == [str(tmp_path / "more" / n) for n in ("code_0", "code_1", "prose_0")]
    assert [float(w) for w in words[::2]] == [0.375, 0.125, 0.5]
    assert not (tmp_path / "a.args.json").exists()
    assert report["files"].keys() == {".args.txt"}
    held_out = Pool({n: Source(s.prefixes, 4, valid=(Path("v"),), test=(Path("t"), Path("u"))) for n, s in two.items()})
    build(held_out, tmp_path / "h", target=600, mixture=Mixture({"code": 0.5, "prose": 0.5}), mode="args")
    splits = json.loads((tmp_path / "h.args.json").read_text())
    assert splits["train"] == words
    assert [float(w) for w in splits["test"][::2]] == [0.25] * 4
    assert all(float(w) > 0 for pairs in splits.values() for w in pairs[::2])


def test_bad_pools(pool, tmp_path):
    good = pool["code"]
    narrow = make_indexed(tmp_path / "wide", [3], vocab_size=100000)
    cases = [
        ({}, ConfigError, "no domains"),
        ({"a": Source(())}, ConfigError, "domain 'a' has no prefixes"),
        ({"a": good, "b": good}, ConfigError, "is given twice, in domain 'a' and 'b'"),
        ({"a": Source(good.prefixes, float("nan"))}, ConfigError, "max_epochs is nan, expected a finite number > 0"),
        ({"a": Source(good.prefixes, 0)}, ConfigError, "max_epochs is 0"),
        ({"a": good, "b": Source((narrow,))}, IncompatibleInputs, "wide holds int32 tokens, .*code_0 uint16"),
        ({"a": Source((make_indexed(tmp_path / "nil", []),))}, MixtureError, "domain 'a' is empty"),
        ({"a": Source((tmp_path / "absent",))}, CorruptInput, "absent.idx does not exist"),
    ]
    for bad, error, message in cases:
        with pytest.raises(error, match=message):
            build(bad, tmp_path / "out", mixture=Mixture.uniform(bad or ["a"]))
    assert not (tmp_path / "out.bin").exists()


def test_different_tokenizers_are_refused(pool, tmp_path):
    (tmp_path / "pool" / "code_0.meta.json").write_text('{"tokenizer": "aaa"}')
    (tmp_path / "pool" / "math_0.meta.json").write_text('{"tokenizer": "bbb"}')
    with pytest.raises(IncompatibleInputs, match=r"domain 'math': .*math_0 was made with tokenizer bbb, .*code_0 with aaa"):
        build(pool, tmp_path / "b")


def test_sentence_split_data_is_refused(tmp_path):
    from megatron_demix.indexed.writer import IndexedWriter

    with IndexedWriter(tmp_path / "s", np.dtype("<u2"), sentences=True) as writer:
        writer.add(np.arange(10), np.array([4, 6]), sequences_a_document=np.array([2]))
    with pytest.raises(IncompatibleInputs, match="sentence-split: 2 sequences in 1 documents"):
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
    caps = feasible_max_shares(pool, 120_000)
    assert caps["math"] == 4 * available / 120_000
    assert caps["prose"] == 1.0


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


def test_bad_arguments(pool, tmp_path):
    for options, message in (
        ({"target": 0}, "target is 0 tokens, expected at least 1"),
        ({"mode": "copy"}, "blend mode is 'copy', expected one of view, materialise, args"),
        ({"on_shortfall": "ignore"}, "on_shortfall is 'ignore', expected error, cap or redistribute"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(pool, tmp_path / "b", **options)
    with pytest.raises(MixtureError, match="unknown domain 'cod'"):
        build(pool, tmp_path / "b", mixture=Mixture({"cod": 1}))


def test_full_disk_leaves_nothing(pool, tmp_path):
    limited = f"""
import resource, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from pathlib import Path
from megatron_demix.data.blend import Pool, Source, build_blend
from megatron_demix.errors import StorageError
from megatron_demix.mixture import Mixture
pool = Pool(code=Source((Path("pool/code_0"),)))
for mode in ("view", "materialise"):
    try:
        build_blend(pool, Mixture(dict(code=1)), 40_000, Path("b"), mode=mode, seed=1, progress=False)
    except StorageError as e:
        print(e)
"""
    done = subprocess.run([sys.executable, "-c", limited], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.count("writing blend b: File too large") == 2, done.stderr
    assert not list(tmp_path.glob("b.*"))


def test_tools(pool, tmp_path):
    lines = "".join(f"  {n}: {{prefixes: [{s.prefixes[0].relative_to(tmp_path)}], max_epochs: 4}}\n" for n, s in pool.items())
    (tmp_path / "pool.yaml").write_text(f"domains:\n{lines}")
    (tmp_path / "mixture.json").write_text(json.dumps({"weights": dict(MIXTURE)}))

    def tool(name, *arguments):
        command = [sys.executable, ROOT / "tools" / name, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    options = ["--pool", "pool.yaml", "--mixture", "mixture.json", "--seed", "3", "--output", "b"]
    built = tool("build_blend.py", *options, "--target-tokens", "60k")
    assert built.returncode == 0, built.stderr
    assert "no prefix of the blend is more than" in built.stdout
    build(pool, tmp_path / "c")
    assert (tmp_path / "b.idx").read_bytes() == (tmp_path / "c.idx").read_bytes()
    verified = tool("verify_blend.py", "b", "--quiet")
    assert verified.returncode == 0, verified.stderr
    assert "b: sound." in verified.stdout
    short = tool("build_blend.py", *options, "--target-tokens", "30B")
    assert short.returncode == 4
    assert short.stderr.startswith("error: domain 'code' has")
    (tmp_path / "pool.yaml").write_text("domains: {code: {prefix: [x]}}")
    typo = tool("build_blend.py", *options, "--target-tokens", "60k")
    assert typo.returncode == 2
    assert "expected {prefixes: [path, ...], max_epochs: number}" in typo.stderr


def test_workers_write_one_blend_together(pool, tmp_path, monkeypatch):
    from megatron_demix.data import blend_data

    monkeypatch.setattr(blend_data, "SHARD_BYTES", 1)
    monkeypatch.setattr(blend_data, "SHARD_STEP_DOCUMENTS", 100)
    whole = build(pool, tmp_path / "whole" / "b", mode="materialise")
    first = build(pool, tmp_path / "b", mode="materialise", worker=(1, 3))
    assert first["files"] == {}
    assert not (tmp_path / "b.bin").exists()
    assert build(pool, tmp_path / "b", mode="materialise", worker=(0, 3))["files"] == {}
    assert build(pool, tmp_path / "b", mode="materialise", worker=(2, 3))["files"] == whole["files"]
    assert build(pool, tmp_path / "b", mode="materialise", worker=(0, 3))["files"] == whole["files"]
    for suffix in (".bin", ".idx", ".domains.npy"):
        assert (tmp_path / f"b{suffix}").read_bytes() == (tmp_path / "whole" / f"b{suffix}").read_bytes()
    with pytest.raises(ConfigError, match="worker is 3 of 3 in mode materialise"):
        build(pool, tmp_path / "c", mode="materialise", worker=(3, 3))
    with pytest.raises(ConfigError, match="and mode materialise"):
        build(pool, tmp_path / "c", worker=(0, 3))


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_blend import MIXTURE, build
from megatron_demix import native
from megatron_demix.data import blend_data
from megatron_demix.data.blend import Pool, Source
blend_data.SHARD_BYTES, blend_data.SHARD_STEP_DOCUMENTS = 1, 100
calls, gather = [], native.gather
def dies(*arguments, **options):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return gather(*arguments, **options)
native.gather = dies
pool = Pool({name: Source((Path(f"pool/{name}_0"),)) for name in MIXTURE})
build(pool, Path("b"), mode="materialise")
"""


def test_killed_while_writing(pool, tmp_path, monkeypatch):
    from megatron_demix import native
    from megatron_demix.data import blend_data

    monkeypatch.setattr(blend_data, "SHARD_BYTES", 1)
    monkeypatch.setattr(blend_data, "SHARD_STEP_DOCUMENTS", 100)
    path = [str(ROOT / "tests" / "unit" / "data"), str(ROOT / "tests")]
    environment = {**os.environ, "PYTHONPATH": path[1]}
    dead = subprocess.run(
        [sys.executable, "-c", KILLED, path[0]], cwd=tmp_path, env=environment, capture_output=True, timeout=60
    )
    assert dead.returncode == -9, dead.stderr
    assert not list(tmp_path.glob("b.*"))
    written, gather = [], native.gather
    monkeypatch.setattr(native, "gather", lambda *a, **o: (written.append(a[2]), gather(*a, **o))[1])
    resumed = build(pool, tmp_path / "b", mode="materialise")
    assert written[0] == 300  # the three finished shards were kept
    whole = build(pool, tmp_path / "whole", mode="materialise")
    assert resumed["content"] == whole["content"]
    for suffix in (".bin", ".idx", ".domains.npy", ".blend.json"):
        assert (tmp_path / f"b{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".b")] == []


def test_views_share_a_pool(pool, tmp_path):
    other = Mixture({"code": 0.2, "prose": 0.5, "math": 0.3})
    build(pool, tmp_path / "a", pool_cache=tmp_path / "cache")
    build(pool, tmp_path / "b", mixture=other, pool_cache=tmp_path / "cache")
    (shared,) = (tmp_path / "cache").iterdir()
    assert shared.stat().st_nlink == 3
    build(pool, tmp_path / "c")
    assert (tmp_path / "c.bin").read_bytes() == (tmp_path / "a.bin").read_bytes()
    shared.unlink()
    shared.write_bytes(b"short")
    with pytest.raises(CorruptInput, match=r"has 5 bytes, expected .* Delete it to have it made anew"):
        build(pool, tmp_path / "d", pool_cache=tmp_path / "cache")


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
        MixtureError, match=f"{4 * available - one['domains']['math']['tokens']:,} left after the earlier stages"
    ):
        build_curriculum(pool, [*stages[:1], Stage(MIXTURE, 80_000)], tmp_path / "c", seed=3, progress=False)
    with pytest.raises(ConfigError, match="curriculum: no stages"):
        build_curriculum(pool, [], tmp_path / "e", seed=3)


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


TWICE = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_blend import MIXTURE, build
from megatron_demix.data.blend import Pool, Source
pool = Pool({name: Source((Path(f"pool/{name}_0"),)) for name in MIXTURE})
for n in range(10):
    print(build(pool, Path(f"b{n}"), mode="materialise")["content"])
"""


def test_two_builders_on_one_target(pool, tmp_path):
    command = [sys.executable, "-c", TWICE, str(ROOT / "tests" / "unit" / "data")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    options = {"cwd": tmp_path, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    builders = [subprocess.Popen(command, **options) for _ in range(2)]
    (one, errors_one), (two, errors_two) = (b.communicate(timeout=120) for b in builders)
    assert [b.returncode for b in builders] == [0, 0], errors_one + errors_two
    assert one == two
    assert len(set(one.split())) == 1
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []
    assert verify_blend(tmp_path / "b9", progress=False)["sources"] == "compared"
