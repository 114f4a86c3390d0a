"""tools/search_mixture.py as its users call it: flags, files, exit codes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_demix.search.surrogate import KINDS
from megatron_demix.search.tables import Table

TOOL = Path(__file__).parents[2] / "tools" / "search_mixture.py"


def call(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True, timeout=120)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Measured mixtures of three domains, printed with three digits, scores in another row and column order."""
    rng = np.random.default_rng(0)
    shares_MD = rng.dirichlet(np.ones(3), size=40).round(3)
    ids = tuple(f"m{m}" for m in range(40))
    Table(tmp_path, "index", ids, ("code", "math", "law"), shares_MD).write(tmp_path / "mixtures.csv")
    scores_MT = np.stack([3 - shares_MD[:, 1], 2 + shares_MD[:, 0] ** 2], axis=1)
    order = rng.permutation(40)
    Table(tmp_path, "index", tuple(ids[m] for m in order), ("math_loss", "x"), scores_MT[order]).write(tmp_path / "scores.csv")
    wanted = Table(tmp_path, "name", ("p", "q"), ("law", "code", "math"), np.array([[0.1, 0.2, 0.7], [0.1, 0.8, 0.1]]))
    wanted.write(tmp_path / "wanted.csv")
    return tmp_path


def fit(study: Path, *more: object) -> subprocess.CompletedProcess:
    files = (("--mixtures", "mixtures"), ("--scores", "scores"), ("--predict", "wanted"), ("--output", "predicted"))
    return call(
        "fit", *(part for flag, name in files for part in (flag, study / f"{name}.csv")), "--surrogate", "quadratic", *more
    )


def test_fit_joins_rows_by_id_and_columns_by_name(study: Path) -> None:
    done = fit(study)
    assert done.returncode == 0, done.stderr
    assert "miss a sum of 1 by up to 0.001" in done.stderr
    assert "math_loss: quadratic, out of fold rmse" in done.stderr
    table = Table.read(study / "predicted.csv")
    assert table.ids == ("p", "q")
    assert table.columns == ("math_loss", "math_loss_std", "x", "x_std")
    np.testing.assert_allclose(table.column("math_loss"), [2.3, 2.9], atol=0.02)
    np.testing.assert_allclose(table.column("x"), [2.04, 2.64], atol=0.04)
    assert (table.column("x_std") > 0).all()


def test_fit_refuses_what_does_not_match_and_writes_nothing(study: Path) -> None:
    rows = (study / "scores.csv").read_text().splitlines()
    (study / "scores.csv").write_text("\n".join(rows[:-1]) + "\n")
    done = fit(study)
    assert done.returncode == 3
    assert "scores.csv: id 'm" in done.stderr
    assert "is missing (1 such)" in done.stderr
    (study / "scores.csv").write_text("\n".join([*rows, "stray,1,2"]) + "\n")
    done = fit(study)
    assert done.returncode == 3
    assert "id 'stray' has no mixture" in done.stderr
    unmeasured = rows[5].split(",")[0]
    (study / "scores.csv").write_text("\n".join([*rows[:5], f"{unmeasured},0.5,", *rows[6:]]) + "\n")
    done = fit(study)
    assert done.returncode == 3
    assert f"scores.csv: x of '{unmeasured}' is missing (1 such)" in done.stderr
    assert "out of fold" not in done.stderr, "nothing was fitted before"
    (study / "scores.csv").write_text("\n".join([*rows[:5], f"{unmeasured},0.5,inf", *rows[6:]]) + "\n")
    assert f"scores.csv: x of '{unmeasured}' is infinite (1 such)" in fit(study).stderr
    wanted = (study / "wanted.csv").read_text().replace("law", "lore")
    (study / "wanted.csv").write_text(wanted)
    done = fit(study)
    assert done.returncode == 3
    assert "column 'lore' is not in" in done.stderr
    assert not (study / "predicted.csv").exists()


def test_fit_refuses_a_score_that_is_named_as_another_ones_deviation(study: Path) -> None:
    (study / "scores.csv").write_text((study / "scores.csv").read_text().replace(",x\n", ",math_loss_std\n"))
    done = fit(study)
    assert done.returncode == 3
    assert "'math_loss_std' is a score, and the name of the predicted deviation of 'math_loss'" in done.stderr


