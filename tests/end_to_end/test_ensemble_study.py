"""A study whose proxies are probability ensembles, with real components: in one piece, in parts, and after a kill."""

import math
from pathlib import Path

import numpy as np
import pytest
from in_process import make

from megatron_demix.artifact import read_json
from megatron_demix.data.tokenizer import load_tokenizer
from megatron_demix.evaluate.job import EvaluateJob, evaluate
from megatron_demix.merge.proxies import ProxyMerger
from megatron_demix.pipeline.dag import Dag, build_dag
from megatron_demix.pipeline.stage import Stage
from megatron_demix.study.load import load_study

SETTINGS = ["base.tokens=1k", "component.tokens=1k", "search.proxy_score=ensemble", "search.rounds=[8, 2]"]
SETTINGS += ["search.surrogate=ridge", "search.bootstraps=0"]


def dag_of(study_folder: Path, run: Path) -> Dag:
    path = study_folder / "study.yaml"
    return build_dag(load_study(path, SETTINGS), path, run)


@pytest.fixture(scope="module")
def dag(study_folder, tmp_path_factory) -> Dag:
    dag = dag_of(study_folder, tmp_path_factory.mktemp("ensemble") / "run")
    for stage in dag.of_kinds({"rounds"}):
        make(stage)
    return dag


def test_two_components_and_no_proxy_are_scored(dag):
    rows = read_json(dag.rounds[0].scores.folder / "scores.json")["rows"]
    assert list(rows) == ["component-code", "component-english"]
    assert [r.scores.name for r in dag.rounds] == ["rounds/components"] * 2


def test_what_is_fitted_is_computed_from_the_components_probabilities(dag):
    folder = dag.rounds[0].scores.folder
    probabilities = [np.exp(-np.load(folder / "tokens" / f"component-{name}.npy").astype(np.float64)) for name in dag.data]
    code = read_json(folder / "tokens" / "texts.json")["domains"]["code"]
    num_tokens = code["num_windows"] * code["window_tokens"]
    mixtures = [m for r in dag.rounds for m in read_json(r.proposal.folder / "mixtures.json")]
    assert len(mixtures) == 10
    expected = []
    for mixture in mixtures:
        mean_T = sum(w * p_T[:num_tokens] for w, p_T in zip(mixture["weights"].values(), probabilities, strict=True))
        expected.append(-math.fsum(np.log2(mean_T)) / code["target_bytes"])
    assert read_json(dag.choice.folder / "fit.json")["surrogates"]["code"]["measured"] == pytest.approx(expected, rel=1e-9)
    # Alone, a component is what it scores; a mean of probabilities is better than the mean of the losses.
    rows = read_json(folder / "scores.json")["rows"]
    alone = [rows[f"component-{name}"]["code"] for name in dag.data]
    assert -np.log2(probabilities[0][:num_tokens]).sum() / code["target_bytes"] == pytest.approx(alone[0])
    gains = [np.dot([*m["weights"].values()], alone) - value for value, m in zip(expected, mixtures, strict=True)]
    assert min(gains) > -1e-9
    assert max(gains) > 0


def score(stage: Stage) -> None:
    job = EvaluateJob.model_validate(read_json(stage.job))
    evaluate(job, lambda parts, live: ProxyMerger(parts, live), load_tokenizer)


def test_in_parts_and_after_a_kill_the_bytes_are_the_same(dag):
    stage = dag.rounds[0].scores
    manifest = read_json(stage.folder / "manifest.json")
    stage.folder.rename(dag.run / "before")
    for index in (0, 1):
        part = stage.part((index, 2))
        assert part.begin()
        score(part)
    # The second part was killed while it wrote, after its tokens and before its row was whole.
    rows = stage.work / "rows-1-of-2-0.jsonl"
    rows.write_bytes(rows.read_bytes()[:-20])
    (stage.work / "tokens" / ".component-english.npy.tmp-elsewhere-1-0badcafe").write_bytes(b"half a file")
    (stage.work / "tokens" / "component-english.npy").unlink()
    assert stage.begin()
    score(stage)
    stage.finish()
    assert read_json(stage.folder / "manifest.json") == manifest
