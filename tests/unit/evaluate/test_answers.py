"""What counts as the right answer; and programs that a model wrote: whatever they do, they end, and leave nothing behind."""

import ctypes
import os
import resource
import socket
import threading
import time
from decimal import Decimal
from types import SimpleNamespace

import pytest
from task_files import HUMANEVAL, MBPP, write_all

from megatron_demix.errors import ConfigError, StageFailed
from megatron_demix.evaluate import job, suite
from megatron_demix.evaluate.tasks import answers, confine, sandbox
from megatron_demix.evaluate.tasks.answers import Judge, Judgement, boxed, final_number, normalised
from megatron_demix.evaluate.tasks.sandbox import run_python
from megatron_demix.evaluate.tasks.task import read_task
from megatron_demix.study.search import TaskSpec
from megatron_demix.study.training import ParallelSpec

isolated = pytest.mark.skipif(
    not sandbox.is_isolated(), reason="the kernel has neither namespaces for this user nor Landlock 6, or no filters"
)
with_namespaces = pytest.mark.skipif(
    run_python("import os; print(os.getpid())", timeout_s=30).output != "1\n",
    reason="the kernel lets this user make no namespaces",
)
LANDLOCK = ctypes.CDLL(None).syscall(444, None, 0, 1)
with_landlock = pytest.mark.skipif(LANDLOCK < 6, reason="needs Landlock of version 6")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4 = 7\n#### 7", "7"),
        ("#### -1,234.50\nfoo 3", "-1234.5"),
        ("#### $18", "18"),
        ("so 3 and then 4.", "4"),
        ("It costs $3.50.", "3.5"),
        ("none", None),
        ("####", None),
        ("3 + 4 = 7\n####", None),
        ("7\n####\n 8", "8"),
        ("", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"so \boxed{1}, no: $\boxed{\frac{1}{x^{2}}}$.", r"\frac{1}{x^{2}}"),
        (r"\fbox{3}", "3"),
        (r"$\boxed 5$", "5"),
        (r"\boxed{1", None),
        (r"\boxed", None),
        (r"so it is $\boxed$.", None),
        (r"\boxed {5}", "5"),
        (r"\boxed $5$", None),
        ("no", None),
    ],
)
def test_boxed(text, inside):
    assert boxed(text) == inside


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\dfrac12", r"\frac{1}{2}"),
        (r"\left( 3,\! 4 \right)", "(3,4)"),
        (r"10\text{ cm}", "10"),
        (r"90^\circ", "90"),
        (r"\$1,000.", "1000"),
        (r"50\%", "50"),
        ("-.5", "-0.5"),
        (r"\text{east}", "east"),
    ],
)
def test_formulas_that_are_written_in_two_ways(one, other):
    assert normalised(one) == normalised(other)


def test_what_differs_stays_different():
    assert (
        len({normalised(f) for f in ("(1,2)", "(1, 3)", "12", "1.2", r"\frac{1}{2}", "-12", r"\text{a}", r"\text{b}", "")}) == 9
    )


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("tasks"))


@pytest.mark.parametrize("name", ["gsm8k", "math", "humaneval", "mbpp"])
def test_the_published_solutions_are_right_and_nothing_else(tasks, name):
    task = read_task(TaskSpec(name=name, format=name, path=tasks[name], split="test"))
    judge = Judge(task.format.kind, timeout_s=10, workers=2)
    references = [item.reference for item in task.items]
    solutions = [item.options[0][1].split("[DONE]")[0] for item in task.items]
    assert judge.judge(solutions, references) == [Judgement(True)] * len(solutions)
    for wrong in ("", "    pass\n", "0", "import sys; sys.exit(0)"):
        assert judge.judge([wrong] * len(solutions), references) == [Judgement(False)] * len(solutions)


def test_formulas_are_compared_by_value():
    pytest.importorskip("math_verify")
    half = {"answer": r"so $\boxed{\frac{1}{2}}$"}
    judge = Judge("formula", timeout_s=2, workers=1)
    given = [r"\boxed{0.5}", r"it is $\frac{2}{4}$", r"\boxed{\frac{}", r"\boxed{9^{9^{9^{9^9}}}}", r"\boxed{1/3}", "who knows"]
    judged = judge.judge(given, [half] * len(given))
    assert [j.right for j in judged] == [True, True, False, False, False, False]
    assert judge.judge([r"\boxed{2,-2}"], [{"answer": r"\boxed{-2, 2}"}])[0].right