def test_fit_says_where_it_has_learned_next_to_nothing(study: Path) -> None:
    table = Table.read(study / "scores.csv")
    noise_MT = np.random.default_rng(1).standard_normal(table.values_MC.shape)
    Table(study, "index", table.ids, table.columns, noise_MT).write(study / "scores.csv")
    assert "x: the surrogate is hardly better than the mean" in fit(study).stderr


def test_fit_leaves_out_a_score_that_is_the_same_everywhere(study: Path) -> None:
    table = Table.read(study / "scores.csv")
    values_MT = np.column_stack([np.zeros(40), table.values_MC])
    Table(study, "index", table.ids, ("gsm", *table.columns), values_MT).write(study / "scores.csv")
    done = fit(study)
    assert done.returncode == 0, done.stderr
    assert "gsm is 0 for every mixture: nothing to learn, so the score is left out" in done.stderr
    assert Table.read(study / "predicted.csv").columns == ("math_loss", "math_loss_std", "x", "x_std")
    Table(study, "index", table.ids, ("gsm",), values_MT[:, :1]).write(study / "scores.csv")
    done = fit(study)
    assert done.returncode == 3
    assert "no score tells the mixtures apart" in done.stderr


def test_weights_and_shares_are_not_taken_for_one_another(study: Path) -> None:
    (study / "domains.yaml").write_text(
        "domains: {code: {tokens: 3B}, math: {tokens: 1B}, law: {tokens: 1B}}\ntarget_tokens: 1B\n"
        "anchor: {mixture: uniform, share: 0.5}\n"
    )
    weights, shares, scores, out = (study / f"{name}.csv" for name in ("weights", "shares", "few", "out"))
    done = call("sample", "--domains", study / "domains.yaml", "--num", 12, "--output", weights, "--shares", shares)
    assert done.returncode == 0, done.stderr
    assert weights.read_text().startswith("merge_weights,code,math,law\n")
    assert shares.read_text().startswith("shares,code,math,law\n")
    table = Table.read(shares)
    Table(study, "shares", table.ids, ("loss",), table.values_MC[:, :1]).write(scores)
    more = ("--scores", scores, "--output", out, "--surrogate", "ridge")
    aim = ("--domains", study / "domains.yaml", "--objective", "loss=1", "--candidates", 500, "--bootstraps", 0)
    for command, expected in (
        (("fit", "--mixtures", weights, "--predict", shares), "holds merge weights; expected actual shares"),
        (("fit", "--mixtures", shares, "--predict", weights), "holds merge weights; expected actual shares"),
        (("choose", "--mixtures", shares, *aim), "holds actual shares; expected merge weights"),
    ):
        done = call(*command, *more)
        assert done.returncode == 3, command
        assert expected in done.stderr
        assert not out.exists()
    assert call("fit", "--mixtures", shares, "--predict", shares, *more).returncode == 0
    assert out.read_text().startswith("id,loss,loss_std\n"), "predictions are no shares"
    out.unlink()
    proposed = ("--propose", 2, "--next", study / "next.csv")
    done = call("choose", "--mixtures", weights, *aim, *more, *proposed, "--top", 500)
    assert done.returncode == 0, done.stderr
    assert "--top is 500 of 500 candidates: the found mixture is the mean of all of them" in done.stderr
    assert (study / "next.csv").read_text().startswith("merge_weights,")


