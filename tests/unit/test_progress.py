"""Bars where there is a terminal, lines where there is none, heartbeats that never harm the work."""

import json
import os

import pytest

from megatron_demix import progress
from megatron_demix.errors import StorageError
from megatron_demix.progress import Heartbeat, MetricsLog, progress_bar


def test_a_log_gets_a_line_now_and_then(monkeypatch, capsys):
    clock = iter([0.0, 1.0, 12.0, 13.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress_bar("reading", 200, unit="MB") as advance:
        advance(10)
        advance(40, info="file 2")
        advance(50)
    assert capsys.readouterr().err == "reading: 25 %, 4.17 MB/s, file 2\n"


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    with progress_bar("reading", 2) as advance:
        advance()
        advance(info="done")
    assert "reading" in capsys.readouterr().err


def test_a_quiet_bar_says_nothing(capsys):
    with progress_bar("reading", 2, enabled=False) as advance:
        advance(2, info="x")
    assert capsys.readouterr().err == ""


def test_an_error_inside_a_bar_passes_through():
    with pytest.raises(ValueError, match="inside"), progress_bar("reading", 1):
        raise ValueError("inside")


def test_heartbeats_are_rare_but_the_last_one_is_written(tmp_path):
    path = tmp_path / "x.heartbeat"
    heartbeat = Heartbeat(path, interval_s=3600)
    heartbeat.beat(1, 10, "steps", loss=2.5)
    first = Heartbeat.read(path)
    assert first is not None
    assert (first["done"], first["total"], first["unit"], first["loss"], first["pid"]) == (1, 10, "steps", 2.5, os.getpid())
    heartbeat.beat(2, 10, "steps")
    assert Heartbeat.read(path) == first
    heartbeat.beat(10, 10, "steps")
    assert (Heartbeat.read(path) or {})["done"] == 10
    assert [p.name for p in tmp_path.iterdir()] == ["x.heartbeat"]


def test_a_heartbeat_that_cannot_be_written_or_read_is_dropped(tmp_path):
    Heartbeat(tmp_path / "absent" / "x").beat(1, 1, "steps")
    assert Heartbeat.read(tmp_path / "absent" / "x") is None
    (tmp_path / "half").write_text('{"done": 1')
    assert Heartbeat.read(tmp_path / "half") is None


def test_metrics_are_one_object_a_line(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write("stage", name="base", path=tmp_path)
    log.write("stage", name="final")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["event"], line["name"]) for line in lines] == [("stage", "base"), ("stage", "final")]
    assert lines[0]["path"] == str(tmp_path)


def test_metrics_on_a_full_disk():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this machine")
    with pytest.raises(StorageError, match="writing /dev/full: No space left"):
        MetricsLog("/dev/full").write("stage")
