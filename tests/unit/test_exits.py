"""What a command line of this project says."""

import subprocess
import sys

import pytest

WARNS = """
import warnings
import megatron_demix
from megatron_demix.exits import exit_code
def run():
    warnings.warn_explicit("a share is off", UserWarning, megatron_demix.__file__, 7)
    warnings.warn_explicit("another's", UserWarning, "/elsewhere/module.py", 7)
    return 3
raise SystemExit(exit_code(run))
"""

WARNS_AGAIN = """
import warnings
import megatron_demix
from megatron_demix.exits import exit_code
def run():
    for _ in range(2):
        warnings.warn_explicit("a share is off", UserWarning, megatron_demix.__file__, 7)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
    return 0
exit_code(run)
"""


def test_a_warning_of_a_script_that_was_called_by_a_relative_path_is_a_line(tmp_path):
    (tmp_path / "tool.py").write_text(
        "import warnings\nfrom megatron_demix.exits import exit_code\nexit_code(lambda: warnings.warn('a share is off') or 0)\n"
    )
    done = subprocess.run([sys.executable, "tool.py"], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.stderr == "warning: a share is off\n"


def test_a_warning_is_said_once_though_something_has_caught_warnings_since():
    done = subprocess.run([sys.executable, "-c", WARNS_AGAIN], capture_output=True, text=True, timeout=60)
    assert done.stderr == "warning: a share is off\n"


def test_a_warning_is_a_line_without_its_place_in_the_code():
    done = subprocess.run([sys.executable, "-c", WARNS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    assert done.stderr.splitlines() == ["warning: a share is off", "/elsewhere/module.py:7: UserWarning: another's"]


def test_a_deprecation_that_others_tell_of_a_caller_here_keeps_its_place():
    script = WARNS.replace('"a share is off", UserWarning', '"use DTensor", FutureWarning')
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert "__init__.py:7: FutureWarning: use DTensor" in done.stderr


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [("StageFailed('lost')", 8, "error (rank 3): lost"), ("KeyError('bug')", 1, "KeyError: 'bug'")],
)
@pytest.mark.parametrize("left", [True, False])
def test_a_rank_that_failed_does_not_wait_for_the_destructors_of_groups_that_are_left(error, code, said, left):
    program = f"""
import atexit, os, sys, types
torch = types.ModuleType("torch")
torch.distributed = types.SimpleNamespace(is_initialized=lambda: {left})
sys.modules["torch"] = torch
os.environ["RANK"] = "3"
from megatron_demix.exits import rank_exit_code
from megatron_demix.errors import StageFailed
atexit.register(print, "destructors")
def fail():
    print("begun")
    raise {error}
raise SystemExit(rank_exit_code(fail))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == code
    assert said in done.stderr
    assert done.stdout == ("begun\n" if left else "begun\ndestructors\n")
