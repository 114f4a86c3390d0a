"""`demix consistency`: tables in, a table for people, JSON and a picture out; missing scores block."""

import errno
import json
import re
from pathlib import Path

import numpy as np
import pytest

from megatron_demix.cli import main
from megatron_demix.evaluate.scores import Score, ScoreTable
from megatron_demix.report.ranks import FORMATS
from megatron_demix.search.tables import Table

IDS = tuple(f"m{m}" for m in range(16))


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    truth_MT = rng.normal(3, 0.1, size=(16, 2))
    for name, noise in (("references", 0.0), ("again", 0.01), ("proxies", 0.05)):
        Table(tmp_path, "id", IDS, ("code", "acc"), truth_MT + rng.normal(0, noise, (16, 2))).write(tmp_path / f"{name}.csv")
    return tmp_path


def consistency(tables: Path, *more: object, proxies: str = "proxies.csv") -> int:
    files = ("--proxies", tables / proxies, "--references", tables / "references.csv")
    return main(["consistency", *map(str, (*files, "--bootstraps", 50, *more))])


def test_the_table_the_json_and_the_picture_say_the_same(tables, capsys):
    flags = ("--reseeded", tables / "again.csv", "--objective", "code=1", "acc=2", "--higher-is-better", "acc")
    assert consistency(tables, *flags, "--output", tables / "r.json", "--plot", tables / "r.svg") == 0
    shown = capsys.readouterr().out
    report = json.loads((tables / "r.json").read_text())
    code = report["scores"]["code"]["spearman"]
    assert f"{code['value']:.3f} [{code['low']:.3f}, {code['high']:.3f}]" in shown
    assert shown.startswith("16 mixtures")
    assert "upper end of its interval is too low" in " ".join(shown.split())
    for word in ("Kendall", "top 25 %", "pairs", "recovery", "regret", "mean of all", "objective", "ceiling acc"):
        assert word in shown
    picture = (tables / "r.svg").read_text()
    ceiling = report["ceiling"]["scores"]["code"]["spearman"]["value"]
    assert f"code · ρ {code['value']:.2f} of {ceiling:.2f}" in picture
    assert "rank among references" in picture
    assert consistency(tables, *flags, "--plot", tables / "again.svg") == 0
    assert (tables / "again.svg").read_text() == picture


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_same_command_changes_nothing_and_another_one_overwrites_nothing(tables, capsys, suffix):
    report, plot = tables / "r.json", tables / f"r{suffix}"
    files = ("--output", report, "--plot", plot)
    assert consistency(tables, *files) == 0
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in (report, plot)]
    assert consistency(tables, *files) == 0
    assert consistency(tables, *files, "--seed", 1) == 6
    assert f"{report} exists, and is not what this command writes there" in capsys.readouterr().err
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in (report, plot)] == before
    report.unlink()
    assert consistency(tables, *files, "--seed", 1) == 6
    assert f"{plot} exists, and is not what" in capsys.readouterr().err
    assert not report.exists(), "nothing is written of what belongs together"


def test_names_are_shown_as_they_are_and_nothing_overlaps(tmp_path, capsys):
    rng = np.random.default_rng(0)
    name, truth_M = "a$x_2$b[bold]", rng.normal(3, 0.1, size=(16, 1))
    for file in ("references", "again", "proxies"):
        values_MC = truth_M + rng.normal(0, 0.03, (16, 1))
        Table(tmp_path, "id", IDS, (name,), values_MC).write(tmp_path / f"{file}.csv")
    again = ("--reseeded", tmp_path / "again.csv")
    assert consistency(tmp_path, *again, "--plot", tmp_path / "r.svg", "--output", tmp_path / "r.json") == 0
    shown, picture = capsys.readouterr().out, (tmp_path / "r.svg").read_text()
    assert f"noiseless {name}" in shown
    assert f"{name} · ρ" in picture
    report = json.loads((tmp_path / "r.json").read_text())
    ceiling, noiseless = report["ceiling"]["macro"]["spearman"]["value"], report["noiseless"]["macro"]
    assert noiseless == pytest.approx(ceiling**0.5)
    assert f"{noiseless:.3f}" in shown
    # With one score the legend has a line of its own, below the title's.
    texts = {text: float(y) for y, text in re.findall(r'<text[^>]* y="([\d.]+)"[^>]*>([^<]+)</text>', picture)}
    title = next(y for text, y in texts.items() if text.startswith("Spearman correlation"))
    assert texts["another seed (ceiling)"] > title + 8


def test_json_on_standard_output_and_no_ceiling(tables, capsys):
    assert consistency(tables, "--json", "--plot", tables / "r.png") == 0
    report = json.loads(capsys.readouterr().out)
    assert "ceiling" not in report
    assert "objective" not in report
    assert (tables / "r.png").read_bytes().startswith(b"\x89PNG")


def test_a_runs_scores_know_their_direction(tables, capsys):
    scores = ScoreTable([Score("code", "bits/byte", "lower"), Score("acc", "", "higher")])
    table = Table.read(tables / "proxies.csv")
    scores.rows = {
        name: dict(zip(table.columns, row, strict=True)) for name, row in zip(IDS, table.values_MC.tolist(), strict=True)
    }
    scores.rows["component-code"] = {"code": 1.0}
    scores.write(tables / "scores.json")
    assert consistency(tables, "--json", proxies="scores.json") == 0
    from_json = json.loads(capsys.readouterr().out)
    assert consistency(tables, "--json", "--higher-is-better", "acc") == 0
    assert from_json == json.loads(capsys.readouterr().out)
    del scores.rows["m3"]["acc"]
    scores.write(tables / "scores.json")
    assert consistency(tables, proxies="scores.json") == 3
    assert "scores.json: acc of 'm3' is missing (1 such). Missing scores, and infinite ones, block" in capsys.readouterr().err


