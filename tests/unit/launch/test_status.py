"""The table of `demix status`, for a run in every state at once."""

import json
import re
import time
from types import SimpleNamespace

import pytest

from megatron_demix.errors import ConfigError
from megatron_demix.launch.attempts import Attempts
from megatron_demix.launch.backend import Activity
from megatron_demix.launch.status import rows, show_status
from megatron_demix.pipeline.stage import Stage
from megatron_demix.study.launch import LaunchSpec, SlurmSpec


@pytest.fixture
def run(tmp_path):
    """A DAG of five stages, and a backend that says what two of them do."""

    def stage(name, ranks=0):
        return Stage(name, tmp_path, {}, (), lambda folder: None, ranks=ranks)

    done, failed, running = stage("data/a"), stage("base/base", 1), stage("components/a", 1)
    done.finish()
    failed.log.parent.mkdir()
    Attempts(failed="stage base/base: the loss is nan").write(failed)
    beat = {"done": 25, "total": 100, "unit": "iterations", "pid": 1, "time": time.time(), "left_s": 90.0}
    running.heartbeat.write_text(json.dumps(beat))
    running.log.touch()
    study = SimpleNamespace(launch=LaunchSpec(backend="slurm", slurm=SlurmSpec(parts={"data": 3, "components": 2})))
    dag = SimpleNamespace(study=study, run=tmp_path, all=[done, failed, running, stage("components/b", 1), stage("final/a", 1)])
    activity = {"components/a": Activity("running", "12_0"), "components/b": Activity("queued", "12_1", "Priority")}
    return dag, SimpleNamespace(activity=lambda: activity)


def test_rows(run):
    dag, backend = run
    found = {r["stage"]: r for r in rows(dag, backend.activity())}
    assert {name: r["state"] for name, r in found.items()} == {
        "data/a": "done", "base/base": "failed", "components/a": "running", "components/b": "queued", "final/a": "to do",
    }  # fmt: skip
    assert found["components/a"]["progress"] == 0.25
    assert found["components/a"]["eta_s"] == pytest.approx(90, abs=5)
    assert (found["components/b"]["job"], found["components/b"]["note"]) == ("12_1", "Priority")
    assert found["base/base"]["note"] == "stage base/base: the loss is nan"


def test_the_table_and_json(run, capsys):
    show_status(*run, as_json=False, watch=False)
    text = capsys.readouterr().out
    assert re.search(r"components/a +running +12_0 +25 % +1m\d\ds +/.*components\.a-\w+\.log", text)
    assert re.search(r"components/b +queued Priority +12_1", text)
    assert text.endswith("1 done  1 running  1 queued  1 failed  1 to do\nstage base/base: the loss is nan\n")
    show_status(*run, as_json=True, watch=True)
    assert len(json.loads(capsys.readouterr().out)) == 5


def test_why_a_scheduler_did_not_go_on_is_said(run, capsys):
    dag, backend = run
    backend.activity = lambda: {"conclude": Activity("failed", reason="the last job ended before it could.")}
    show_status(dag, backend, as_json=False, watch=False)
    text = capsys.readouterr().out
    assert re.search(r"^conclude +failed", text, re.MULTILINE)
    assert "\nthe last job ended before it could.\nnothing is under way: `demix resume`" in text


def test_a_stage_in_parts_says_how_many_are_done(run, capsys):
    """Before they are put together; components are not made in parts, whatever the setting says."""
    dag, backend = run
    stage = Stage("data/b", dag.run, {}, (), lambda folder: None, make_part=lambda folder, part: None)
    dag.all.append(stage)
    assert "parts" not in rows(dag, backend.activity())[-1]
    backend.activity()["data/b"] = Activity("running", "7_1")
    for number in range(3):
        row = rows(dag, backend.activity())[-1]
        assert (row["parts_done"], row["parts"]) == (number, 3)
        show_status(dag, backend, as_json=False, watch=False)
        assert re.search(rf"data/b +running +7_1 +{number} of 3 parts", capsys.readouterr().out)
        stage.part((number, 3)).finish()
    show_status(dag, backend, as_json=False, watch=False)
    assert "of 3 parts" not in capsys.readouterr().out
    stage.finish()
    assert "parts" not in rows(dag, backend.activity())[-1]
    assert not any("parts" in row for row in rows(dag, backend.activity()))


def test_a_late_heartbeat_is_said_instead_of_a_time_left(run):
    dag, backend = run
    running = dag.all[2]
    beat = json.loads(running.heartbeat.read_text())
    running.heartbeat.write_text(json.dumps(beat | {"time": time.time() - 62, "left_s": 75 * 50}))  # 50 s a unit
    assert "eta_s" in rows(dag, backend.activity())[2]
    running.heartbeat.write_text(json.dumps(beat | {"time": time.time() - 120}))
    row = rows(dag, backend.activity())[2]
    assert (row["state"], "eta_s" in row, row["silent_s"]) == ("running", False, pytest.approx(120, abs=5))


def test_what_to_do_is_said_where_nothing_is_under_way(run, capsys):
    dag, backend = run
    backend.activity = dict
    show_status(dag, backend, as_json=False, watch=False)
    assert f"nothing is under way: `demix resume` goes on with what is missing; logs of what was tried: {dag.run}/logs" in (
        " ".join(capsys.readouterr().out.split("\n")).replace("  ", " ")
    )


@pytest.mark.parametrize("as_json", [True, False])
def test_where_the_scheduler_cannot_be_asked_the_rest_is_shown(run, capsys, as_json):
    def ask():
        raise ConfigError("there is no squeue on this machine.")

    show_status(run[0], SimpleNamespace(activity=ask), as_json=as_json, watch=False)
    said = capsys.readouterr()
    assert said.err == "warning: what is queued or running is not known: there is no squeue on this machine.\n"
    assert "components/b" in said.out
    assert "nothing is under way" not in said.out


def test_the_schedulers_own_job_is_shown_where_nothing_else_is_under_way(run, capsys):
    dag, _ = run
    show_status(dag, SimpleNamespace(activity=lambda: {"conclude": Activity("running", "9")}), as_json=False, watch=False)
    text = capsys.readouterr().out
    assert re.search(r"conclude +running +9", text)
    assert "nothing is under way" not in text
    dag.all, stages = dag.all[:1], dag.all
    assert [r["state"] for r in rows(dag, {"conclude": Activity("running", "9")})] == ["done"]
    dag.all = stages
    both = {"conclude": Activity("queued", "9"), "components/a": Activity("running", "8")}
    assert [r["stage"] for r in rows(dag, both)] == [s.name for s in dag.all]