def test_choose_goes_on_without_scores_that_nothing_can_be_learned_from(study: Path) -> None:
    (study / "domains.yaml").write_text(
        "domains: {code: {tokens: 3B}, math: {tokens: 1B}, law: {tokens: 1B}}\ntarget_tokens: 1B\n"
    )
    table = Table.read(study / "scores.csv")
    gaps_M = np.where(np.arange(40) == 7, np.nan, table.values_MC[:, 1])
    values_MT = np.column_stack([table.values_MC[:, 0], np.zeros(40), gaps_M])
    Table(study, "id", table.ids, ("math_loss", "gsm", "late"), values_MT).write(study / "scores.csv")

    def choose(*objective: str) -> subprocess.CompletedProcess:
        return call("choose", "--domains", study / "domains.yaml", "--mixtures", study / "mixtures.csv", "--scores",
                    study / "scores.csv", "--surrogate", "ridge", "--candidates", 500, "--bootstraps", 0, "--output",
                    study / "mixture.json", "--higher-is-better", "gsm", "late", "--objective", *objective)  # fmt: skip

    done = choose("math_loss=1", "gsm=2", "late=0")
    assert done.returncode == 0, done.stderr
    assert "gsm is 0 for every mixture" in done.stderr
    assert f"late of '{table.ids[7]}' is missing (1 such); nothing aims at it" in done.stderr
    report = json.loads((study / "mixture.json").read_text())
    assert set(report["predicted"]) == {"math_loss"}
    assert report["weights"]["math"] > 0.8
    done = choose("gsm=1")
    assert done.returncode == 3
    assert "objective: gsm is 0 for every proxy" in done.stderr
    done = choose("math_loss=1", "late=1")
    assert done.returncode == 3
    assert "No number is put in its place" in done.stderr
    done = choose("gsm=0")
    assert done.returncode == 4
    assert "objective: all weights are 0" in done.stderr


def test_sample_writes_weights_and_shares(tmp_path: Path) -> None:
    (tmp_path / "domains.yaml").write_text(
        "domains: {code: {tokens: 30B, max_epochs: 4}, math: {tokens: 5B, max_epochs: 4}, general: {tokens: 1T}}\n"
        "target_tokens: 100B\nanchor: {mixture: {general: 1}, share: 0.5}\n"
    )
    flags = ("--domains", tmp_path / "domains.yaml", "--num", 30, "--seed", 3, "--shares", tmp_path / "shares.csv")
    for name in ("one.csv", "two.csv"):
        done = call("sample", *flags, "--output", tmp_path / name)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "one.csv").read_text() == (tmp_path / "two.csv").read_text()
    weights, shares = Table.read(tmp_path / "one.csv"), Table.read(tmp_path / "shares.csv")
    assert weights.columns == ("code", "math", "general")
    assert len(weights.ids) == 30
    assert (weights.values_MC.sum(axis=1) == 1).all()
    np.testing.assert_allclose(shares.column("math"), weights.column("math") / 2)
    assert shares.column("math").max() <= 0.2
    (tmp_path / "domains.yaml").write_text(
        "domains: {a: {tokens: 1, max_epochs: 1}, b: {tokens: 1, max_epochs: 1}}\ntarget_tokens: 4\n"
    )
    done = call("sample", *flags, "--output", tmp_path / "three.csv")
    assert done.returncode == 4
    assert "0.5 short" in done.stderr
    assert not (tmp_path / "three.csv").exists()