def test_infinity_is_called_so(tables, capsys):
    table = Table.read(tables / "references.csv")
    table.values_MC[3, 1] = np.inf
    table.write(tables / "references.csv")
    assert consistency(tables) == 3
    assert f"references.csv: acc of '{IDS[3]}' is infinite (1 such)" in capsys.readouterr().err


def test_proxies_without_a_reference_are_left_out_and_counted(tables, capsys):
    table = Table.read(tables / "references.csv")
    assert consistency(tables, "--json") == 0
    all_of_them = json.loads(capsys.readouterr().out)
    for name in ("references", "again"):
        few = Table.read(tables / f"{name}.csv")
        Table(tables, "id", IDS[:12], few.columns, few.values_MC[:12]).write(tables / f"{name}.csv")
    assert consistency(tables, "--reseeded", tables / "again.csv", "--plot", tables / "r.svg") == 0
    assert capsys.readouterr().out.startswith("12 of 16 proxies, which have a reference\n")
    assert consistency(tables, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["num_mixtures"], report["num_proxies"]) == (12, 16)
    assert report["scores"] != all_of_them["scores"]
    table.write(tables / "again.csv")
    assert consistency(tables, "--reseeded", tables / "again.csv") == 3
    assert "again.csv: mixture 'm12' is not in" in capsys.readouterr().err


def test_what_a_run_fitted_is_compared(tables, capsys):
    """Stacked scores are nowhere else."""
    table = Table.read(tables / "proxies.csv")
    surrogates = {
        name: {"kind": "ridge", "models": list(IDS), "measured": table.column(name).tolist()} for name in table.columns
    }
    (tables / "fit.json").write_text(json.dumps({"surrogates": surrogates, "higher_is_better": ["acc"]}))
    assert consistency(tables, "--json", proxies="fit.json") == 0
    from_fit = json.loads(capsys.readouterr().out)
    assert consistency(tables, "--json", "--higher-is-better", "acc") == 0
    assert from_fit == json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "facts", [3, {}, {"models": ["m0"]}, {"models": ["m0"], "measured": []}, {"models": [[]], "measured": [1]}]
)
def test_what_is_no_fit_is_refused(tables, capsys, facts):
    (tables / "fit.json").write_text(json.dumps({"surrogates": {"code": facts}}))
    assert consistency(tables, proxies="fit.json") == 7
    assert 'fit.json: not a fit.json, expected {"surrogates": {score: {"models"' in capsys.readouterr().err


def test_what_blocks_says_why_and_writes_nothing(tables, capsys):
    table = Table.read(tables / "proxies.csv")
    changes = {
        "id 'm0' of": Table(tables, "id", IDS[1:], table.columns, table.values_MC[1:]),
        "column 'law' is not in": Table(tables, "id", IDS, ("code", "law"), table.values_MC),
        "score 'code' is 1 for every mixture": Table(
            tables, "id", IDS, table.columns, table.values_MC * [0, 1] + np.array([1, 0])
        ),
    }
    for message, changed in changes.items():
        changed.write(tables / "changed.csv")
        assert consistency(tables, "--output", tables / "r.json", proxies="changed.csv") == 3
        assert message in capsys.readouterr().err
    assert not (tables / "r.json").exists()


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--plot", "ranks.gif"], 2, "expected a name that ends in .svg, .pdf, .png"),
        (["--output", "nowhere/r.json"], 2, "there is no folder nowhere"),
        (["--output", "."], 2, ". is a folder, expected the name of a file"),
        (["--objective", "code"], 2, "Write SCORE=WEIGHT"),
        (["--objective", "law=1"], 4, "score 'law' was not measured"),
        (["--higher-is-better", "speed"], 3, "no score 'speed'"),
        (["--bootstraps", "0"], 2, "--bootstraps is 0"),
        (["--reseeded", "nothing.csv"], 7, "nothing.csv: cannot be read"),
    ],
)
def test_bad_flags(tables, capsys, flags, code, message):
    assert consistency(tables, *flags) == code
    assert message in capsys.readouterr().err


def test_what_the_system_refuses_is_said_with_the_file(tables, capsys, monkeypatch):
    (tables / "file").write_text("")
    assert main(["plan", str(tables / "file" / "study.yaml")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    for number, code in ((errno.EACCES, 2), (errno.ENOSPC, 74)):

        def refuse(path, report, number=number):
            raise OSError(number, "refused", str(path))

        monkeypatch.setattr("megatron_demix.artifact.write_atomic", refuse)
        assert consistency(tables, "--output", tables / "r.json") == code
        assert f"demix: {tables}/r.json: refused. " in capsys.readouterr().err


def test_too_few_mixtures(tables, capsys):
    for name in ("proxies", "references"):
        table = Table.read(tables / f"{name}.csv")
        Table(tables, "id", IDS[:3], table.columns, table.values_MC[:3]).write(tables / f"{name}.csv")
    assert consistency(tables) == 3
    assert "3 mixtures are too few to compare ranks, expected at least 4" in capsys.readouterr().err
