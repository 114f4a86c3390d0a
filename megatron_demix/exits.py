"""How a command line of this project ends: an error's message and exit code, and nothing half done."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from megatron_demix.errors import FULL, ConfigError, DemixError, StorageError, limit_reached

INTERRUPTED = 130
"""As a shell counts a process that SIGINT ended."""
BROKEN_PIPE = 141
"""The same for SIGPIPE: nobody reads what is printed."""


def exit_code(run: Callable[[], int], *, speaker: str = "error", interrupted: str = "stopped; nothing was published.") -> int:
    """What `run` returns; or, with a line on standard error, the code of the error that it raises. Warnings are lines, too."""
    warn_in_lines()
    try:
        return run()
    except DemixError as e:
        print(f"{speaker}: {e}", file=sys.stderr)
        return e.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more when it flushes
        return BROKEN_PIPE
    except (RuntimeError, OSError) as e:
        if limit := limit_reached(e):
            print(f"{speaker}: {limit}", file=sys.stderr)
            return limit.exit_code
        if not isinstance(e, OSError):
            raise
        said = f"{e.filename}: {e.strerror}" if e.filename and e.strerror else str(e) or type(e).__name__
        advice = " Correct the path or its permissions, then run again." if e.filename else ""
        if e.errno in FULL:
            advice = " Free space or choose another disk, then run again."
        print(f"{speaker}: {said}.{advice}", file=sys.stderr)
        return StorageError.exit_code if e.errno in FULL else ConfigError.exit_code
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED


def rank_exit_code(run: Callable[[], int]) -> int:
    """The same of one of several ranks, whose errors are printed with its number; bugs keep their traceback.

    Where an error has left groups of ranks (NCCL's), it ends this process at once: on the way out their destructors would wait
    for the other ranks, which wait for this one.
    """
    warn_in_lines()
    try:
        return run()
    except Exception as raised:
        e = raised if isinstance(raised, DemixError) else limit_reached(raised)
        torch = sys.modules.get("torch")
        left = torch is not None and torch.distributed.is_initialized()
        if e is None:
            if not left:
                raise
            traceback.print_exc()
        else:
            print(f"error (rank {os.environ.get('RANK', '0')}): {e}", file=sys.stderr, flush=True)
        code = e.exit_code if e else 1
        if left:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        return code


_formatted = warnings.formatwarning


def warn_in_lines() -> None:
    """From now on, in this process, warnings are lines on standard error, and each is said once."""
    said: set[str] = set()

    def once(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
        """Python says a warning again as soon as anything has caught warnings, as fits do."""
        text = _in_a_line(message, category, filename, lineno, line)
        if text in said:
            return ""
        said.add(text)
        return text

    warnings.formatwarning = once


def _in_a_line(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    """What this project warns of, without the place in its code; others' as Python has it."""
    here = Path(filename).is_relative_to(Path(__file__).parent) or Path(filename).absolute() == Path(sys.argv[0]).absolute()
    # Others blame a caller in this project for their deprecations.
    return (
        f"warning: {message}\n" if here and category is UserWarning else _formatted(message, category, filename, lineno, line)
    )


def check_outputs(*paths: Path | None) -> None:
    """Raises ConfigError on files that cannot be written where they are wanted, before any work is done for them."""
    wanted = [path for path in paths if path is not None]
    for n, path in enumerate(wanted):
        if not path.parent.is_dir():
            raise ConfigError(f"{path}: there is no folder {path.parent}. Make it, or choose another place.")
        if path.is_dir():
            raise ConfigError(f"{path} is a folder, expected the name of a file that is to be written.")
        if os.path.realpath(path) in map(os.path.realpath, wanted[:n]):
            raise ConfigError(f"{path} is given as two outputs. Give each a name of its own.")


def check_at_least(flag: str, value: int, least: int) -> None:
    """Raises ConfigError on a number below the least that a flag takes."""
    if value < least:
        raise ConfigError(f"{flag} is {value}, expected at least {least}.")
