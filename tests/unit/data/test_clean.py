"""Cleaning with datatrove: real documents with planted duplicates come out without them, and the account is right."""

import gzip
import json
import pydoc_data.topics

import pytest

from megatron_demix.errors import ConfigError, OutputExists

pytest.importorskip("datatrove")

from megatron_demix.data.clean import CleanSpec, clean_domains


def write(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return [path]


def read(folder):
    return [json.loads(line)["text"] for p in sorted(folder.glob("*.jsonl.gz")) for line in gzip.open(p, "rt")]


def test_planted_duplicates_are_found_across_domains(tmp_path):
    topics = [t for t in pydoc_data.topics.topics.values() if len(t.split()) > 300][:30]
    near = topics[3].replace(topics[3].split()[150], "changed", 1)
    junk = "buy now " * 200
    inputs = {
        "manual": write(tmp_path / "manual.jsonl", [*topics[:20], topics[0], near]),
        "other": write(tmp_path / "other.jsonl", [*topics[20:], topics[5], junk]),
    }
    report = clean_domains(inputs, tmp_path / "clean", CleanSpec(heuristics=("gopher_repetition",)))
    kept = {name: read(tmp_path / "clean" / name) for name in inputs}
    removed = [t for name in inputs for t in read(tmp_path / "clean" / "removed" / "duplicate" / name)]
    assert sorted(removed) == sorted([topics[0], near, topics[5]]) or sorted(removed) == sorted(
        [topics[0], topics[3], topics[5]]
    )
    assert topics[5] in kept["manual"]
    assert junk in read(tmp_path / "clean" / "removed" / "gopher_repetition" / "other")
    for name, counts in report["domains"].items():
        assert counts["kept"] == len(kept[name])
        assert counts["documents"] == counts["kept"] + sum(counts["removed"].values()) == len(read_lines(inputs[name]))
    assert json.loads((tmp_path / "clean" / "clean.json").read_text()) == json.loads(json.dumps(report))
    assert sorted(p.name for p in (tmp_path / "clean").iterdir()) == ["clean.json", "manual", "other", "removed"]
    with pytest.raises(OutputExists, match=r"clean exists\. Move it away"):
        clean_domains(inputs, tmp_path / "clean", CleanSpec())


def read_lines(paths):
    return [line for p in paths for line in p.read_text().splitlines()]


def test_unknown_heuristic(tmp_path):
    with pytest.raises(ConfigError, match="heuristic 'magic' is not one of gopher_repetition, gopher_quality, c4, fineweb"):
        clean_domains({}, tmp_path / "x", CleanSpec(heuristics=("magic",)))
