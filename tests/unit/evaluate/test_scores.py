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


@pytest.mark.parametrize(
    "text",
    [
        "3",
        '{"rows": 3}',
        '{"scores": [{"name": "code"}], "rows": {}}',
        '{"scores": [], "rows": {"a": 3}}',
        '{"scores": [], "rows": {"a": {"code": "low"}}}',
    ],
)
def test_not_a_table(tmp_path, text):
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(CorruptInput, match=r'scores\.json: not a score table, expected {"scores": .*: number}}}\.\Z'):
        ScoreTable.read(tmp_path / "scores.json")


def test_a_number_may_stand_for_what_was_scored_and_is_absent():
    broken = table()
    broken.rows["b"] = {}
    assert broken.column("code", ["a", "b"], lacking=-1) == [1.5, -1]
    with pytest.raises(CorruptInput, match="'code' of model 'c' is missing"):
        broken.column("code", ["a", "c"], lacking=-1)


def of_models(work, *, proxies=(), checkpoints=()):
    names = [*proxies, *checkpoints]
    return SimpleNamespace(
        work=work, domains={"code": []}, models=names, mixtures=dict.fromkeys(proxies), checkpoints=dict.fromkeys(checkpoints)
    )


def row(model, code):
    return {"model": model, "scores": {"code": code}, "notes": {}}


def test_a_checkpoint_s_score_that_is_no_number_is_named_before_anything_is_published(tmp_path):
    with pytest.raises(CorruptInput, match="'code' of model 'm' is missing"):
        job._collect(of_models(tmp_path, checkpoints=["m"]), None, {"m": row("m", math.nan)})
    assert not list(tmp_path.iterdir())


def test_a_proxy_s_score_that_is_no_number_is_left_out_and_said(tmp_path, capsys):
    rows = {"m": row("m", math.inf), "n": row("n", 1.0)}
    job._collect(of_models(tmp_path, proxies=["m", "n"]), None, rows)
    assert ScoreTable.read(tmp_path / "scores.json").rows == {"m": {}, "n": {"code": 1.0}}
    assert "warning: m: code inf: not counted" in capsys.readouterr().out


def test_checkpoints_without_a_score_are_scored_again_and_proxies_are_not(tmp_path):
    rows = [row("proxy", math.nan), row("bad", math.nan), row("good", 1.0)]
    (tmp_path / "rows-all-0.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in rows))
    assert set(job._finished_rows(of_models(tmp_path, proxies=["proxy"], checkpoints=["bad", "good"]))) == {"proxy", "good"}
