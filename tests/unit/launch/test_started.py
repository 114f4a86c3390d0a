"""What a run was last started with is told to whoever looks at it with other settings, and decides whom they ask."""

import contextlib
import copy
import json
import os
import pty
import shlex
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_texts import SMALL_STUDY, write_texts

from megatron_demix.cli import main
from megatron_demix.launch.stage import stage_lock
from megatron_demix.launch.started import Started
from megatron_demix.pipeline.dag import build_dag
from megatron_demix.study.load import _override, load_study

STUDY = SMALL_STUDY + "prepare: {workers: 1}\n"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    write_texts(tmp_path, "code", "english")
    (tmp_path / "study.yaml").write_text(STUDY)
    return tmp_path / "study.yaml"


def demix(study: Path, command: str, *more: str) -> int:
    return main([command, str(study), "--runs", str(study.parent / "runs"), *more])


def noted(errors: str) -> list[str]:
    """The command that is named for what was started."""
    assert "last started with other settings than it has here" in errors
    return shlex.split(errors.splitlines()[1])[1:]


@pytest.mark.parametrize(
    "overrides",
    [
        ["final.tokens=20k", "domains.1.max_epochs=2", "search.objective={english: 0.5, code: 0.5}"],
        ["domains.1.name=c4.en", "search.objective={code: 0.3, c4.en: 0.7}"],
        ["base={checkpoint: /a/path with spaces}", "final.baselines=[]", "merge={method: ties, density: 0.5}"],
    ],
)
def test_the_arguments_lead_to_what_was_started(study, overrides):
    now, then = (Started.of(load_study(study, given), None) for given in ([], overrides))
    assert now.otherwise(now) == ""
    words = shlex.split(then.otherwise(now))
    assert words[::2] == ["--set"] * (len(words) // 2)
    assert Started.of(load_study(study, words[1::2]), None) == then


_SCALARS = st.booleans() | st.integers() | st.integers(-999, 999).map(lambda n: n / 100) | st.text(max_size=4)
_SETTINGS = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["code", "law", "c4.en", "1"]), inner, max_size=3)
    ),
    max_leaves=8,
)
_STUDIES = st.fixed_dictionaries({"search": _SETTINGS, "train": _SETTINGS})


@given(_STUDIES, _STUDIES)
def test_they_do_so_whatever_became_of_a_setting(now, then):
    """A mixture in words may have become one by name, and a list longer."""
    words = shlex.split(Started(then, None).otherwise(Started(now, None)))
    data = copy.deepcopy(now)
    for setting in words[1::2]:
        _override(data, setting)
    assert data == then


def test_where_and_how_fast_it_runs_is_no_other_setting(study):
    now, then = (Started.of(load_study(study, [s]), until) for s, until in (("seed=1234", None), ("launch.jobs=3", "search")))
    assert then.otherwise(now) == "--until search"
    assert now.otherwise(then) == ""


def test_a_run_ends_where_it_is_told_to_and_is_found_again(study, capsys):
    assert demix(study, "run", "--until", "prepare", "--set", "seed=5", "--quiet") == 0
    assert demix(study, "status", "--json") == 0
    shown = capsys.readouterr()
    assert {row["state"] for row in json.loads(shown.out) if row["stage"].startswith("data/")} == {"to do"}
    assert main([*noted(shown.err), "--json"]) == 0
    shown = capsys.readouterr()
    states = {row["stage"]: row["state"] for row in json.loads(shown.out)}
    assert {name for name, state in states.items() if state == "done"} == {"tokenizer/byte", "data/code", "data/english"}
    assert "note" not in shown.err
    assert demix(study, "resume", "--dry-run", "--json") == 0
    assert {"--until", "prepare", "seed=5"} < set(noted(capsys.readouterr().err))
    assert demix(study, "plan", "--json", "--until", "prepare", "--set", "seed=5") == 0
    assert [row["stage"].split("/")[0] for row in json.loads(capsys.readouterr().out)] == ["tokenizer", "data", "data"]