def test_formulas_are_compared_side_by_side(monkeypatch):
    monkeypatch.setattr(answers, "_LEAST_PAIRS", 2)
    judge = Judge("formula", timeout_s=2, workers=3)
    asked, told = [], judge._told
    monkeypatch.setattr(judge, "_told", lambda pairs: asked.append(len(pairs)) or told(pairs))
    given = [("\\boxed{1+1}", n == 2) for n in range(4)] + [("\\boxed{x+y}", False), ("\\boxed{y+x}", False), ("none", False)]
    references = [{"answer": f"\\boxed{{{n}}}"} for n in range(4)] + [{"answer": "\\boxed{7}"}] * 3
    judged = judge.judge([answer for answer, _ in given], references)
    assert [j.right for j in judged] == [right for _, right in given]
    assert sorted(asked) == [2, 2, 2]


def test_without_the_library_formulas_are_an_error(monkeypatch):
    monkeypatch.setattr(answers, "_COMPARE", answers._COMPARE.replace("math_verify", "not_there"))
    message = (
        r"which cannot be imported \(ModuleNotFoundError: No module named 'not_there'\): pip install 'megatron-demix\[eval\]'"
    )
    with pytest.raises(ConfigError, match=message):
        Judge("formula", timeout_s=1, workers=1)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A stand-in for math-verify that lies where this process alone looks for packages."""
    package = tmp_path / "site" / "verify_elsewhere"
    package.mkdir(parents=True)
    parse = "import os\ndef parse(text, **_): os._exit(3) if 'crash' in text else None; return [float(text.strip('$'))]\n"
    (package / "__init__.py").write_text(parse + "def verify(one, other, **_): return one == other\n")
    (package / "errors.py").write_text("TimeoutException = TimeoutError\n")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setattr(answers, "_COMPARE", answers._COMPARE.replace("math_verify", "verify_elsewhere"))
    return package


def test_the_library_is_found_where_this_process_finds_it(elsewhere):
    given = [r"\boxed{0.50}", r"\boxed{crash}", r"\boxed{2}", r"\boxed{crash}"]
    judge = Judge("formula", timeout_s=2, workers=1)
    half = [{"answer": r"\boxed{0.5}"}] * len(given)
    assert judge.judge(given, half) == [Judgement(True), Judgement(False, True), Judgement(False), Judgement(False, True)]
    # What has gone meanwhile is no fault of an answer's.
    (elsewhere / "errors.py").unlink()
    with pytest.raises(ConfigError, match=r"cannot be imported \(ModuleNotFoundError: .*errors"):
        judge.judge([r"\boxed{3}"], half[:1])


def test_a_library_that_takes_too_long_is_no_answers_fault(elsewhere, monkeypatch):
    monkeypatch.setattr(answers, "_START_S", 1)
    (elsewhere / "__init__.py").write_text("import time; time.sleep(99)")
    with pytest.raises(StageFailed, match=r"could not be imported in 1 s"):
        Judge("formula", timeout_s=1, workers=1)


def test_as_many_are_judged_side_by_side_as_there_are_processors_for_this_process(tasks, monkeypatch):
    given = {}
    monkeypatch.setattr(suite, "Suite", lambda *_, **options: given.update(options) or SimpleNamespace(runs_code=False))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    spec = TaskSpec(name="gsm8k", format="gsm8k", path=tasks["gsm8k"], split="test")
    described = SimpleNamespace(tasks=[spec], tokenizer=tasks["gsm8k"], parallel=ParallelSpec(data=2), max_tokens=64)
    job._suite(described, lambda folder: None)
    assert given == {"max_tokens": 64, "workers": 3}


def test_one_answer_is_run_once(tasks, monkeypatch):
    ran = []
    monkeypatch.setattr(
        sandbox, "run_all", lambda programs, **_: ran.extend(programs) or [run_python(p, timeout_s=10) for p in programs]
    )
    judge = Judge("code", timeout_s=10, workers=1)
    reference = {"before": "", "after": "\n".join(MBPP[2]["test_list"])}
    for _ in range(2):
        assert judge.judge([MBPP[2]["code"]] * 3, [reference] * 3) == [Judgement(True)] * 3
    assert len(ran) == 1


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("x = bytearray(4 << 30)", "MemoryError"),
        ("open('large', 'w').write('x' * (1 << 25))", "OSError: [Errno 27] File too large"),
        ("while True: print('x' * 1000)", "OSError: [Errno 27] File too large"),
        ("[open('/dev/null') for _ in range(1000)]", "OSError: [Errno 24] Too many open files: '/dev/null'"),
        ("def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("import os; os._exit(0)", ""),
        ("import os; os._exit(87)", ""),
        ("raise SystemExit", ""),
        ("import ctypes; ctypes.string_at(0)", ""),
        ("\x00", "ValueError: source code string cannot contain null bytes"),
        ("import os; assert 'SECRET' not in os.environ and os.listdir() == []; 1 / 0", "ZeroDivisionError: division by zero"),
    ],
)  # fmt: skip
def test_a_program_that_fails(program, problem, isolate, monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    outcome = run_python(program, timeout_s=20, isolate=isolate)
    assert not outcome.passed
    assert not outcome.timed_out
    if not (problem.startswith("ValueError") and "SyntaxError" in outcome.problem):  # another name in newer versions of Python
        assert outcome.problem == problem


@pytest.mark.parametrize(
    "program", ["while True: pass", "import signal, time; signal.signal(15, lambda *_: 0); time.sleep(99)"]
)
def test_a_program_that_never_ends(program):
    started = time.monotonic()
    outcome = run_python(program, timeout_s=0.7)
    assert outcome == sandbox.Outcome(False, True, "", "")
    assert time.monotonic() - started < 60


@isolated
@pytest.mark.parametrize("isolate", [True, pytest.param(False, marks=with_landlock)])
@pytest.mark.parametrize(
    "program",
    [
        "import socket; socket.create_connection(('127.0.0.1', 22), timeout=3)",
        "import urllib.request; urllib.request.urlopen('http://192.0.2.1/', timeout=3)",
        "open('/tmp/demix-escaped', 'w')",
        f"import os; os.remove({__file__!r})",
        f"import os; os.truncate({__file__!r}, 0)",
        "import os; os.kill(os.getppid(), 9); assert os.getppid() != 0",
        "import subprocess; subprocess.run(['mount', '-o', 'remount,rw', '/'], check=True)",
        "import ctypes; assert ctypes.CDLL(None).mount(b'x', b'/', b'tmpfs', 0, 0) == 0",
    ],
)  # fmt: skip
def test_nothing_outside_can_be_reached(program, isolate):
    outcome = run_python(program, timeout_s=20, isolate=isolate)
    assert not outcome.passed
    assert os.path.getsize(__file__)
    assert not os.path.exists("/tmp/demix-escaped")


@isolated
def test_limits_of_other_processes_cannot_be_set():
    """Landlock keeps signals in, and knows nothing of prlimit(2)."""
    own = resource.getrlimit(resource.RLIMIT_FSIZE)
    program = f"import resource; resource.prlimit({os.getpid()}, resource.RLIMIT_FSIZE, (0, 0))"
    assert not run_python(program, timeout_s=20, isolate=False).passed
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == own
    assert run_python(
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))", timeout_s=20, isolate=False
    ).passed


@isolated
@pytest.mark.parametrize("call", ["shmget", "semget", "msgget"])
def test_nothing_stays_in_memory(call):
    arguments = {"shmget": "0, 4096, 0o1600", "semget": "0, 1, 0o1600", "msgget": "0, 0o1600"}[call]
    program = f"import ctypes; assert ctypes.CDLL(None).{call}({arguments}) >= 0"
    assert not run_python(program, timeout_s=20, isolate=False).passed


@pytest.mark.parametrize("isolate", [True, False])
def test_folders_within_folders_are_removed(isolate, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    program = "import os\nfor _ in range(2000):\n    os.mkdir('d'); os.chdir('d')"
    assert run_python(program, timeout_s=60, isolate=isolate).passed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("isolate", [True, False])
def test_the_token_of_a_pass_cannot_be_read_again(isolate):
    steals = "import os; os.lseek(0, 0, 0); t = os.read(0, 99).split(b'\\n')[0] + b'\\n'; [os.write(n, t) for n in range(3, 9)]"
    assert not run_python(f"{steals}; os._exit(0)", timeout_s=20, isolate=isolate).passed


@isolated
@pytest.mark.parametrize("isolate", [True, False])
def test_no_socket_can_be_reached(isolate, tmp_path):
    """Files lead to some, which namespaces of networks do not cover."""
    with socket.socket(socket.AF_UNIX) as unix, socket.create_server(("127.0.0.1", 0)) as local:
        unix.bind(str(tmp_path / "daemon"))
        unix.listen()
        for family, address in (("AF_UNIX", str(tmp_path / "daemon")), ("AF_INET", local.getsockname())):
            program = f"import socket; socket.socket(socket.{family}).connect({address!r})"
            outcome = run_python(program, timeout_s=20, isolate=isolate)
            assert (outcome.passed, outcome.problem) == (False, "PermissionError: [Errno 13] Permission denied")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.bind(str(tmp_path / "log"))
        program = f"import socket as s; s.socketpair(s.AF_UNIX, s.SOCK_DGRAM)[0].sendto(b'x', {str(tmp_path / 'log')!r})"
        assert not run_python(program, timeout_s=20, isolate=isolate).passed
        with pytest.raises(BlockingIOError):
            log.recv(1, socket.MSG_DONTWAIT)
    assert run_python("import asyncio; asyncio.run(asyncio.sleep(0))", timeout_s=20, isolate=isolate).passed


@pytest.mark.skipif(LANDLOCK < 1, reason="needs Landlock")
@pytest.mark.parametrize("isolate", [True, False])
def test_a_program_reads_python_and_the_system_and_nothing_else(isolate, tmp_path):
    (tmp_path / "secret").write_text("x")
    for program in (
        f"open({str(tmp_path / 'secret')!r})",
        f"import os; os.listdir({str(tmp_path)!r})",
        f"open('/proc/{os.getpid()}/environ', 'rb').read()",
        "open('/etc/hostname')",
    ):
        outcome = run_python(program, timeout_s=20, isolate=isolate)
        assert (outcome.passed, outcome.problem.startswith(("PermissionError", "FileNotFoundError"))) == (False, True), program
    needed = (
        "import ssl, lzma, numpy, subprocess, tempfile; subprocess.run(['ls'], check=True); open(tempfile.mkstemp()[1], 'a')"
    )
    assert run_python(needed, timeout_s=20, isolate=isolate).passed


@pytest.mark.parametrize("isolate", [True, False])
def test_packages_of_elsewhere_can_be_allowed(isolate, tmp_path):
    (tmp_path / "only_here.py").write_text("")
    assert not run_python("import only_here", timeout_s=20, isolate=isolate).passed
    assert run_python("import only_here", timeout_s=20, isolate=isolate, packages=[str(tmp_path)]).passed


@with_namespaces
def test_on_kernels_without_descriptors_of_processes(monkeypatch):
    def absent(number):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", absent)
    programs = ["", "raise SystemExit(3)", "while True: pass"]
    assert [(o.passed, o.timed_out) for o in (run_python(p, timeout_s=2) for p in programs)] == [
        (True, False),
        (False, False),
        (False, True),
    ]


def test_what_a_program_started_ends_with_it():
    """Even what has left its process group; the kernel takes a moment for it."""
    mark = f"731.{os.getpid()}"
    start = f"import subprocess; p = subprocess.Popen(['sleep', '{mark}'], start_new_session=True)"
    assert run_python(start, timeout_s=20).passed
    assert run_python(f"{start}; p.wait()", timeout_s=1).timed_out
    deadline = time.monotonic() + 10
    while any(_says(folder, mark) for folder in os.listdir("/proc") if folder.isdigit()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _says(pid: str, word: str) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return word in file.read()
    except OSError:
        return False


def test_a_program_may_write_where_it_stands():
    assert run_python("open('a', 'w').write('x'); print(open('a').read())", timeout_s=20).output == "x\n"


def test_many_side_by_side():
    programs = [HUMANEVAL[0]["prompt"] + HUMANEVAL[0]["canonical_solution"], "1 / 0", "pass"]
    assert [o.passed for o in sandbox.run_all(programs, timeout_s=20, workers=3)] == [True, False, True]


@pytest.mark.parametrize(
    "main", ["print(f(int(input())))", "import unittest; unittest.main()", "import sys; sys.exit(f(0))", "raise SystemExit"]
)
def test_what_an_answer_does_as_a_script_does_not_count(main):
    program = f"def f(x):\n    return x\n\nif __name__ == '__main__':\n    {main}\n\nassert f(1) == 1\n"
    assert run_python(program, timeout_s=20).passed


def test_an_answer_is_a_module_that_can_be_found():
    """Dataclasses and pickles look for the module of a class."""
    program = """from __future__ import annotations
import dataclasses, pickle

@dataclasses.dataclass
class Point:
    x: int

assert pickle.loads(pickle.dumps(Point(1))) == Point(1)
"""
    assert run_python(program, timeout_s=20).passed


def test_the_users_other_threads_are_none_of_a_programs_processes():
    end, before = threading.Event(), confine.tasks_of_user()
    threads = [threading.Thread(target=end.wait) for _ in range(20)]
    try:
        for thread in threads:
            thread.start()
        assert confine.tasks_of_user() >= before + 15
    finally:
        end.set()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"2\text{ or }3", "23"),
        (r"2\text{ and }3", "23"),
        (r"\text{A}, \text{B}", r"\text{C}, \text{D}"),
        (r"5\text{ cm}^2", "5^2"),
        (r"\mathrm{i}2", "2"),
    ],
)
def test_text_that_is_no_unit_tells_answers_apart(one, other):
    assert normalised(one) != normalised(other)
