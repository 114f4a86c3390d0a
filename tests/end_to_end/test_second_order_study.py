"""Stage by stage in this process: a study whose proxies are corrected by a component that was trained on a mixture."""

from pathlib import Path

import numpy as np
import pytest
from dist_checkpoints import read_checkpoint
from in_process import make

from megatron_demix.artifact import read_json
from megatron_demix.pipeline.dag import Dag, build_dag
from megatron_demix.pipeline.given_scores import given_scores, named_checkpoints
from megatron_demix.pipeline.reporting import collect, write_report
from megatron_demix.pipeline.stage import Stage, with_needs
from megatron_demix.search.mixing_law import MixingLaw
from megatron_demix.study.load import load_study

SETTINGS = [
    "base.tokens=1k",
    "component.tokens=1k",
    "component.mixed=centroid",
    "component.maturity_seeds=1",
    "search.rounds=[8]",
]
SETTINGS += [
    "search.surrogate=ridge",
    "search.bootstraps=0",
    "merge.scale=1.25",
    "domains.0.max_share=0.6",
]
PARTS = {"rounds", "merge", "maturity"}


def dag_of(study_folder: Path, run: Path, *overrides: str) -> Dag:
    path = study_folder / "study.yaml"
    return build_dag(load_study(path, [*SETTINGS, *overrides]), path, run)


def make_all(stages: list[Stage]) -> None:
    for stage in stages:
        if not stage.done():
            make(stage)


@pytest.fixture(scope="module")
def dag(study_folder, tmp_path_factory) -> Dag:
    dag = dag_of(study_folder, tmp_path_factory.mktemp("second_order") / "run")
    make_all(dag.of_kinds(PARTS))
    return dag


def coefficients(code: float) -> dict[str, float]:
    """Of two domains: what the centroid gets is the product of the weights, by that of its own."""
    corrected = 4 * code * (1 - code)
    return {"code": code - corrected / 2, "english": 1 - code - corrected / 2, "centroid": corrected}


def of_latest(folder: Path) -> Path:
    return next(iter(sorted(folder.glob("iter_*"), reverse=True)), folder / "release")


def test_a_proxy_on_disk_is_the_corrected_sum(dag):
    code = read_json(dag.choice.folder / "mixture.json")["merge_weights"]["code"]
    assert 0 < code < 1
    parts = {name: read_checkpoint(of_latest(stage.folder)) for name, stage in {**dag.merged, "base": dag.base}.items()}
    weights = {name: 1.25 * weight for name, weight in coefficients(code).items()} | {"base": -0.25}
    merged = read_checkpoint(of_latest(dag.proxies.folder / "proxies" / "found"))
    assert len(merged) > 5
    for key, tensor in merged.items():
        expected = sum(weight * parts[name][key].double() for name, weight in weights.items())
        assert (tensor.double() - expected).abs().max() < 1e-6


def test_proxies_in_memory_are_merged_with_the_corrected_coefficients_and_stand_beside_the_law(dag):
    scores, proposal = dag.rounds[0].scores, dag.rounds[0].proposal
    rows = read_json(scores.folder / "scores.json")["rows"]
    fit = read_json(dag.rounds[0].fit.folder / "fit.json")
    law = MixingLaw(fit["through_centroid"]["code"]["limit"])
    alone_K = np.array([rows[f"component-{name}"]["code"] for name in dag.components])
    measured = fit["surrogates"]["code"]["measured"]
    for entry, value in zip(read_json(proposal.folder / "mixtures.json"), measured, strict=True):
        wanted = coefficients(entry["weights"]["code"])
        assert read_json(scores.job)["mixtures"][entry["name"]] == pytest.approx(wanted)
        by_law = law.of(np.array([[*entry["weights"].values()]]), alone_K)[0]
        assert value == pytest.approx((by_law + rows[entry["name"]]["code"]) / 2)
    assert any(min(weights.values()) < 0 for weights in read_json(scores.job)["mixtures"].values())


def test_the_mixed_component_is_trained_as_the_others_are_on_the_data_of_its_weights(dag):
    jobs = [read_json(stage.job) for stage in dag.merged.values()]
    assert [sorted(share for _, share in job["blend"]) for job in jobs] == [[0.25, 0.75], [0.25, 0.75], [0.5, 0.5]]
    for key in ("seed", "train", "train_iters", "schedule_iters", "init_checkpoint"):
        assert jobs[0][key] == jobs[1][key] == jobs[2][key]


def test_the_trained_centroid_is_the_mixed_component_and_the_merged_one_is_not(dag):
    assert dag.maturity.trained == {"seed0": dag.mixed["centroid"]}
    assert not any("centroid/seed" in stage.name for stage in dag.all)
    check = collect(dag).maturity
    job = read_json(dag.maturity.scores.job)
    assert job["mixtures"] == {"merged": {"code": 0.5, "english": 0.5}}
    assert check.merged["code"] != check.trained[0]["code"]
    page = write_report(dag).page.read_text()
    assert "corrected to second order by 1 component that was trained on a mixture (component.mixed): centroid" in page
    assert "without component.mixed" in page
    # A checkpoint that is given by its path has the same scores.
    stage = given_scores(dag, named_checkpoints([f"mixed={dag.mixed['centroid'].folder}"]), final=False)
    make_all(with_needs([stage]))
    rows = read_json(stage.folder / "scores.json")["rows"]
    assert rows["mixed"]["code"] == pytest.approx(check.trained[0]["code"])


def test_what_is_there_stays_when_the_setting_goes_and_comes_back(study_folder, dag):
    without = dag_of(study_folder, dag.run, "component.mixed=null")
    assert all(stage.done() for stage in without.components.values())
    assert not without.rounds[0].scores.done()
    again = dag_of(study_folder, dag.run, "component.mixed={centroid: {code: 0.5, english: 0.5}}")
    assert {stage.name: stage.key for stage in again.all} == {stage.name: stage.key for stage in dag.all}
    assert all(stage.done() for stage in again.of_kinds(PARTS))
    # A mixed component is a stage of its own: lost, it is made again, to the same bytes.
    stage = again.mixed["centroid"]
    manifest = read_json(stage.folder / "manifest.json")
    stage.folder.rename(dag.run / "lost")
    make_all(again.of_kinds(PARTS))
    assert read_json(stage.folder / "manifest.json") == manifest