def test_consistency_reports_every_metric_and_blocks_on_missing_scores(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    truth_MT = rng.normal(3, 0.1, size=(24, 2))
    ids = tuple(f"m{m}" for m in range(24))
    Table(tmp_path, "id", ids, ("code", "math"), truth_MT).write(tmp_path / "references.csv")
    Table(tmp_path, "id", ids, ("code", "math"), truth_MT + rng.normal(0, 0.01, (24, 2))).write(tmp_path / "again.csv")
    noisy_MT = truth_MT + rng.normal(0, 0.03, (24, 2))
    Table(tmp_path, "id", ids[::-1], ("math", "code"), noisy_MT[::-1, ::-1]).write(tmp_path / "proxies.csv")
    files = (
        "--proxies",
        tmp_path / "proxies.csv",
        "--references",
        tmp_path / "references.csv",
        "--output",
        tmp_path / "r.json",
    )
    done = call("consistency", *files, "--reseeded", tmp_path / "again.csv", "--objective", "code=0.7", "math=0.3")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["num_mixtures"] == 24
    assert 0.9 < report["macro"]["spearman"]["value"] < report["ceiling"]["macro"]["spearman"]["value"]
    assert set(report["scores"]["code"]) == {"spearman", "kendall", "top_spearman", "pairwise_accuracy", "recovery", "regret"}
    assert report["objective"]["regret"]["value"] >= 0
    assert re.search(r"mean of all +0\.9\d+ \[0\.\d+, 0\.\d+\]", done.stdout)
    assert "ceiling objective" in done.stdout

    Table(tmp_path, "id", ids[1:], ("code", "math"), noisy_MT[1:]).write(tmp_path / "proxies.csv")
    done = call("consistency", *files)
    assert done.returncode == 3
    assert "id 'm0' of" in done.stderr
    done = call("consistency", *files, "--higher-is-better", "speed")
    assert done.returncode == 3
    assert "no score 'speed'" in done.stderr
    done = call("consistency", *files, "--objective", "code")
    assert done.returncode == 2


def test_choose_finds_the_optimum_of_sampled_mixtures_and_proposes_the_next_round(tmp_path: Path) -> None:
    (tmp_path / "domains.yaml").write_text(
        "domains: {code: {tokens: 30B, max_epochs: 4}, math: {tokens: 12B, max_epochs: 4}, general: {tokens: 1T}}\n"
        "target_tokens: 100B\nanchor: {mixture: uniform, share: 0.25}\n"
    )
    domains = ("--domains", tmp_path / "domains.yaml")
    files = ("--mixtures", tmp_path / "m.csv", "--scores", tmp_path / "s.csv")
    assert (
        call("sample", *domains, "--num", 40, "--output", tmp_path / "m.csv", "--shares", tmp_path / "shares.csv").returncode
        == 0
    )
    shares = Table.read(tmp_path / "shares.csv")
    Table(tmp_path, "id", shares.ids, ("code", "math"), -np.log(shares.values_MC[:, :2])).write(tmp_path / "s.csv")
    more = ("--surrogate", "ridge", "--candidates", 4000, "--top", 16, "--bootstraps", 5)
    done = call("choose", *domains, *files, "--objective", "code=1", "math=2", *more, "--output", tmp_path / "mixture.json",
                "--propose", 6, "--next", tmp_path / "next.csv")  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "mixture.json").read_text())
    # -log s_code - 2 log s_math is least at 1 to 2, but math may have .48 at most, and general keeps the anchor's 1/12.
    assert 0.44 < report["weights"]["math"] <= 0.48
    assert report["weights"]["general"] < 0.12
    assert sum(report["weights"].values()) == pytest.approx(1)
    for name, share in report["weights"].items():
        assert share == pytest.approx(0.25 / 3 + 0.75 * report["merge_weights"][name])
    assert report["expected_gain"][0] > 0
    assert report["optimum"]["judged_probability"] == 1
    assert report["optimum"]["shares"]["math"]["std"] < 0.1
    assert Table.read(tmp_path / "next.csv").values_MC.shape == (6, 3)

    done = call("choose", *domains, *files, "--objective", "law=1", *more, "--output", tmp_path / "other.json")
    assert done.returncode == 4
    assert "score 'law' was not measured; the scores are code, math" in done.stderr
    assert "out of fold" not in done.stderr  # refused before anything is fitted
    done = call("choose", *domains, *files, "--objective", "code=1", "--propose", 6, "--output", tmp_path / "other.json")
    assert done.returncode == 2
    assert "--propose N and --next CSV go together" in done.stderr
    assert not (tmp_path / "other.json").exists()


def test_the_same_command_changes_nothing_and_another_one_overwrites_nothing(study: Path) -> None:
    (study / "domains.yaml").write_text(
        "domains: {code: {tokens: 3B}, math: {tokens: 1B}, law: {tokens: 1B}}\ntarget_tokens: 1B\n"
    )
    domains = ("--domains", study / "domains.yaml")
    measured = ("--mixtures", study / "mixtures.csv", "--scores", study / "scores.csv", "--surrogate", "ridge")
    one, two = ("--output", study / "one"), study / "two"
    search = (*domains, *measured, "--objective", "x=1", "--candidates", 500, "--bootstraps", 2, "--propose", 2)
    commands = {
        "sample": (*domains, "--num", 4, "--shares", two, *one),
        "fit": (*measured, "--predict", study / "wanted.csv", *one),
        "choose": (*search, "--next", two, *one),
    }
    for command, arguments in commands.items():
        for path in (study / "one", two):
            path.unlink(missing_ok=True)
        done = call(command, *arguments)
        assert done.returncode == 0, done.stderr
        made = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (study / "one", two) if path.exists()}
        assert len(made) == 1 + (two in arguments)
        assert call(command, *arguments).returncode == 0
        last = list(made)[-1]
        last.write_text("something else")
        done = call(command, *arguments)
        assert done.returncode == 6
        assert f"{last} exists, and is not what this command writes there. Move it away" in done.stderr
        assert last.read_text() == "something else"
        if len(made) == 2:
            (study / "one").unlink()
            assert call(command, *arguments).returncode == 6
            assert not (study / "one").exists(), "nothing is written of what belongs together"
    done = call("fit", *measured, "--predict", study / "wanted.csv", "--output", study / "scores.csv")
    assert done.returncode == 6
    assert "scores.csv exists" in done.stderr


