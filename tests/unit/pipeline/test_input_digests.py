"""Digests of inputs: each file is looked at as rarely, and read as fast, as can be, and nothing is forgotten without need."""

import json
import os
import threading
from collections import Counter

import pytest
from small_texts import write_texts

from megatron_demix.artifact import fingerprint, hash_file
from megatron_demix.data.input_files import resolve_inputs
from megatron_demix.errors import ConfigError
from megatron_demix.pipeline import data_stages, inputs
from megatron_demix.pipeline.dag import build_dag
from megatron_demix.pipeline.inputs import InputDigests, check_apart
from megatron_demix.study.load import load_study

STUDY = """
name: s
domains:
  - {name: code, inputs: ["code*.jsonl"]}
  - {name: english, inputs: [english.jsonl]}
  - {name: math, inputs: [more]}
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 2}
train: {seq_length: 16, global_batch_size: 4}
base: {tokens: 640}
component: {maturity_seeds: 0, tokens: 320}
search: {rounds: [8, 4], objective: {code: 1}}
final: {tokens: 1k}
"""


@pytest.fixture
def texts(tmp_path):
    """Files of the same text under different names."""
    (tmp_path / "more").mkdir()
    write_texts(tmp_path, "code", "english", "math")
    for name in ("code1", "code2", "more/a", "more/b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": f"text of {name}"}) + "\n")
    return sorted(tmp_path.rglob("*.jsonl"))


@pytest.fixture
def looked_at(monkeypatch):
    """How often each path was asked for, by os.stat as pathlib and os.path call it."""
    counts, stat = Counter(), os.stat

    def counted(path, *rest, **more):
        counts[str(path)] += 1
        return stat(path, *rest, **more)

    monkeypatch.setattr(os, "stat", counted)
    return counts


@pytest.mark.parametrize("kind", ["glob", "folder", "deep", "files"])
def test_a_pattern_looks_at_each_file_once(texts, tmp_path, looked_at, kind):
    patterns = {
        "glob": ["more/*.jsonl"],
        "folder": ["more"],
        "deep": ["more/**/*.jsonl"],
        "files": ["more/a.jsonl", "more/b.jsonl"],
    }
    looked_at.clear()
    found = resolve_inputs(patterns[kind], tmp_path, os.stat)
    assert {looked_at[str(path)] for path in found} == {1}


@pytest.mark.parametrize("absent", ["refused", "remembered"])
def test_a_plan_looks_at_each_file_once(texts, tmp_path, looked_at, absent):
    (tmp_path / "study.yaml").write_text(STUDY)
    study = load_study(tmp_path / "study.yaml")
    build_dag(study, tmp_path / "study.yaml", tmp_path / "run")
    looked_at.clear()
    build_dag(study, tmp_path / "study.yaml", tmp_path / "run", absent_inputs=absent)
    found = [path for path in texts if path.name != "math.jsonl"]
    assert {path.name: looked_at[str(path)] for path in found} == {path.name: 1 for path in found}


def test_a_study_looks_at_each_file_once(texts, tmp_path, looked_at):
    """What is found, that no two domains share it, and whether it is still what was read."""
    (tmp_path / "study.yaml").write_text(STUDY)
    study = load_study(tmp_path / "study.yaml")
    for again in (False, True):
        looked_at.clear()
        digests = InputDigests(tmp_path / "cache.json")
        files = {d.name: data_stages.resolve(d, tmp_path, digests.look) for d in study.domains}
        check_apart(study, files, digests.look)
        tokenizer = data_stages.tokenizer(study, tmp_path, tmp_path / "run", files, digests)
        for spec in study.domains:
            data_stages.domain(study, spec, tmp_path / "run", files[spec.name], tokenizer, digests)
        digests.save()
        assert {looked_at[str(path)] for found in files.values() for path in found} == {1}, again


def test_after_all_is_saved_a_file_is_looked_at_whenever_it_is_asked_for(texts, tmp_path):
    """As the stage that scores tasks asks, hours later, whether they are what they were."""
    digests = InputDigests(tmp_path / "cache.json")
    found = [digests.of(texts)]
    digests.save()
    for text in ("something else", "something else again"):
        texts[0].write_text(text)
        found.append(digests.of(texts))
    assert len(set(found)) == 3


def test_nothing_is_written_where_all_was_known(texts, tmp_path):
    cache = tmp_path / "cache.json"

    def look():
        digests = InputDigests(cache)
        digests.of(texts)
        digests.answer("q", lambda: [str(path) for path in texts], kind="files")
        digests.about("q", texts, lambda: 1, kind="facts")
        digests.save()
        return cache.stat().st_ino

    before = look()
    assert look() == before
    texts[0].write_text("something else")
    assert look() != before


def test_what_was_read_is_known_through_a_link(texts, tmp_path, monkeypatch):
    first = InputDigests(tmp_path / "cache.json")
    expected = first.of(texts[:1])
    first.save()
    (tmp_path / "link").symlink_to(texts[0].parent)
    monkeypatch.setattr(inputs, "_digest", lambda path, *how: pytest.fail(f"{path} is read again"))
    assert InputDigests(tmp_path / "cache.json").of([tmp_path / "link" / texts[0].name]) == expected


