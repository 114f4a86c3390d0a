"""What the README and the other pages say is so: commands and flags exist, links lead somewhere, exit codes are right."""

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from megatron_demix import errors

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
_WITH_COMMANDS = ("search_mixture.py", "convert_hf.py", "train_filters.py")
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[str]:
    """Every command of the shell blocks on all pages, continued lines joined, comments left out."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    found.append(shlex.join(words))
    return found


@cache
def help_of(*command: str) -> str:
    result = subprocess.run([sys.executable, *command, "--help"], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_two_commands_come_first():
    assert commands()[:2] == ["make demo", "make test"]


@pytest.mark.parametrize("command", dict.fromkeys(commands()))
def test_every_command_exists_with_its_flags(command):
    words = [w for w in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=.*", w)]
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
        return
    if words[0] in ("pip", "git", "cd", "apt-get"):
        return
    if words[0].endswith("demix"):
        text = help_of("-m", "megatron_demix.cli", words[1])
    else:
        script = next((w for w in words if w.endswith(".py")), None)
        assert script, f"a command this test does not know: {command}"
        assert (ROOT / script).is_file()
        text = help_of(script, words[words.index(script) + 1]) if script.endswith(_WITH_COMMANDS) else help_of(script)
        words = words[words.index(script) :]
    missing = [w for w in words if w.startswith("--") and w.split("=")[0] not in text]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_within_the_repository_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert missing == []


def test_the_tree_names_what_exists():
    tree = re.search(r"```\n(megatron_demix/\n.*?)```", README, re.DOTALL)
    assert tree
    folder = ROOT
    for line in tree[1].splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = ROOT / name
        path = folder if not line.startswith(" ") else folder / name
        assert path.exists(), line


def test_the_exit_codes_are_the_programs():
    rows = dict(re.findall(r"^\| (\d+) \| (.+?) \|", README, re.MULTILINE))
    codes = {c.exit_code for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.DemixError)}
    assert {int(code) for code in rows} == codes | {0}


def test_the_project_stands_on_its_own():
    """No page speaks of paths of the machine it was written on."""
    for page in PAGES:
        assert not re.search(r"/(work|root|tmp)/", page.read_text(encoding="utf-8")), page
