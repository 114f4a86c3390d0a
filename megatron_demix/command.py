"""How a command line of this project ends: an error's message and exit code, and nothing half done."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from megatron_demix.errors import ConfigError, DemixError

INTERRUPTED = 130
"""As a shell counts a process that SIGINT ended."""
BROKEN_PIPE = 141
"""The same for SIGPIPE: nobody reads what is printed."""


def exit_code(run: Callable[[], int]) -> int:
    """What `run` returns; or, with a line on standard error, the code of the error that it raises."""
    try:
        return run()
    except DemixError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more when it flushes
        return BROKEN_PIPE
    except OSError as e:
        print(f"error: {e.filename or 'a file'}: {e.strerror or e}.", file=sys.stderr)
        return ConfigError.exit_code
    except KeyboardInterrupt:
        print("stopped; nothing was published.", file=sys.stderr)
        return INTERRUPTED
