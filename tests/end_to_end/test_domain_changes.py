"""Really trained, merged and scored: a study, and after it studies with a domain more, less, and split."""

from pathlib import Path

import pytest
from in_process import make

from megatron_demix.artifact import read_json
from megatron_demix.cli import main
from megatron_demix.pipeline.dag import Dag, build_dag
from megatron_demix.study.load import load_study

STUDY = """
name: tiny
seed: 7
tokenizer: {type: byte}
prepare: {workers: 1, split: [0.8, 0.1, 0.1]}
domains:
DOMAINS
model: {num_layers: 1, hidden_size: 16, num_attention_heads: 2}
train: {seq_length: 32, micro_batch_size: 8, global_batch_size: 8, lr: 3e-3, precision: fp32, save_interval: 5, log_interval: 5}
base: {tokens: 1k, mixture: {english: 1}}
component: {maturity_seeds: 0, tokens: 1k, anchor: {mixture: {english: 1}}}
search: {SEARCH, objective: {code: 1, english: 1}, surrogate: ridge, candidates: 1000, top: 16, bootstraps: 0}
evaluate: {tokens_per_domain: 1k}
final: {tokens: 2560, baselines: [], seeds: 1}
"""
CODE, ENGLISH, LOGS = (
    f"  - {{name: {name}, inputs: [corpus/{name}.jsonl], max_epochs: 8}}\n" for name in ("code", "english", "logs")
)
HALVES = "".join(f"  - {{name: {name}, inputs: [corpus/{name}.jsonl], max_epochs: 8}}\n" for name in ("logs_a", "logs_b"))


@pytest.fixture(scope="module")
def folder(study_folder, tmp_path_factory) -> Path:
    """study_v1.yaml over code, english and logs, its search done; and logs in two halves."""
    folder = tmp_path_factory.mktemp("changes")
    corpus = folder / "corpus"
    corpus.mkdir()
    for name in ("code", "english"):
        (corpus / f"{name}.jsonl").write_text((study_folder / "corpus" / f"{name}.jsonl").read_text())
    lines = [
        f'{{"text": "{i % 24:02d}:{i % 60:02d} worker {i % 7} has read {i * i % 997} of 997 records, on its own."}}\n'
        for i in range(900)
    ]
    (corpus / "logs.jsonl").write_text("".join(lines))
    (corpus / "logs_a.jsonl").write_text("".join(lines[:600]))
    (corpus / "logs_b.jsonl").write_text("".join(lines[600:]))
    first = study(folder, "study_v1", CODE + ENGLISH + LOGS, "rounds: [8, 2]")
    for stage in first.of_kinds({"rounds"}):
        make(stage)
    return folder


def study(folder: Path, name: str, domains: str, search: str) -> Dag:
    path = folder / f"{name}.yaml"
    path.write_text(STUDY.replace("DOMAINS\n", domains).replace("SEARCH", search))
    return build_dag(load_study(path), path, folder / "runs" / "tiny")


def search_again(dag: Dag) -> set[str]:
    """Make what is missing; the names of that."""
    missing = [stage for stage in dag.of_kinds({"rounds"}) if not stage.done()]
    for stage in missing:
        make(stage)
    return {stage.name for stage in missing}


def used(dag: Dag) -> dict[str, int]:
    """Of the last fit: proxies by score."""
    fit = read_json(dag.choice.folder / "fit.json")
    return {name: len(facts["models"]) for name, facts in fit["surrogates"].items()}


def test_a_dropped_domain_costs_two_proxies(folder, capsys):
    dag = study(folder, "dropped", CODE + ENGLISH, "rounds: [2], earlier: [{study: study_v1.yaml}]")
    assert main(["plan", str(folder / "dropped.yaml"), "--runs", str(folder / "runs")]) == 0
    said = capsys.readouterr().out
    assert "used of the earlier study study_v1: at most 10 proxies, with code, english; shares of logs, no domain here" in said
    assert search_again(dag) == {"earlier/study_v1", "rounds/0/fit", "rounds/1/scores", "rounds/1/fit"}
    taken = read_json(dag.choice.folder / "fit.json")["earlier"]["study_v1"]["proxies"]
    assert used(dag) == {"code": taken + 2, "english": taken + 2}
    assert taken >= 8
    assert set(read_json(dag.choice.folder / "mixture.json")["weights"]) == {"code", "english"}
    # An earlier proxy that has nothing of the dropped domain is scored as it was: the same components, the same merge.
    rows = read_json(dag.rounds[0].scores.folder / "scores.json")["rows"]
    before = read_json(dag.earlier[0].stage.folder / "scores.json")["rows"]
    assert before["study_v1/component-code"] == pytest.approx(
        {n: rows["component-code"][n] for n in ("code", "english")}, rel=1e-6
    )


def test_an_added_and_a_split_domain_cost_their_components_and_a_round(folder):
    parts = "{study: study_v1.yaml, split: {logs: [logs_a, logs_b]}}"
    dag = study(folder, "split", CODE + ENGLISH + HALVES, f"rounds: [8], earlier: [{parts}]")
    assert search_again(dag) == {
        *(f"{kind}/{name}" for kind in ("data", "components") for name in ("logs_a", "logs_b")),
        *("earlier/study_v1", "rounds/1/sample", "rounds/1/scores", "rounds/1/fit"),
    }
    assert used(dag) == {"code": 18, "english": 18, "logs_a": 8, "logs_b": 8}
    shares = read_json(dag.earlier[0].stage.folder / "mixtures.json")[0]["shares"]
    assert 1.5 < shares["logs_a"] / shares["logs_b"] < 2.5
    # And from there with a domain more, in a run of its own: what is done is used from where it is.
    path = folder / "added.yaml"
    text = (folder / "split.yaml").read_text().replace("name: tiny", "name: other").replace(HALVES, HALVES + LOGS)
    path.write_text(text.replace(parts, "{study: study_v1.yaml}, {study: split.yaml}"))
    other = build_dag(load_study(path), path, folder / "runs" / "other")
    assert all(stage.done() for stage in (other.base, *other.data.values(), *other.components.values()))
    assert not (folder / "runs" / "other" / "components").exists()
    assert [e.scores for e in other.earlier] == [["code", "english", "logs"], ["code", "english", "logs_a", "logs_b"]]
    assert search_again(other) == {"earlier/study_v1", "earlier/split", "rounds/1/sample", "rounds/1/scores", "rounds/1/fit"}
    assert used(other) == {"code": 26, "english": 26, "logs": 18, "logs_a": 16, "logs_b": 16}
