"""Cleaning: real documents with planted duplicates, junk, and leaked test items come out without them, with an account."""

import gzip
import inspect
import io
import json
import pydoc_data.topics
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import date
from decimal import Decimal
from functools import lru_cache
from pathlib import Path

import pytest
from folders import contents

pytest.importorskip("datatrove")

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from megatron_demix.data.clean import run, scores
from megatron_demix.data.clean.models import train_perplexity, train_quality
from megatron_demix.data.clean.run import clean_domains
from megatron_demix.errors import ConfigError, CorruptInput, Incomplete, OutputExists
from megatron_demix.study.load import clean_spec
from megatron_demix.units import parse_cut

ROOT = Path(__file__).parents[3]
TOPICS = [t for t in pydoc_data.topics.topics.values() if len(t.split()) > 300]
PROSE = [p for t in pydoc_data.topics.topics.values() for p in t.split("\n\n") if len(p.split()) > 30]
CODE = [
    text
    for module in (io, json.decoder, inspect, pytest, subprocess, random)
    for text in Path(module.__file__).read_text().split("\n\n\n")
    if len(text.split()) > 30
]
NOTHING = {"exact_duplicates": False, "near_duplicates": None}


def write(path, texts, **fields):
    path.write_text("".join(json.dumps({"text": t, **fields}) + "\n" for t in texts))
    return [path]


def records(folder):
    lines = (line for p in sorted(folder.glob("*.jsonl.zst")) for line in zstandard.open(p, "rt", encoding="utf-8"))
    return [json.loads(line) for line in lines]


def texts(folder):
    return [record["text"] for record in records(folder)]


def clean(inputs, output, spec, **options):
    return clean_domains(inputs, output, clean_spec(spec), progress=False, **options)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """(inputs, output, report) of two domains with what each step should find."""
    folder = tmp_path_factory.mktemp("planted")
    near = TOPICS[3].replace(TOPICS[3].split()[150], "changed", 1)
    nearer = TOPICS[25].replace(TOPICS[25].split()[100], "changed", 1)
    item = {
        "question": "Which of the four seasons does the old gardener of the southern village like best, and why?",
        "answer": "Spring",
    }
    (folder / "gardens.jsonl").write_text(json.dumps(item) + "\n" + json.dumps({"question": "Why?", "answer": "No."}) + "\n")
    leak = f"{PROSE[0]} As they say: {item['question'].upper()} Nobody knows."
    inputs = {
        "manual": write(folder / "a.jsonl", [*TOPICS[:20], TOPICS[0], near, "Too short.", "Too short."], url="x")
        + write(folder / "b.jsonl", [nearer]),
        "other": write(folder / "c.jsonl", [*TOPICS[20:30], TOPICS[5], "buy now " * 200, leak, ""]),
    }
    spec = {
        "heuristics": {"use": ["gopher_repetition"], "domains": ["other"]},
        "contamination": {"tasks": {"gardens": [str(folder / "gardens.jsonl")]}},
    }
    return inputs, folder / "clean", spec, clean(inputs, folder / "clean", spec), (near, nearer, leak)


def test_what_was_planted_is_removed_with_its_reason(planted):
    _, output, _, report, (near, _, leak) = planted
    removed = output / "removed"
    assert texts(removed / "exact_duplicate/manual") == [TOPICS[0], "Too short."]
    assert TOPICS[5] in texts(removed / "exact_duplicate/other")
    assert texts(removed / "near_duplicate/manual") == [near]
    assert "buy now " * 200 in texts(removed / "gopher_repetition/other")
    (found,) = records(removed / "contaminated/other")
    assert found["text"] == leak
    assert found["removed"]["document"] == "c.jsonl:13"
    assert found["removed"]["contaminated_task"] == "gardens"
    assert "old gardener" in found["removed"]["contaminated_ngram"]
    assert texts(removed / "unreadable/other") == [""]
    assert report["tasks"] == {"gardens": {"items": 2, "too_short": 1, "ngrams": 6}}


