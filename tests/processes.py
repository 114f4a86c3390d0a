"""Processes of this machine, found by what they are: for tests and benchmarks that do harm to them."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path


def processes(*words: str) -> list[int]:
    """Those whose command line has all these words; but not this one, nor those that repeat a rank's (torchrun's, srun)."""
    found = []
    for pid in _others():
        line = _read(pid, "cmdline").replace("\0", " ")
        if "launch.ranks" not in line and "srun " not in line and all(word in line for word in words):
            found.append(pid)
    return found


def launchers(program: str, *words: str) -> list[int]:
    """Those that start ranks: `program` is "launch.ranks" or "srun"."""
    lines = {pid: _read(pid, "cmdline").replace("\0", " ") for pid in _others()}
    return [
        pid
        for pid, line in lines.items()
        if program in line.split(" -m megatron_demix.pipeline")[0] and all(w in line for w in words)
    ]


def kill_all_of_node(name: str, log: Path) -> None:
    """As if it had lost its power. log: of its slurmd, which slurmstepd has open as well. Jobs have the name in a variable."""
    for pid in _others():
        if f"SLURMD_NODENAME={name}" in _read(pid, "environ").split("\0") or log in _open_files(pid):
            kill(pid)


@contextlib.contextmanager
def held(pids: list[int]) -> Iterator[None]:
    """Processes that do nothing meanwhile, so that however slow the one who looks at them is, they get no further."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _others() -> Iterator[int]:
    for path in Path("/proc").glob("[0-9]*"):
        if int(path.name) != os.getpid():
            yield int(path.name)


def _read(pid: int, what: str) -> str:
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _open_files(pid: int) -> set[Path]:
    try:
        return {path.readlink() for path in Path(f"/proc/{pid}/fd").iterdir()}
    except OSError:
        return set()
