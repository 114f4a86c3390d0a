"""tools/clean_data.py is a study's prepare.clean by flags: the same defaults, and no flag without effect."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from megatron_demix.study.data import CleanSpec
from megatron_demix.units import Cut

TOOL = Path(__file__).parents[2] / "tools" / "clean_data.py"
REQUIRED = ["--input", "x=x.jsonl", "--output", "out"]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("clean_data", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def spec_of(tool, *flags) -> CleanSpec:
    return tool.settings(tool.parser().parse_args([*REQUIRED, *flags]))


def test_without_a_flag_it_is_a_study_that_says_nothing(tool):
    assert spec_of(tool) == CleanSpec()


def test_the_help_has_the_studys_defaults(tool):
    text = " ".join(tool.parser().format_help().split())
    said = dict(re.findall(r"--([a-z-]+) [A-Z]+ (?:(?!--).)*?default: ([\w%.]+)", text))
    full = spec_of(tool, "--tasks", "a=b", "--perplexity", "p", "--quality", "q", "--heuristics", "c4")
    near, tasks, perplexity, quality = full.near_duplicates, full.contamination, full.perplexity, full.quality
    numbers = {"ngram": near.ngram, "bands": near.bands, "hashes": near.hashes, "task-ngram": tasks.ngram}
    assert {flag: int(said[flag]) for flag in numbers} == numbers
    percents = {flag: Cut(float(said[flag].rstrip("%")) / 100, True) for flag in ("perplexity-drop", "quality-drop")}
    assert percents == {"perplexity-drop": perplexity.drop, "quality-drop": quality.drop}
    assert said["quality-label"] == quality.label


def test_every_flag_of_a_filter_reaches_it(tool):
    spec = spec_of(
        tool, "--heuristics", "c4", "--heuristics-domains", "x", "--ngram", "5", "--bands", "6", "--hashes", "7",
        "--tasks", "t=a", "t=b", "--task-ngram", "8", "--task-keys", "q", "--perplexity", "p", "--sentencepiece", "s",
        "--perplexity-drop", "1%", "--perplexity-domains", "x", "--quality", "q", "--quality-label", "good",
        "--quality-drop", "0.5", "--quality-domains", "x", "--keep-exact-duplicates",
    )  # fmt: skip
    assert spec.model_dump(mode="json") == {
        "heuristics": {"use": ["c4"], "domains": ["x"]},
        "exact_duplicates": False,
        "contamination": {"tasks": {"t": ["a", "b"]}, "ngram": 8, "keys": ["q"]},
        "near_duplicates": {"ngram": 5, "bands": 6, "hashes": 7},
        "perplexity": {"model": "p", "sentencepiece": "s", "drop": [0.01, True], "domains": ["x"]},
        "quality": {"model": "q", "label": "good", "drop": [0.5, False], "domains": ["x"]},
    }
    assert spec_of(tool, "--ngram", "0").near_duplicates is None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--heuristics-domains", "x"], "--heuristics-domains has no effect without --heuristics."),
        (["--task-ngram", "3"], "--task-ngram has no effect without --tasks."),
        (["--task-keys", "q"], "--task-keys has no effect without --tasks."),
        (["--sentencepiece", "s"], "--sentencepiece has no effect without --perplexity."),
        (["--perplexity-drop", "1%"], "--perplexity-drop has no effect without --perplexity."),
        (["--perplexity-domains", "x"], "--perplexity-domains has no effect without --perplexity."),
        (["--quality-label", "high"], "--quality-label has no effect without --quality."),
        (["--quality-drop", "1%"], "--quality-drop has no effect without --quality."),
        (["--quality-domains", "x"], "--quality-domains has no effect without --quality."),
        (["--ngram", "0", "--bands", "3"], "--bands has no effect with --ngram 0, which keeps near duplicates."),
        (["--workers", "0"], "--workers is 0, expected at least 1."),
    ],
)
def test_a_flag_without_effect_is_refused(tool, monkeypatch, capsys, flags, said):
    monkeypatch.setattr(sys, "argv", ["clean_data.py", *REQUIRED, *flags])
    assert tool.main() == 2
    assert capsys.readouterr().err == f"error: {said}\n"


def test_every_flag_of_a_filter_belongs_to_it(tool):
    """A new one is added to BELONG_TO."""
    for name, others in tool.BELONG_TO.items():
        prefix = "task" if name == "tasks" else name
        flags = {a.dest for a in tool.parser()._actions if a.dest.startswith(f"{prefix}_")}
        assert flags <= set(others)
