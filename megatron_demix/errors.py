"""The exception tree. Each class knows the exit code its command ends with.

Codes 16 and 17 are those of Megatron-LM's rerun state machine, passed through; 1 is left to unexpected errors (bugs).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class DemixError(Exception):
    """Root of every error a user can cause or meet. The message names the object, what was seen, what was expected,
    and what to do next."""

    exit_code = 1


class ConfigError(DemixError):
    """A flag, a study file or the machine's set-up is wrong."""

    exit_code = 2


class IncompatibleInputs(DemixError):
    """Inputs that are each sound do not fit one another: shapes, dtypes, vocabularies, tokenizers, domain names."""

    exit_code = 3


class MixtureError(DemixError):
    """A mixture is malformed (does not sum to 1, negative, unknown domain) or cannot be met by the data at hand."""

    exit_code = 4


class VerificationFailed(DemixError):
    """An output was written, read again, and is not what was planned. It has not been published."""

    exit_code = 5


class OutputExists(DemixError):
    """The output path holds something else. Nothing is ever overwritten."""

    exit_code = 6


class CorruptInput(DemixError):
    """An input file is truncated, foreign, unreadable or unsafe to read (a pickle that names forbidden classes)."""

    exit_code = 7


class UnsafeInput(CorruptInput):
    """A pickle names what has no place there, and was not run. The file may be whole: nothing is deleted because of this."""


class StageFailed(DemixError):
    """A stage's process died or hung: running again may help. The log is named; finished artifacts are intact."""

    exit_code = 8


class Diverged(DemixError):
    """Training diverged. Running again would end in the same way; the last checkpoint is intact."""

    exit_code = 9


class RerunAsked(DemixError):
    """Megatron-LM met a result that it could not repeat, and asks to be started again, to tell chance from a broken device."""

    exit_code = 16


class FaultFound(DemixError):
    """Megatron-LM found that a result is wrong or cannot be repeated: starting it again on the same machine is of no use."""

    exit_code = 17


class StorageError(DemixError):
    """The disk is full or refuses to be written. Nothing that is half written has been published."""

    exit_code = 74


class Incomplete(DemixError):
    """Stopped early on request (signal, time limit) with its state saved: run the same command again."""

    exit_code = 75


class EndedEarly(Incomplete):
    """A trainer ended by itself, and without an error, before its last iteration."""


def limit_reached(e: Exception) -> ConfigError | None:
    """What Python raises where the system starts no more threads or processes, as an error that says so; None for any other."""
    if not ("can't start new thread" in str(e) or (isinstance(e, OSError) and e.errno == errno.EAGAIN)):
        return None
    return ConfigError(
        f"the system starts no more threads or processes here ({e}): a limit on them is reached, that of the user (ulimit -u) "
        "or of the container or job (pids.max of its cgroup). Raise it, or ask for fewer workers or threads, then run again; "
        "nothing that was finished is lost."
    )


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""What the operating system says of a disk that takes no more."""
_NO_PLACE = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)


@contextmanager
def storage_errors(what: str, *, under: Path | None = None) -> Iterator[None]:
    """Turn what the operating system says of a full disk, and of places where nothing can be written, into StorageError naming
    `what` was being written. under: the folder that is written to, where files elsewhere are read meanwhile: they are no place
    to write."""
    try:
        yield
    except OSError as e:
        at = f" ({e.filename})" if e.filename else ""
        if e.errno in FULL:
            raise StorageError(
                f"{what}: {e.strerror or e}{at}. Free space or choose another disk, then run again; "
                "nothing that was finished is lost."
            ) from e
        elsewhere = under and e.filename and not os.path.abspath(os.fspath(e.filename)).startswith(f"{os.path.abspath(under)}/")
        if e.errno in _NO_PLACE and not elsewhere:
            raise StorageError(f"{what}: {e.strerror or e}{at}. Choose another place.") from e
        raise