@pytest.mark.parametrize("command", ["sample", "fit", "choose"])
def test_outputs_are_looked_at_before_the_work(study: Path, command: str) -> None:
    def refused(output: Path, *more: object) -> str:
        inputs = {"sample": ("--num", 4), "fit": ("--mixtures", "m", "--scores", "s", "--predict", "p"),
                  "choose": ("--mixtures", "m", "--scores", "s", "--objective", "x=1")}  # fmt: skip
        domains = () if command == "fit" else ("--domains", "no.yaml")
        done = call(command, *domains, *inputs[command], "--output", output, *more)
        assert done.returncode == 2
        return done.stderr

    assert f"there is no folder {study / 'no'}. Make it" in refused(study / "no" / "out")
    assert f"{study} is a folder, expected the name of a file" in refused(study)
    second = {"sample": ("--shares",), "choose": ("--propose", 3, "--next")}
    if command in second:
        assert "is given as two outputs" in refused(study / "out", *second[command], study / "." / "out")


def test_a_space_of_one_mixture_is_said_to_have_no_other(tmp_path: Path) -> None:
    (tmp_path / "domains.yaml").write_text(
        "domains: {code: {tokens: 30B, max_share: 0.5}, math: {tokens: 10B, max_share: 0.5}}\ntarget_tokens: 1B\n"
    )
    done = call("sample", "--domains", tmp_path / "domains.yaml", "--num", 5, "--output", tmp_path / "m.csv")
    assert done.returncode == 0, done.stderr
    assert "1 of 5 mixtures is distinct: the bounds leave no others" in done.stderr


def test_help_names_the_commands_and_the_surrogates_are_the_packages() -> None:
    done = call("fit", "--help")
    assert done.returncode == 0
    for kind in KINDS:
        assert kind in done.stdout
    done = call("--help")
    for command in ("sample", "fit", "choose", "consistency"):
        assert command in done.stdout


@pytest.mark.parametrize(
    ("command", "flag", "value", "message"),
    [
        ("sample", "--num", 0, "--num is 0, expected at least 1"),
        ("sample", "--seed", -1, "--seed is -1, expected at least 0"),
        ("fit", "--seed", -1, "--seed is -1, expected at least 0"),
        ("choose", "--seed", -1, "--seed is -1, expected at least 0"),
        ("choose", "--top", 0, "--top is 0, expected at least 1"),
        ("choose", "--candidates", 1, "--candidates is 1, expected at least 100"),
        ("choose", "--bootstraps", -1, "--bootstraps is -1, expected at least 0"),
        ("choose", "--bootstraps", 1, "--bootstraps is 1: one search says nothing of how sure it is"),
        ("choose", "--propose", -2, "--propose is -2, expected at least 0"),
        ("choose", "--objective", "x=inf", "objective 'x=inf' is not understood"),
        ("consistency", "--seed", -1, "--seed is -1, expected at least 0"),
        ("consistency", "--bootstraps", 0, "--bootstraps is 0, expected at least 1"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(study: Path, command: str, flag: str, value: object, message: str) -> None:
    given = {
        "sample": ("--domains", study / "d.yaml", "--num", 4, "--output", study / "out"),
        "fit": ("--mixtures", study / "mixtures.csv", "--scores", study / "scores.csv", "--predict", study / "wanted.csv",
                "--output", study / "out"),
        "choose": ("--domains", study / "d.yaml", "--mixtures", study / "mixtures.csv", "--scores", study / "scores.csv",
                   "--objective", "x=1", "--output", study / "out"),
        "consistency": ("--proxies", study / "scores.csv", "--references", study / "scores.csv", "--output", study / "out"),
    }  # fmt: skip
    (study / "d.yaml").write_text("domains: {code: {tokens: 3B}, math: {tokens: 1B}, law: {tokens: 1B}}\ntarget_tokens: 1B\n")
    done = call(command, *given[command], flag, value)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (study / "out").exists()
