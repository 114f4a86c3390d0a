"""Programs that a model wrote, in processes of their own: bounded in time, memory, files and processes, and, where the kernel
allows that, unable to open sockets, to write this machine's files, and to read any but those of Python and the system."""

from __future__ import annotations

import functools
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megatron_demix.evaluate.tasks import confine

_MEMORY_BYTES, _FILE_BYTES, _OUTPUT_BYTES, _PROCESSES = 1 << 30, 1 << 24, 1 << 20, 16


@dataclass(frozen=True)
class Outcome:
    """passed: the program ran to its end, in time. output: the beginning of what it wrote. problem: its last error line."""

    passed: bool
    timed_out: bool
    output: str
    problem: str


def run_python(
    program: str,
    *,
    timeout_s: float,
    memory_bytes: int = _MEMORY_BYTES,
    packages: Sequence[str] = (),
    isolate: bool = True,
    probe: bool = False,
) -> Outcome:
    """Run `program` as a script, in an empty folder that is deleted afterwards. Whatever it does, this returns.

    packages: folders that it may import from, and read, beside those of Python itself.
    isolate: in namespaces, where nothing of this machine can be written, if the kernel allows it; else with all other limits.
    probe: only say which.
    """
    settings: dict[str, Any] = {
        "memory_bytes": memory_bytes,
        "cpu_s": int(timeout_s) + 1,
        "file_bytes": _FILE_BYTES,
        "processes": _PROCESSES,
        "packages": list(packages),
        "isolate": isolate,
        "probe": probe,
    }
    # What it writes goes into files of limited size, not into this process's memory.
    with (
        _empty_folder() as folder,
        tempfile.TemporaryFile() as source,
        tempfile.TemporaryFile() as verdict,
        tempfile.TemporaryFile() as output,
        tempfile.TemporaryFile() as errors,
    ):
        token = f"{secrets.token_hex()}\n".encode()
        source.write(token + program.encode("utf-8", errors="replace"))
        source.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", confine.__file__, json.dumps(settings | {"verdict": verdict.fileno()})],
            stdin=source,
            stdout=output,
            stderr=errors,
            cwd=folder,
            pass_fds=[verdict.fileno()],
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            timed_out = not _ends_within(process, timeout_s)
        finally:
            # Its group too, before its number is free for another process.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        verdict.seek(0)
        passed = verdict.read() == token and process.returncode == 0 and not timed_out
        return Outcome(passed, timed_out, _read(output), _last_line(_read(errors, end=True)))


@contextmanager
def _empty_folder() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="demix-answer-")
    try:
        yield folder
    finally:
        # Not shutil: a thousand folders within folders are more than Python's stack holds.
        for command in (["rm", "-rf"], ["chmod", "-R", "u+rwX"], ["rm", "-rf"]):  # the program may have shut folders
            if os.path.exists(folder):
                subprocess.run([*command, "--", folder], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


def _ends_within(process: subprocess.Popen, timeout_s: float) -> bool:
    """Without reaping the process."""
    try:
        watched = os.pidfd_open(process.pid)
    except OSError:  # Linux before 5.3, and containers whose filters are as old
        until = time.monotonic() + timeout_s
        while not (ended := bool(os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG))):
            if time.monotonic() > until:
                break
            time.sleep(0.01)
        return ended
    try:
        poll = select.poll()
        poll.register(watched, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))
    finally:
        os.close(watched)


def run_all(programs: Sequence[str], *, timeout_s: float, workers: int) -> list[Outcome]:
    """The same for many, `workers` at a time."""
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        return list(pool.map(lambda program: run_python(program, timeout_s=timeout_s), programs))


@functools.cache
def is_isolated() -> bool:
    """Whether programs can neither write this machine's files nor open sockets nor reach its processes. Elsewhere a caller says
    that they may."""
    return run_python("", timeout_s=30, probe=True).output.strip() == confine.ISOLATED


def _read(file: Any, *, end: bool = False) -> str:
    """The beginning, or the end, of what was written."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _OUTPUT_BYTES) if end else 0)
    return file.read(_OUTPUT_BYTES).decode("utf-8", errors="replace")


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
