"""The score table never turns a missing score into a number."""

import json
import math
from types import SimpleNamespace

import pytest

from megatron_demix.errors import CorruptInput
from megatron_demix.evaluate import job
from megatron_demix.evaluate.scores import Score, ScoreTable


def table():
    return ScoreTable([Score("code", "bits/byte", "lower")], {"a": {"code": 1.5}, "b": {"code": 2.5}})


def test_round_trip(tmp_path):
    table().write(tmp_path / "scores.json")
    assert ScoreTable.read(tmp_path / "scores.json") == table()


def test_column_keeps_the_order_asked_for():
    assert table().column("code") == [1.5, 2.5]
    assert table().column("code", ["b", "a"]) == [2.5, 1.5]


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_missing_blocks(value):
    broken = table()
    if value is None:
        del broken.rows["b"]["code"]
    else:
        broken.rows["b"]["code"] = value
    with pytest.raises(CorruptInput, match="score 'code' of model 'b' is"):
        broken.column("code")


def test_not_a_table(tmp_path):
    (tmp_path / "scores.json").write_text('{"rows": 3}')
    with pytest.raises(CorruptInput, match="not a score table"):
        ScoreTable.read(tmp_path / "scores.json")


def test_a_score_that_is_no_number_is_named_before_anything_is_published(tmp_path):
    row = {"model": "m", "scores": {"code": math.nan}, "notes": {}}
    (tmp_path / "rows-all-0.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(CorruptInput, match="'code' of model 'm' is nan"):
        job._collect(SimpleNamespace(work=tmp_path, domains={"code": []}, models=["m"]), None)