def test_where_inputs_may_be_absent_only_digests_are_saved(texts, tmp_path):
    """What stands for an absent one is no answer to remember."""
    digests = InputDigests(tmp_path / "cache.json", absent="allowed")
    digests.of(texts[:1])
    digests.answer("q", lambda: 1, kind="k")
    digests.save()
    found = json.loads((tmp_path / "cache.json").read_text())
    assert (list(found["files"]), found["answers"]) == ([str(texts[0])], {})


def test_answers_are_kept_by_what_they_are_about(tmp_path):
    """Two kinds of answers to one question, and a file of that name, are three things."""
    cache = tmp_path / "cache.json"
    digests = InputDigests(cache)
    place = tmp_path / "text"
    place.write_text("x")
    digests.of([place])
    for kind in ("one", "another"):
        assert digests.answer(str(place), lambda kind=kind: kind, kind=kind) == kind
    digests.save()
    found = json.loads(cache.read_text())
    assert list(found["files"]) == [str(place)]
    assert found["answers"] == {"one": {str(place): "one"}, "another": {str(place): "another"}}

    def gone():
        raise ConfigError("gone")

    remembered = InputDigests(cache, absent="remembered")
    assert [remembered.answer(str(place), gone, kind=kind) for kind in ("one", "another")] == ["one", "another"]
    with pytest.raises(ConfigError, match="gone"):
        remembered.answer(str(place), gone, kind="a third")


@pytest.mark.parametrize("cache", ["[]", '{"x": 1}', "{"])
def test_a_cache_that_is_none_is_forgotten(texts, tmp_path, cache):
    (tmp_path / "cache.json").write_text(cache)
    digests = InputDigests(tmp_path / "cache.json")
    assert digests.of(texts) == fingerprint([[path.name, hash_file(path)] for path in texts])
    digests.save()
    assert list(json.loads((tmp_path / "cache.json").read_text())) == ["files", "answers"]


def test_files_are_hashed_side_by_side(texts, tmp_path, monkeypatch):
    """Each waits until all are being read; the fingerprint is in the order in which they were given."""
    monkeypatch.setattr("megatron_demix.native.default_threads", lambda: len(texts))
    together, digest = threading.Barrier(len(texts), timeout=30), inputs._digest

    def waiting(path, *rest):
        together.wait()
        return digest(path, *rest)

    monkeypatch.setattr(inputs, "_digest", waiting)
    expected = [[path.name, hash_file(path)] for path in reversed(texts)]
    assert InputDigests(tmp_path / "cache.json").of(list(reversed(texts))) == fingerprint(expected)


def test_digests_are_kept_while_others_are_still_read(texts, tmp_path, monkeypatch):
    """A job that is killed after hours of reading loses what it read last, not all."""
    monkeypatch.setattr("megatron_demix.native.default_threads", lambda: 1)
    monkeypatch.setattr(inputs, "_KEEP_EVERY_S", -1)
    digest, kept = inputs._digest, []

    def read(path, *how):
        cache = tmp_path / "cache.json"
        kept.append(list(json.loads(cache.read_text())["files"]) if cache.exists() else [])
        return digest(path, *how)

    monkeypatch.setattr(inputs, "_digest", read)
    InputDigests(tmp_path / "cache.json").of(texts[:3])
    assert kept == [[], [str(texts[0])], [str(path) for path in texts[:2]]]


@pytest.mark.parametrize("first", ["tokenizer", "clean"])
def test_files_of_all_domains_are_hashed_side_by_side(texts, tmp_path, monkeypatch, first):
    (tmp_path / "study.yaml").write_text(STUDY)
    study = load_study(tmp_path / "study.yaml", ["prepare.clean={near_duplicates: null}"])
    files = {d.name: data_stages.resolve(d, tmp_path, os.stat) for d in study.domains}
    number = sum(map(len, files.values()))
    monkeypatch.setattr("megatron_demix.native.default_threads", lambda: number)
    together = threading.Barrier(number, timeout=30)
    monkeypatch.setattr(inputs, "_digest", lambda path, *how: [hash_file(path), together.wait()][0])
    getattr(data_stages, first)(study, tmp_path, tmp_path / "run", files, InputDigests(tmp_path / "cache.json"))


def test_ctrl_c_keeps_what_was_finished_and_waits_for_nothing_else(texts, tmp_path, monkeypatch):
    """Of three that are read side by side one is finished, one would take hours, and Ctrl-C comes."""
    monkeypatch.setattr("megatron_demix.native.default_threads", lambda: 3)
    first, long, interrupted, *others = texts
    digests, digest = InputDigests(tmp_path / "cache.json"), inputs._digest

    def read(path, advance, *threads):
        while path == long or path in others:
            advance(1)
        while path == interrupted:
            if str(first) in digests._files:
                raise KeyboardInterrupt
        return digest(path, advance, *threads)

    monkeypatch.setattr(inputs, "_digest", read)
    with pytest.raises(KeyboardInterrupt):
        digests.of(texts)
    digests.keep()
    assert list(json.loads((tmp_path / "cache.json").read_text())["files"]) == [str(first)]
