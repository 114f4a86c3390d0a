"""A blend as arguments of stock Megatron, and the tools."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from blends import MIXTURE, build
from indexed_data import make_pool

from megatron_demix.data.blend import Pool, Source
from megatron_demix.data.blend_files import read_manifest
from megatron_demix.data.curriculum import Stage, build_curriculum
from megatron_demix.data.verify import verify_blend
from megatron_demix.errors import ConfigError, OutputExists
from megatron_demix.mixture import Mixture

ROOT = Path(__file__).parents[3]


def as_megatron_reads(prefix: Path):
    """What stock Megatron makes of --data-args-path and of --per-split-data-args-path: the words of the one, the lists of the
    other (by key, all three needed), each through megatron.core's own parser."""
    from megatron.core.datasets.utils import get_blend_from_list

    splits = json.loads(Path(f"{prefix}.args.json").read_text())
    words = Path(f"{prefix}.args.txt").read_text().split()
    return get_blend_from_list(words), [get_blend_from_list(splits[split]) for split in ("train", "valid", "test")]


def test_args_mode(tmp_path):
    two = make_pool(tmp_path / "more", {"code": [[10] * 30, [10] * 10], "prose": [5] * 90, "math": [7]})
    report = build(two, tmp_path / "a", target=600, mixture=Mixture({"code": 0.5, "prose": 0.5, "math": 0}), mode="args")
    train, splits = as_megatron_reads(tmp_path / "a")
    assert train == ([str(tmp_path / "more" / n) for n in ("code_0", "code_1", "prose_0")], [0.375, 0.125, 0.5])
    assert splits == [train, None, None]  # no domain has held-out data
    assert report["files"].keys() == {".args.txt", ".args.json"}
    held_out = Pool({n: Source(s.prefixes, 4, test=(Path("t"), Path("u"))) for n, s in two.items()})
    held_out["code"] = Source(two["code"].prefixes, 4, valid=(Path("v"),), test=(Path("w"),))
    build(held_out, tmp_path / "h", target=600, mixture=Mixture({"code": 0.5, "prose": 0.5}), mode="args")
    again, (_, valid, test) = as_megatron_reads(tmp_path / "h")
    assert again == train
    assert valid == ([str(Path("v").resolve())], [1.0])
    assert test[1] == [0.5, 0.25, 0.25]
    blank = make_pool(tmp_path / "a blank", {"code": [10]})
    with pytest.raises(ConfigError, match=r"code_0' has a blank in it, at which Megatron's --data-args-path would cut it"):
        build(blank, tmp_path / "b", target=5, mixture=Mixture({"code": 1}), mode="args")
    assert not list(tmp_path.glob(".b.work-*"))


def test_megatron_takes_no_whole_documents(tmp_path):
    """Weights are the shares asked for, however long documents are, and the manifest and its warnings speak of these."""
    long = make_pool(tmp_path, {"code": [1000] * 3, "prose": [7] * 90})
    shares = Mixture({"code": 0.1, "prose": 0.9})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = build(long, tmp_path / "a", target=600, mixture=shares, mode="args")
    assert as_megatron_reads(tmp_path / "a")[0][1] == [0.1, 0.9]
    assert {n: (d["tokens"], d["documents"]) for n, d in report["domains"].items()} == {"code": (60, 1), "prose": (540, 78)}
    assert (report["tokens"], report["dropped_domains"]) == (600, [])
    with pytest.warns(UserWarning, match=r"code 0\.6468 instead of 0\.1, .* Documents are whole"):
        build(long, tmp_path / "v", target=600, mixture=shares)


def test_a_curriculum_of_arguments_repeats_nothing(pool, tmp_path):
    stages = [Stage(Mixture({"code": 1}), 9_000), Stage(Mixture({"prose": 1}), 9_000)]
    options = {"seed": 3, "progress": False, "mode": "args"}
    assert len(build_curriculum(pool, stages, tmp_path / "a", **options)) == 2
    with pytest.raises(ConfigError, match=r"stage 3 of 3: 'code' is in an earlier stage, too, .* Megatron would begin it anew"):
        build_curriculum(pool, [*stages, stages[0]], tmp_path / "b", **options)
    assert not list(tmp_path.glob("b*"))


