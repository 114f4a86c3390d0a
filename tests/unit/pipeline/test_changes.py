"""What was made before and is made again says why, at the first stage where that is so."""

import json

import pytest
from small_texts import SMALL_STUDY, write_texts

from megatron_demix.cli import main
from megatron_demix.pipeline import reporting
from megatron_demix.pipeline.changes import changes
from megatron_demix.pipeline.dag import Dag, build_dag
from megatron_demix.pipeline.reporting import write_report
from megatron_demix.pipeline.stage import Stage
from megatron_demix.report.data import FinalRun, ReportData
from megatron_demix.study.load import load_study

STUDY = SMALL_STUDY + "prepare: {workers: 1}\n"


@pytest.fixture
def study(tmp_path):
    write_texts(tmp_path, "code", "english")
    (tmp_path / "study.yaml").write_text(STUDY)
    return tmp_path / "study.yaml"


def dag_of(study, *overrides) -> Dag:
    return build_dag(load_study(study, list(overrides)), study, study.parent / "runs" / "s")


def done(run, name, settings, *needs) -> Stage:
    """A stage, made."""
    stage = to_do(run, name, settings, *needs)
    stage.finish()
    return stage


def to_do(run, name, settings, *needs) -> Stage:
    return Stage(name, run, settings, needs, lambda folder: None)


def test_nothing_is_said_of_what_was_never_made_or_is_there(study):
    assert changes(dag_of(study).all) == []
    dag = dag_of(study)
    for stage in (dag.tokenizer, *dag.data.values()):
        stage.finish()
    assert changes(dag.all) == []


def test_other_text_is_named_at_the_first_stage_that_reads_it(study, capsys):
    overrides = ["--runs", str(study.parent / "runs")]
    assert main(["prepare", str(study), "--quiet", *overrides]) == 0
    assert "note" not in capsys.readouterr().err
    write_texts(study.parent, "english", num=201)
    said = "note: data/english and what needs it will be made anew: inputs: other content than before\n"
    for command in ("plan", "status"):
        assert main([command, str(study), "--json", *overrides]) == 0
        shown = capsys.readouterr()
        assert said in shown.err
        json.loads(shown.out)
    assert main(["prepare", str(study), *overrides]) == 0
    assert said in capsys.readouterr().err
    assert main(["prepare", str(study), *overrides]) == 0
    assert "anew" not in capsys.readouterr().err


def test_settings_are_named_with_what_they_were_and_are(tmp_path):
    data = done(tmp_path, "data/a", {"inputs": "0" * 12})
    for name in ("final/x", "final/y"):
        done(tmp_path, name, {"train": {"lr": 1e-3, "steps": 5}, "seed": 1}, data)
    again = [to_do(tmp_path, name, {"train": {"lr": 2e-3, "steps": 5}, "seed": 1}, data) for name in ("final/x", "final/y")]
    scores = to_do(tmp_path, "scores/s", {}, *again)
    assert changes([data, *again, scores]) == [
        "final/x, 1 more and what needs them will be made anew: train.lr was 0.001, is 0.002"
    ]
    done(tmp_path, "final/x", {"train": {"lr": 2e-3, "steps": 6, "decay": [1]}}, data)  # differs in more: not compared with
    assert "train.lr was 0.001" in changes([data, *again])[0]


def test_the_same_settings_were_made_from_something_else(tmp_path):
    first, second = (done(tmp_path, "data/a", {"inputs": digit * 12}) for digit in "01")
    done(tmp_path, "base/b", {"seed": 1}, first)
    said = changes([second, to_do(tmp_path, "base/b", {"seed": 1}, second)])
    assert said == ["base/b and what needs it will be made anew: it was made from other artifacts"]


def test_a_finished_report_is_kept_beside_that_of_other_settings(study, capsys, monkeypatch):
    overrides, folder = ["--runs", str(study.parent / "runs")], study.parent / "runs" / "s" / "report"
    finished = ReportData("s", {}, {"code": 1}, final=[FinalRun("found", 1, {"code": 1.0})])
    with monkeypatch.context() as patched:
        patched.setattr(reporting, "collect", lambda dag: finished)
        page = write_report(dag_of(study)).page.read_text()
    kept = folder / f"finished-{dag_of(study).final_scores.key}.html"
    assert main(["report", str(study), "--set", "seed=5", *overrides]) == 0
    assert f"note: finished reports, of other data or settings: {kept}\n" in capsys.readouterr().err
    assert kept.read_text() == page
    assert "no final run is finished" in (folder / "index.html").read_text()


def test_what_is_no_artifact_is_not_compared_with(tmp_path):
    stage = to_do(tmp_path, "data/a", {})
    for name in ("a-notes", "a-b-0123456789ab", "a-0123456789ab"):
        (stage.folder.parent / name).mkdir(parents=True)
    assert changes([stage]) == []
    (stage.folder.parent / "a-0123456789ab" / "manifest.json").write_text("{")
    assert changes([stage]) == []