def test_no_setting_of_what_was_started_is_named_twice(study, capsys):
    """Beside an own --set of the same place, of its parts, or of what holds it."""
    given = ["search.rounds=[16, 4]", "final.tokens=2k"]
    assert demix(study, "run", "--until", "prepare", "--quiet", *(w for s in given for w in ("--set", s))) == 0
    capsys.readouterr()
    for own in ("search.rounds=[8, 8]", "search.rounds.1=2", "final={tokens: 3k}"):
        assert demix(study, "plan", "--json", "--set", own) == 0
        words = noted(capsys.readouterr().err)
        assert [word for word in words if "=" in word] == ["search.rounds.0=16", "final.tokens=2000"]
        assert main([*words, "--json"]) == 0
        assert "note" not in capsys.readouterr().err
    assert demix(study, "plan", "--json", "--set", "search.rounds=[16, 4]", "--set", "final.tokens=2k") == 0
    assert "--until prepare" in capsys.readouterr().err


def test_what_was_started_without_a_setting_had_its_default(study, capsys):
    assert demix(study, "prepare", "--quiet") == 0
    path = study.parent / "runs/s/started.json"
    started = json.loads(path.read_text())
    del started["study"]["evaluate"]["expert"]
    path.write_text(json.dumps(started))
    capsys.readouterr()
    assert demix(study, "plan", "--until", "prepare") == 0
    assert "last started with other settings" not in capsys.readouterr().err


def test_a_run_beside_the_study_is_not_begun_again_elsewhere(study, capsys, monkeypatch):
    elsewhere = study.parent / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(study.parent)
    assert main(["prepare", "study.yaml", "--quiet"]) == 0
    monkeypatch.chdir(elsewhere)
    capsys.readouterr()
    given = "../study.yaml"
    said = "this study's run is " + str(study.parent / "runs" / "s") + ", and there is none in ./runs"
    for command in ("plan", "status", "report"):  # that one is looked at
        assert main([command, given]) == 0
        looked = capsys.readouterr()
        assert f"note: {said}\n" in looked.err
        assert " done" in looked.out or command == "report", looked.out
    assert (study.parent / "runs" / "s" / "report" / "index.html").exists()
    assert not (elsewhere / "runs").exists()
    for command in ("run", "resume", "submit", "prepare"):
        assert main([command, given]) == 2
        assert f"demix: {said}. Add --runs ../runs to go on with it" in capsys.readouterr().err
    assert main(["cancel", given]) == 0
    assert f"note: {said}\n" in capsys.readouterr().err
    assert main(["prepare", given, "--runs", "../runs"]) == 0
    assert "everything is already done" in capsys.readouterr().err
    assert main(["prepare", given, "--runs", "runs", "--quiet"]) == 0
    assert main(["plan", given]) == 0
    assert "this study's run is" not in capsys.readouterr().err


def test_status_and_cancel_ask_where_it_was_started(study, capsys, monkeypatch):
    """Which the study may no longer say."""
    slurm = ["launch.backend=slurm", "launch.slurm.parts={data: 2}"]
    (study.parent / "runs" / "s").mkdir(parents=True)
    Started.of(load_study(study, slurm), None).write(study.parent / "runs" / "s")
    monkeypatch.setenv("PATH", "")
    assert demix(study, "cancel") == 2
    assert "there is no squeue on this machine" in capsys.readouterr().err
    assert demix(study, "status") == 0
    assert "note" not in capsys.readouterr().err
    (study.parent / "runs" / "s" / "started.json").write_text("{}")
    assert demix(study, "cancel") == 0
    assert capsys.readouterr().out == "nothing is running\n"