@pytest.mark.parametrize("changed", ["prefixes", "valid", "test"])
def test_arguments_with_other_paths_are_another_blend(tmp_path, changed):
    """The same bytes that lie elsewhere are the same data for a view, but not for arguments, which are paths."""
    for folder in ("here", "there"):
        make_pool(tmp_path / folder, {"code": [10] * 30})
    sources = dict.fromkeys(("prefixes", "valid", "test"), (tmp_path / "here" / "code_0",))
    other = sources | {changed: (tmp_path / "there" / "code_0",)}
    options = {"target": 100, "mixture": Mixture({"code": 1}), "mode": "args"}
    once = build({"code": Source(**sources)}, tmp_path / "a", **options)
    assert build({"code": Source(**sources)}, tmp_path / "a", **options) == once
    with pytest.raises(OutputExists, match="it was built from other data or settings"):
        build({"code": Source(**other)}, tmp_path / "a", **options)


def test_stock_builder_takes_the_arguments(pool, tmp_path):
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    class Ids:
        vocab_size, eod, pad, unique_identifiers = 50000, 0, 1, {"name": "ids"}

    held_out = Pool({n: Source(s.prefixes, 4, valid=s.prefixes) for n, s in pool.items()})
    build(held_out, tmp_path / "a", mode="args")
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=64,
        blend_per_split=as_megatron_reads(tmp_path / "a")[1],
        tokenizer=Ids(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    train, valid, test = BlendedMegatronDatasetBuilder(GPTDataset, [300, 30, 0], lambda: True, config).build()
    assert len(train) >= 300
    assert len(valid) >= 30
    assert test is None
    drawn = np.bincount(train.dataset_index[:300], minlength=3) / 300
    assert np.abs(drawn - list(MIXTURE.values())).max() < 0.01


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
    assert built.stdout.splitlines()[0].split()[:4] == ["domain", "share", "asked", "for"]
    build(pool, tmp_path / "c")
    assert (tmp_path / "b.idx").read_bytes() == (tmp_path / "c.idx").read_bytes()
    verified = tool("verify_blend.py", "b", "--quiet")
    assert verified.stderr == ""
    assert verified.returncode == 0, verified.stderr
    assert "b: sound." in verified.stdout
    short = tool("build_blend.py", *options, "--target-tokens", "30B")
    assert short.returncode == 4
    assert short.stderr.startswith("error: domain 'code' has")
    (tmp_path / "pool.yaml").write_text("domains: {code: {prefix: [x]}}")
    typo = tool("build_blend.py", *options, "--target-tokens", "60k")
    assert typo.returncode == 2
    assert "expected {prefixes: [path, ...], max_epochs: number}" in typo.stderr


def test_a_curriculum_by_the_tool(pool, tmp_path):
    lines = "".join(f"  {n}: {{prefixes: [{s.prefixes[0].relative_to(tmp_path)}], max_epochs: 4}}\n" for n, s in pool.items())
    (tmp_path / "pool.yaml").write_text(f"domains:\n{lines}")
    later = {"code": 0.2, "prose": 0.7, "math": 0.1}
    stages = [{"weights": dict(MIXTURE), "tokens": "40k"}, {"weights": later, "tokens": 30000}]
    (tmp_path / "stages.json").write_text(json.dumps({"stages": stages}))
    command = [sys.executable, ROOT / "tools" / "build_blend.py", "--pool", "pool.yaml", "--mixture", "stages.json", "--quiet"]
    command += ["--seed", "3", "--output", "c"]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    for n, target in ((1, 40_000), (2, 30_000)):
        assert verify_blend(tmp_path / f"c-stage{n}", progress=False)["tokens"] >= target
    one, two = (read_manifest(tmp_path / f"c-stage{n}") for n in (1, 2))
    assert two["domains"]["math"]["begin"] == one["domains"]["math"]["documents"]
    wrong = subprocess.run([*command, "--target-tokens", "5"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert wrong.returncode == 2
    assert "the stages of a curriculum have their own" in wrong.stderr
    form = 'expected {"weights": {"<domain>": share, ...}, "tokens": "10B"}.'
    for given, said in (
        (3, "stages.json: stages are 3, expected a list of {"),
        ([stages[0], 3], f"stages.json, stage 2: found 3, {form}"),
        ([{"tokens": "10B"}], f"stages.json, stage 1: found {{'tokens': '10B'}}, {form}"),
        ([{"weights": [1], "tokens": 1}], "stages.json, stage 1: weights are [1], expected a share for each domain"),
        ([{"weights": later, "tokens": "many"}], "stages.json, stage 1: tokens: 'many' is not understood"),
    ):
        (tmp_path / "stages.json").write_text(json.dumps({"stages": given}))
        wrong = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert wrong.returncode == (4 if "weights are" in said else 2)
        assert wrong.stderr.startswith(f"error: {said}")