def test_scripts_without_blanks(tmp_path):
    """Each character is a word: else a document is one word, and has no n-gram."""
    rng = random.Random(0)
    for name, letters in (("han", range(0x4E00, 0x5200)), ("thai", range(0xE01, 0xE2F)), ("kana", range(0x30A1, 0x30F5))):
        sentences = ["".join(rng.choices([chr(c) for c in letters], k=20)) for _ in range(61)]
        document, near = "。".join(sentences[:60]), "。".join([*sentences[:30], sentences[60], *sentences[31:60]])
        (tmp_path / f"{name}.task").write_text(sentences[60])
        spec = {"contamination": {"tasks": {"t": [str(tmp_path / f"{name}.task")]}}}
        inputs = {"x": write(tmp_path / f"{name}.jsonl", [document, document.replace("。", ""), near])}
        with pytest.warns(UserWarning, match="removed 2 of 3"):
            report = clean(inputs, tmp_path / f"{name}_out", spec)
        assert report["tasks"]["t"] == {"items": 1, "too_short": 0, "ngrams": 8}
        removed = report["domains"]["x"]["removed"]
        assert {reason: entry["documents"] for reason, entry in removed.items()} == {"contaminated": 1, "near_duplicate": 1}
        assert report["domains"]["x"]["too_short"] == 0


@pytest.mark.parametrize("use", ["gopher_repetition", "gopher_quality", "c4", "fineweb"])
def test_filters_with_limits_of_words_take_those_between_blanks(use, tmp_path):
    """Japanese in an English document is some long words there, and not hundreds of one letter."""
    rng = random.Random(0)
    japanese = "".join(chr(rng.randrange(0x4E00, 0x5200)) for _ in range(2500))
    prose = [line for topic in TOPICS for line in topic.split("\n\n") if len(line.split()) > 30][:12]
    documents = ["\n".join(prose), "\n".join([*prose, f"{japanese}."])]
    clean({"x": write(tmp_path / "x.jsonl", documents)}, tmp_path / "out", {**NOTHING, "heuristics": {"use": [use]}})
    assert len(texts(tmp_path / "out" / "x")) in (0, 2)


def test_what_is_too_short_to_be_looked_for_is_said(tmp_path):
    (tmp_path / "task.jsonl").write_text('{"q": "one two three"}\n')
    spec = {"contamination": {"tasks": {"t": [str(tmp_path / "task.jsonl")]}}}
    inputs = {"short": write(tmp_path / "a.jsonl", ["one", "two", "two", "three", *PROSE[:1]])}
    with (
        pytest.warns(UserWarning, match=r"look for 1 of 1 items of task 't': they have fewer words than an n-gram \(13\)"),
        pytest.warns(UserWarning, match=r"compare 3 of 5 documents of domain 'short' .* than an n-gram \(24\)"),
    ):
        report = clean(inputs, tmp_path / "out", spec)
    assert report["domains"]["short"]["too_short"] == 3


def test_nothing_is_logged_however_often(tmp_path, capfd):
    inputs = {"x": write(tmp_path / "x.jsonl", PROSE[:3])}
    for name in ("one", "two"):
        clean(inputs, tmp_path / name, {})
    assert capfd.readouterr() == ("", "")


def test_numbers_tell_documents_apart(tmp_path):
    rng = random.Random(0)
    sums = ["\n".join("{} + {} = {}".format(*(rng.randrange(1000) for _ in range(3))) for _ in range(20)) for _ in range(40)]
    report = clean({"sums": write(tmp_path / "a.jsonl", sums)}, tmp_path / "out", {})
    assert report["domains"]["sums"]["removed"] == {}