def test_what_only_looks_does_without_the_text_that_was_read(study, capsys):
    assert demix(study, "plan", "--json") == 0
    before = capsys.readouterr().out
    (study.parent / "code.jsonl").rename(study.parent / "moved.jsonl")
    for command in ("plan", "status", "report"):
        assert demix(study, command, "--json") == 0
        shown = capsys.readouterr()
        assert "inputs are taken to be what they were when they were last read: " in shown.err
        assert "code.jsonl matches no file" in shown.err
        assert command != "plan" or shown.out == before
    assert demix(study, "cancel") == 0
    assert demix(study, "run") == 2
    capsys.readouterr()
    assert demix(study, "status", "--set", "name=never") == 2
    assert "code.jsonl matches no file" in capsys.readouterr().err


def test_what_only_looks_goes_on_beside_a_damaged_artifact(study, capsys):
    assert demix(study, "run", "--until", "prepare", "--quiet") == 0
    (data,) = (study.parent / "runs" / "s" / "data").glob("code-*")
    (data / "train.bin").write_bytes(b"")
    for command in ("plan", "status", "report"):
        assert demix(study, command, "--json") == 0
        shown = capsys.readouterr()
        if command != "report":
            states = {row["stage"]: row["state"] for row in json.loads(shown.out)}
            assert {name for name, state in states.items() if state == "done"} == {"tokenizer/byte", "data/english"}
            assert states["data/code"] == "damaged"
        said = f"artifact {data} is damaged: {data / 'train.bin'} has 0 bytes"
        assert said in (shown.out if command == "status" else shown.err)
    assert demix(study, "status") == 0
    assert f"{said}, expected" in capsys.readouterr().out
    assert demix(study, "run") == 7
    assert said in capsys.readouterr().err


def test_ctrl_c_ends_watching_without_a_traceback(study):
    runs = study.parent / "runs"
    base = build_dag(load_study(study), study, runs / "s").base
    terminal, inside = pty.openpty()
    command = [sys.executable, "-m", "megatron_demix.cli", "status", study, "--runs", runs, "--watch"]
    with stage_lock(base):  # so that something is under way
        # Who started the tests in the background may have had this signal ignored.
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        watching = subprocess.Popen(command, stdout=inside, stderr=inside, preexec_fn=heard)
        os.close(inside)
        shown = b""
        while b"running" not in shown:
            shown += os.read(terminal, 4096)
        watching.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # how a terminal says that nobody has it open any more
            while more := os.read(terminal, 4096):
                shown += more
    assert watching.wait(timeout=60) == 130
    assert b"Traceback" not in shown
    assert b"stopped." in shown


def test_submitting_a_part_submits_no_more(study, capsys):
    for until, ended in (([], True), (["--until", "search"], False)):
        assert demix(study, "submit", "--dry-run", "--set", "launch.backend=slurm", *until) == 0
        scripts = capsys.readouterr().out
        assert ("final.found-seed0.sbatch" in scripts) == ("blend.found.sbatch" in scripts) == ended
        assert "rounds.2.fit.sbatch" in scripts
        assert ("--until search" in scripts) != ended
    assert demix(study, "submit", "--dry-run", "--until", "search") == 0
    assert capsys.readouterr().out.endswith("--until search\n")


def test_scripts_as_json(study, capsys):
    assert demix(study, "submit", "--dry-run", "--set", "launch.backend=slurm", "--json") == 0
    assert "#SBATCH" in json.loads(capsys.readouterr().out)["scripts"]


def test_a_flag_about_given_checkpoints_is_refused_without_one(study, capsys):
    assert demix(study, "evaluate", "--final") == 2
    assert "--final goes with --checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["plan", "run"])
def test_settings_without_effect_are_warned_of(study, capsys, command):
    more = ["--dry-run"] if command == "run" else []
    assert demix(study, command, *more, "--set", "search.stop=0.1", "--set", "search.rounds=[8]") == 0
    assert "warning: search.stop has no effect: there is one round" in capsys.readouterr().err
