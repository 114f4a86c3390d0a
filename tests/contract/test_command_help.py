"""The commands people script against: flags that stay, help that explains, exit codes that mean one thing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_demix import __version__, errors
from megatron_demix.cli import main

ROOT = Path(__file__).parents[2]
TOOLS = sorted((ROOT / "tools").glob("*.py"))
STUDY = str(ROOT / "examples" / "quickstart" / "study.yaml")
COMMANDS = (
    "run",
    "resume",
    "submit",
    "cancel",
    "plan",
    "status",
    "prepare",
    "train",
    "evaluate",
    "search",
    "merge",
    "blend",
    "final",
    "report",
    "consistency",
    "doctor",
)

# Others call these: more may be added, none may go.
CONTRACT = {
    "preprocess_data.py": [
        "--input",
        "--output-prefix",
        "--tokenizer-type",
        "--tokenizer-model",
        "--vocab-file",
        "--merge-file",
        "--append-eod",
        "--workers",
        "--partitions",
        "--partition",
        "--json-keys",
        "--split-sentences",
    ],
    "clean_data.py": [
        "--input",
        "--output",
        "--heuristics",
        "--bands",
        "--hashes",
        "--tasks",
        "--grades",
        "--workers",
        "--slurm",
    ],
    "train_filters.py perplexity": ["--input", "--output", "--order"],
    "train_filters.py quality": ["LABEL=PATH", "--output"],
    "merge_dist_ckpt.py": ["PATH:WEIGHT", "--components", "--weights", "--output", "--layout", "--normalize"],
    "inspect_dist_ckpt.py": ["--json"],
    "search_mixture.py sample": ["--domains", "--num", "--seed", "--output"],
    "search_mixture.py fit": ["--mixtures", "--scores", "--predict", "--output", "--surrogate"],
    "search_mixture.py consistency": ["--proxies", "--references", "--output"],
    "build_blend.py": ["--pool", "--mixture", "--target-tokens", "--output", "--mode", "--seed"],
    "verify_blend.py": ["PREFIX"],
    "train_component.py": ["--job"],
    "convert_hf.py import": ["HF_DIR", "--output", "--tensor", "--pipeline"],
    "convert_hf.py export": ["CHECKPOINT", "--output", "--reference"],
}


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120, cwd=ROOT)


@pytest.mark.parametrize("command", CONTRACT)
def test_the_flags_of_the_contract_are_there(command):
    script, *rest = command.split()
    result = run(f"tools/{script}", *rest, "--help")
    assert result.returncode == 0, result.stderr
    missing = [flag for flag in CONTRACT[command] if flag not in result.stdout]
    assert missing == []


@pytest.mark.parametrize(
    ("command", "defaults"),
    {
        "search_mixture.py sample": {"seed": 0, "design": "dirichlet"},
        "search_mixture.py fit": {"seed": 0, "surrogate": "auto"},
        "search_mixture.py choose": {
            "aim": "mean",
            "surrogate": "auto",
            "candidates": 200000,
            "top": 128,
            "bootstraps": 50,
            "seed": 0,
        },
        "merge_dist_ckpt.py": {"layout": "release", "normalize": "error", "verify": "sample"},
        "clean_data.py": {"workers": 1, "quality-label": "high"},
        "preprocess_data.py": {"tokenizer-type": "HuggingFaceTokenizer", "workers": 1},
        "train_component.py": {"seed": 1234, "precision": "bf16"},
    }.items(),
)
def test_the_help_says_what_a_flag_is_by_default(command, defaults):
    script, *rest = command.split()
    options = re.split(r"\n  (?=-)", run(f"tools/{script}", *rest, "--help").stdout)
    for flag, value in defaults.items():
        text = " ".join(next(o for o in options if re.match(f"--{flag}\\b(?!-)", o)).split())
        assert re.search(rf"default: {value}\b|{value} [^;]*\(default\)", text), text


def test_every_tool_is_in_the_contract():
    assert {t.name for t in TOOLS} == {command.split()[0] for command in CONTRACT}


@pytest.mark.parametrize("tool", TOOLS, ids=lambda t: t.name)
def test_a_tool_without_its_arguments_is_a_usage_error(tool):
    result = run(str(tool))
    assert result.returncode == 2, result.stderr
    assert re.match(r"usage: |error .*: .*--job", result.stderr)
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"usage: demix {command}" in capsys.readouterr().out


def test_the_help_lists_every_command_and_exit_code(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    listed = re.findall(r"^    ([a-z]+)(?: |$)", text, re.MULTILINE)
    assert set(COMMANDS) <= set(listed)
    assert set(listed) <= set(COMMANDS) | {"submit", "cancel"}, "a command that this test does not know"
    codes = {c.exit_code for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.DemixError)} - {1}
    assert codes <= {int(n) for n in re.findall(r"(\d+) ", text.split("exit codes:")[1])}


def test_the_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"megatron_demix {__version__}\n"


def test_an_unknown_command_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["rnu", STUDY])
    assert stopped.value.code == 2
    assert "invalid choice: 'rnu'" in capsys.readouterr().err


def test_an_error_is_one_message_and_its_own_exit_code(capsys):
    assert main(["plan", "nowhere.yaml"]) == 2
    assert main(["plan", STUDY, "--set", "train.seq_lenght=5"]) == 2
    assert main(["plan", STUDY, "--set", "base.mixture={code: 0.5}"]) == 4
    shown = capsys.readouterr().err
    assert "demix: study nowhere.yaml: cannot be read" in shown
    assert "did you mean 'seq_length'?" in shown
    assert "Traceback" not in shown