def test_a_domain_that_loses_most_of_its_documents_is_named(tmp_path):
    inputs = {"dull": write(tmp_path / "a.jsonl", ["again"] * 5 + ["new"]), "fine": write(tmp_path / "b.jsonl", PROSE[:5])}
    with pytest.warns(UserWarning, match=r"removed 4 of 6 documents of domain 'dull': 4 as exact_duplicate\. ") as caught:
        clean(inputs, tmp_path / "out", {"near_duplicates": None})
    assert len(caught) == 1


def test_the_domain_named_first_keeps_its_own(planted):
    """Of near duplicates, too: TOPICS[25] is removed from `other`, though `manual` has only an altered copy of it."""
    _, output, _, _, (_, nearer, _) = planted
    kept = texts(output / "manual")
    assert TOPICS[5] in kept
    assert nearer in kept
    assert TOPICS[25] not in texts(output / "other")


def test_what_an_earlier_domain_keeps_depends_on_later_ones(tmp_path):
    """A document between two that are hardly alike makes one cluster of them."""
    rng = random.Random(0)
    pairs, between = [], []
    for _ in range(10):
        words = [f"w{rng.randrange(10**6)}" for _ in range(3000)]
        between.append(" ".join(words))
        for begin in (100, 1600):
            changed = set(range(begin, begin + 1400, 140))
            pairs.append(" ".join("changed" if n in changed else word for n, word in enumerate(words)))
    inputs = {"a": write(tmp_path / "a.jsonl", pairs), "b": write(tmp_path / "b.jsonl", between)}
    alone = clean({"a": inputs["a"]}, tmp_path / "alone", {})
    with pytest.warns(UserWarning, match="of domain 'b'"):
        both = clean(inputs, tmp_path / "both", {})
    kept = [report["domains"]["a"]["kept"]["a"]["documents"] for report in (alone, both)]
    assert kept[1] < kept[0]


def test_the_account_adds_up_and_names_examples(planted):
    inputs, output, _, report, _ = planted
    assert report == json.loads((output / "clean.json").read_text())
    assert sorted(p.name for p in output.iterdir()) == ["clean.json", "manual", "other", "removed"]
    for name, entry in report["domains"].items():
        lines = [json.loads(line)["text"] for p in inputs[name] for line in p.read_text().splitlines()]
        kept = texts(output / name)
        assert entry["documents"] == len(lines)
        assert entry["kept"] == {name: {"documents": len(kept), "bytes": sum(len(t.encode()) for t in kept)}}
        gone = {reason: texts(output / "removed" / reason / name) for reason in entry["removed"]}
        assert {r: e["documents"] for r, e in entry["removed"].items()} == {r: len(t) for r, t in gone.items()}
        assert sorted([*kept, *(t for found in gone.values() for t in found)]) == sorted(lines)
    assert report["domains"]["manual"]["removed"]["exact_duplicate"]["examples"][0] == {"document": "a.jsonl:21"}
    assert str(output.parent) not in (output / "clean.json").read_text()


def test_records_keep_their_fields(planted):
    _, output, _, _, _ = planted
    assert {frozenset(r.items()) for r in records(output / "manual")} >= {frozenset({"text": TOPICS[1], "url": "x"}.items())}


def test_any_number_of_workers_gives_the_same_bytes(planted, tmp_path):
    inputs, output, spec, _, _ = planted
    clean(inputs, tmp_path / "again", spec, workers=3)
    assert contents(tmp_path / "again") == contents(output)


def test_parquet_gz_zst_and_plain_text(tmp_path):
    rows = pa.table({"body": TOPICS[:3], "year": [1, 2, 3]})
    pq.write_table(rows, tmp_path / "a.parquet")
    lines = "".join(json.dumps({"body": t}) + "\n" for t in TOPICS[2:5]).encode()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(lines))
    (tmp_path / "d.txt").write_text(TOPICS[7])
    inputs = {"x": [tmp_path / n for n in ("a.parquet", "b.jsonl.gz", "c.jsonl.zst", "d.txt")]}
    report = clean(inputs, tmp_path / "out", {"near_duplicates": None}, json_keys={"x": "body"})
    assert [r["body"] for r in records(tmp_path / "out/x")] == [*TOPICS[:5], TOPICS[7]]
    assert records(tmp_path / "out/x")[1] == {"body": TOPICS[1], "year": 2}
    assert report["domains"]["x"]["removed"]["exact_duplicate"]["documents"] == 4


