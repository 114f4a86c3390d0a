"""A study whose scores are continued to the final run's length, with real components: what is scored are their checkpoints."""

import pytest
from in_process import make

from megatron_demix.artifact import read_json
from megatron_demix.pipeline.dag import build_dag
from megatron_demix.pipeline.given_scores import given_scores, named_checkpoints
from megatron_demix.pipeline.stage import with_needs
from megatron_demix.study.load import load_study

SETTINGS = ["base.tokens=1k", "component.tokens=1k", "component.lr_decay_style=constant", "search.extrapolate=[0.5]"]
SETTINGS += ["search.rounds=[8]", "search.surrogate=ridge", "search.bootstraps=0"]


def test_a_part_of_the_run_is_scored_as_it_was(study_folder, tmp_path):
    path = study_folder / "study.yaml"
    dag = build_dag(load_study(path, SETTINGS), path, tmp_path / "run")
    for stage in dag.of_kinds({"rounds"}):
        make(stage)
    (early,) = (stage for stage in dag.all if "after" in stage.name)
    rows = [read_json(stage.folder / "scores.json")["rows"] for stage in (early, dag.rounds[0].scores)]
    folders = [dag.components["code"].folder / f"iter_{iteration:07d}" for iteration in (2, 4)]
    stage = given_scores(dag, named_checkpoints([f"{f.name}={f}" for f in folders]), final=False)
    for needed in [s for s in with_needs([stage]) if not s.done()]:
        make(needed)
    alone = read_json(stage.folder / "scores.json")["rows"]
    for folder, of_part in zip(folders, rows, strict=True):
        assert of_part["component-code"] == pytest.approx(alone[folder.name])
    assert rows[0]["component-code"]["code"] != rows[1]["component-code"]["code"]
    line = read_json(dag.choice.folder / "fit.json")["extrapolated"]
    measured = read_json(dag.choice.folder / "fit.json")["surrogates"]["code"]["measured"]
    for entry, value in zip(read_json(dag.rounds[0].proposal.folder / "mixtures.json"), measured, strict=True):
        scores = []
        for of_part in rows:
            interpolated = sum(w * of_part[f"component-{name}"]["code"] for name, w in entry["weights"].items())
            scores.append((interpolated + of_part[entry["name"]]["code"]) / 2)
        assert value == pytest.approx(line["coefficients"]["2"] * scores[0] + line["coefficients"]["4"] * scores[1])
