"""The table of `demix status`, for a run in every state at once."""

import json
import re
import time
from types import SimpleNamespace

import pytest

from megatron_demix.launch.attempts import Attempts
from megatron_demix.launch.status import rows, show_status
from megatron_demix.pipeline.stage import Stage


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
    dag = SimpleNamespace(all=[done, failed, running, stage("components/b", 1), stage("final/a", 1)])
    activity = {"components/a": "running", "components/b": "queued (Priority)"}
    return dag, SimpleNamespace(activity=lambda: activity)


def test_rows(run):
    found = {r["stage"]: r for r in rows(*run)}
    assert {name: r["state"] for name, r in found.items()} == {
        "data/a": "done", "base/base": "failed", "components/a": "running", "components/b": "queued", "final/a": "to do",
    }  # fmt: skip
    assert found["components/a"]["progress"] == 0.25
    assert found["components/a"]["eta_s"] == pytest.approx(90, abs=5)
    assert found["components/b"]["note"] == "Priority"
    assert found["base/base"]["note"] == "stage base/base: the loss is nan"


def test_the_table_and_json(run, capsys):
    show_status(*run, as_json=False, watch=False)
    text = capsys.readouterr().out
    assert re.search(r"components/a +running +25 % +1m\d\ds +/.*components\.a-\w+\.log", text)
    assert re.search(r"components/b +queued Priority", text)
    assert "1 done  1 running  1 queued  1 failed  1 to do\nstage base/base: the loss is nan" in text
    show_status(*run, as_json=True, watch=True)
    assert len(json.loads(capsys.readouterr().out)) == 5