def test_what_is_no_document_ends_the_run_or_is_listed(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\nnot json\n{"body": "x"}\n')
    with pytest.raises(CorruptInput, match=r"a\.jsonl:2: not JSON .* \(--on-bad-document reject; in a study, prep"):
        clean({"x": [tmp_path / "a.jsonl"]}, tmp_path / "out", NOTHING)
    assert not (tmp_path / "out").exists()
    report = clean({"x": [tmp_path / "a.jsonl"]}, tmp_path / "out", NOTHING, on_bad_document="reject")
    assert report["domains"]["x"]["removed"]["unreadable"]["documents"] == 2
    listed = records(tmp_path / "out/removed/unreadable/x")
    assert listed[0]["text"] == "not json"
    assert [r["removed"]["document"] for r in listed] == ["a.jsonl:2", "a.jsonl:3"]


def test_files_of_one_name_are_told_apart(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    inputs = {"x": [write(tmp_path / folder / "x.jsonl", [folder, ""])[0] for folder in "ab"]}
    clean(inputs, tmp_path / "out", NOTHING)
    removed = [record["removed"]["document"] for record in records(tmp_path / "out/removed/unreadable/x")]
    assert removed == ["a/x.jsonl:2", "b/x.jsonl:2"]


def test_fields_that_json_cannot_hold_are_text(tmp_path):
    """Nobody trains on them."""
    rows = {"text": PROSE[:1], "sha1": [b"\xff\x00"], "price": [Decimal("1.50")], "day": [date(2020, 1, 2)], "n": [2**64 - 1]}
    pq.write_table(pa.table(rows | {"n": pa.array(rows["n"], pa.uint64())}), tmp_path / "a.parquet")
    fields = f'"n": {2**64}, "deep": [{{"m": {"9" * 5000}}}], "least": {-(2**63)}, "bad": "a\\ud800"'
    (tmp_path / "b.jsonl").write_text(f'{{"text": "fine", {fields}}}\n')
    clean({"x": [tmp_path / "a.parquet", tmp_path / "b.jsonl"]}, tmp_path / "out", NOTHING)
    row, line = records(tmp_path / "out/x")
    assert row == {"text": PROSE[0], "sha1": "/wA=", "price": "1.50", "day": "2020-01-02", "n": 2**64 - 1}
    assert line == {"text": "fine", "n": str(2**64), "deep": [{"m": "9" * 5000}], "least": -(2**63), "bad": "a?"}


def test_rows_that_are_not_utf8(tmp_path):
    """In the text or in another field."""
    raw = pa.array([b"good", b"a\xff", b"fine"])
    bad = pa.StringArray.from_buffers(3, *raw.buffers()[1:])
    pq.write_table(pa.table({"text": bad, "by": bad[::-1].take([2, 0, 1])}), tmp_path / "a.parquet")
    with pytest.raises(CorruptInput, match=r"a\.parquet:2: not UTF-8 \(byte 0xff at offset 1\)"):
        clean({"x": [tmp_path / "a.parquet"]}, tmp_path / "out", NOTHING)
    clean({"x": [tmp_path / "a.parquet"]}, tmp_path / "out", NOTHING, on_bad_document="reject")
    assert records(tmp_path / "out/x") == [{"text": "good", "by": "good"}, {"text": "fine", "by": "Yf8="}]
    listed = records(tmp_path / "out/removed/unreadable/x")
    assert [(r["text"], r["removed"]["document"]) for r in listed] == [("a\ufffd", "a.parquet:2")]


def test_a_task_that_is_not_utf8(tmp_path):
    (tmp_path / "task.txt").write_bytes(b"a\xff")
    spec = {"contamination": {"tasks": {"t": [str(tmp_path / "task.txt")]}}}
    with pytest.raises(CorruptInput, match=r"task\.txt:1: not UTF-8"):
        clean({"x": write(tmp_path / "a.jsonl", TOPICS)}, tmp_path / "out", spec)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A language model of prose, and a classifier of prose (high) against code (low)."""
    folder = tmp_path_factory.mktemp("models")
    prose, code = write(folder / "prose.jsonl", PROSE[100:]), write(folder / "code.jsonl", CODE)
    perplexity = train_perplexity(prose, folder / "prose", vocab_size=1000)
    quality = train_quality({"high": prose, "low": code}, folder / "quality.bin")
    return folder, perplexity, quality


def test_models_say_how_good_they_are(models):
    folder, perplexity, quality = models
    assert sorted(p.name for p in (folder / "prose").iterdir()) == ["model.arpa", "sentencepiece.model"]
    assert perplexity["documents"] == len(PROSE[100:])
    assert 1 < perplexity["perplexity"]["sample"] < perplexity["perplexity"]["held_out"] < 500
    assert quality["high"]["documents"] == len(PROSE[100:]) // 10
    assert min(quality["high"]["precision"], quality["low"]["recall"]) > 0.8
    with pytest.raises(OutputExists, match="nothing is overwritten"):
        train_quality({"high": [folder / "prose.jsonl"], "low": [folder / "code.jsonl"]}, folder / "quality.bin")


def test_one_rare_character_does_not_make_a_document_the_worst(models):
    folder, _, _ = models
    model = scores.LocalKenlm(folder / "prose/model.arpa", folder / "prose/sentencepiece.model")
    worst = max(model.get_perplexity(text) for text in PROSE[:100])
    assert model.get_perplexity(PROSE[0] + " \N{SNOWMAN}") < 1.5 * model.get_perplexity(PROSE[0]) < 1.5 * worst
    assert model.get_perplexity("\N{SNOWMAN}" * 20 + " \N{CLOUD}" * 20) > worst


def test_a_label_with_a_blank_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"label 'very good' has a blank, at which fastText would end it"):
        train_quality({"very good": write(tmp_path / "a.jsonl", PROSE), "low": [tmp_path / "a.jsonl"]}, tmp_path / "q.bin")


def test_scores_drop_the_worst_and_grade_the_rest(models, tmp_path):
    folder, _, _ = models
    rng = random.Random(1)
    noise = [" ".join("".join(rng.choices("bcdfgxzq", k=6)) for _ in range(60)) for _ in range(2)]
    general = [*PROSE[:98], *noise]
    math = [*PROSE[:40], *CODE[:40]]
    inputs = {"general": write(tmp_path / "g.jsonl", general), "math": write(tmp_path / "m.jsonl", math)}
    spec = NOTHING | {
        "perplexity": {
            "model": folder / "prose/model.arpa",
            "sentencepiece": folder / "prose/sentencepiece.model",
            "domains": ["general"],
        },
        "quality": {"model": folder / "quality.bin", "drop": "0%", "domains": ["math"]},
    }
    grades = {"math": {"high": parse_cut("50%"), "medium": parse_cut("25%"), "low": None}}
    report = clean(inputs, tmp_path / "out", spec, grades=grades)
    assert texts(tmp_path / "out/removed/perplexity/general") == noise
    assert report["domains"]["general"]["kept"]["general"]["documents"] == 98
    assert "general" not in {p.name for p in (tmp_path / "out/removed").glob("quality/*")}
    assert {k: v["documents"] for k, v in report["domains"]["math"]["kept"].items()} == {
        "math_high": 40,
        "math_medium": 20,
        "math_low": 20,
    }
    high = texts(tmp_path / "out/math_high")
    assert sum(t in PROSE for t in high) >= 36
    assert sum(t in PROSE for t in texts(tmp_path / "out/math_low")) <= 2
    bounds = report["domains"]["math"]["bounds"]
    assert bounds["grade high"] > bounds["grade medium"]
    # The same cut, given as a score.
    again = {"math": {"high": parse_cut(bounds["grade high"]), "low": None}}
    report = clean(inputs, tmp_path / "again", spec, grades=again)
    assert texts(tmp_path / "again/math_high") == high


@pytest.mark.parametrize("workers", [1, 2])
def test_models_are_read_once_a_worker_and_in_silence(models, tmp_path, monkeypatch, capfd, workers):
    folder, _, _ = models
    inputs = {"x": [write(tmp_path / f"{i}.jsonl", [PROSE[i]])[0] for i in range(5)]}
    spec = NOTHING | {
        "perplexity": {"model": folder / "prose/model.arpa", "sentencepiece": folder / "prose/sentencepiece.model"},
        "quality": {"model": folder / "quality.bin"},
    }
    read = tmp_path / "read"
    for name in ("_kenlm", "load_fasttext"):
        load = getattr(scores, name)
        monkeypatch.setattr(scores, name, lambda path, load=load: (read.open("a").write(f"{path.name}\n"), load(path))[1])
    monkeypatch.setattr(scores, "_quality_model", lru_cache(maxsize=1)(scores.load_fasttext))
    clean(inputs, tmp_path / "out", spec, workers=workers)
    loads = Counter(read.read_text().split())
    assert set(loads) == {"model.arpa", "quality.bin"}
    assert max(loads.values()) <= 1 + workers  # once to see that they can be read
    assert capfd.readouterr() == ("", "")
    assert scores._perplexity_model.cache_info().currsize == scores._quality_model.cache_info().currsize == 0


def test_training_a_model_of_perplexity_is_silent(tmp_path, capfd):
    train_perplexity(write(tmp_path / "prose.jsonl", PROSE[:100]), tmp_path / "out", vocab_size=500)
    assert capfd.readouterr() == ("", "")


def test_a_model_of_words(models, tmp_path):
    """Without SentencePiece: an ARPA file of words, scored line by line."""
    unigrams = "-9\t<unk>\t0\n-99\t<s>\t0\n-1\t</s>\n-1\tgood\t0"
    arpa = f"\\data\\\nngram 1=4\nngram 2=1\n\n\\1-grams:\n{unigrams}\n\n\\2-grams:\n-1\tgood good\n\n\\end\\\n"
    (tmp_path / "words.arpa").write_text(arpa)
    inputs = {"x": write(tmp_path / "x.jsonl", ["good good good", "good good bad", "good\ngood"])}
    spec = NOTHING | {"perplexity": {"model": tmp_path / "words.arpa", "drop": 100}}
    clean(inputs, tmp_path / "out", spec)
    (dropped,) = records(tmp_path / "out/removed/perplexity/x")
    assert dropped["text"] == "good good bad"
    assert dropped["removed"]["perplexity"] == 1000.0
    assert dropped["removed"]["filter_reason"] == "perplexity 1000, the domain's bound is 100"


@pytest.mark.parametrize(
    ("spec", "grades", "message"),
    [
        ({"heuristics": {"use": ["magic"]}}, {}, "heuristics.use.0: expected 'gopher_repetition', .*found 'magic'"),
        ({"near_dups": None}, {}, "near_dups: unknown key; did you mean 'near_duplicates'"),
        ({"quality": {"model": "q.bin", "drop": "3 percent"}}, {}, "quality.drop: cut: '3 percent' is not understood"),
        ({"heuristics": {"use": ["c4"], "domains": ["y"]}}, {}, "heuristics.domains: 'y' is not one of x"),
        ({"perplexity": {"model": "no.arpa"}}, {}, "the model no.arpa does not exist. .* nothing is downloaded"),
        ({}, {"x": {"high": None}}, "grades: 'x' has no score"),
        ({"quality": {"model": "q.bin"}}, {"x": {"high": None}}, "expected two or more, each with a cut but the last"),
        (
            {"quality": {"model": "q.bin"}},
            {"x": {"a": "60%", "b": "50%", "c": None}},
            "add up to 110%, nothing is left for 'c'",
        ),
        ({"quality": {"model": "q.bin"}}, {"x": {"a": "60%", "b": "0.5", "c": None}}, "partly shares and partly scores"),
        (
            {"quality": {"model": "q.bin"}},
            {"x": {"a": "0.5", "b": "0.6", "c": None}},
            "the scores must fall from grade to grade",
        ),
        ({"quality": {"model": "q.bin"}}, {"y": {}}, "grades: 'y' is not one of x"),
        ({"contamination": {"tasks": {"t": ["no.jsonl"]}}}, {}, "no.jsonl matches no file"),
    ],
)
def test_settings_that_cannot_be(spec, grades, message, tmp_path):
    cuts = {d: {name: cut and parse_cut(cut) for name, cut in g.items()} for d, g in grades.items()}
    with pytest.raises(ConfigError, match=message):
        clean({"x": write(tmp_path / "x.jsonl", ["a"])}, tmp_path / "out", spec, grades=cuts)
    assert not (tmp_path / "out").exists()


def test_models_that_are_none(models, tmp_path):
    folder, _, _ = models
    inputs = {"x": write(tmp_path / "x.jsonl", ["a"])}
    for name, what in (("perplexity", "not a model that KenLM reads"), ("quality", "not a fastText model")):
        with pytest.raises(CorruptInput, match=what):
            clean(inputs, tmp_path / "out", {name: {"model": inputs["x"][0]}})
    with pytest.raises(ConfigError, match=r"quality\.bin knows no label 'best'; it has (high, low|low, high)"):
        clean(inputs, tmp_path / "out", {"quality": {"model": folder / "quality.bin", "label": "best"}})


def test_nothing_is_overwritten_and_one_works_at_a_time(tmp_path):
    inputs = {"x": write(tmp_path / "x.jsonl", ["a"])}
    with run._only_one(tmp_path / ".out.work"), pytest.raises(Incomplete, match="another process that cleans in"):
        clean(inputs, tmp_path / "out", NOTHING)
    report = clean(inputs, tmp_path / "out", NOTHING)
    assert not (tmp_path / ".out.work").exists()
    assert clean(inputs, tmp_path / "out", NOTHING) == report
    with pytest.raises(OutputExists, match=r"out exists, and was not made from these inputs with these settings"):
        clean(inputs, tmp_path / "out", {})
    with pytest.raises(ConfigError, match="cannot be called 'removed'"):
        clean({"removed": inputs["x"]}, tmp_path / "else", NOTHING)


def test_killed_and_run_again_it_ends_with_the_same_bytes(planted, tmp_path):
    inputs, output, _, _, _ = planted
    given = [f"{domain}={p}" for domain, paths in inputs.items() for p in paths]
    tasks = output.parent / "gardens.jsonl"
    command = [sys.executable, ROOT / "tools/clean_data.py", "--input", *given, "--output", tmp_path / "out", "--workers", "2",
               "--heuristics", "gopher_repetition", "--heuristics-domains", "other", "--tasks", f"gardens={tasks}"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    done = tmp_path / ".out.work/logs/find_exact/completions"
    for _ in range(4000):
        if done.is_dir() or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / ".out.work/logs").glob("*/completions/*")}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr
    assert len(before) >= 4
    assert json.loads(finished.stdout)["domains"]["manual"]["documents"] == 25
    assert contents(tmp_path / "out") == contents(output)
