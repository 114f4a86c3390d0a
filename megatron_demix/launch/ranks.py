"""torchrun with three manners it lacks: it ends with its ranks' exit code, it dies when whoever started it dies, and it gives
ranks that were asked to stop the time they need to save.

`python -m megatron_demix.launch.ranks [torchrun's own arguments] (-m MODULE | SCRIPT) ARGS`
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from megatron_demix.errors import Incomplete
from megatron_demix.process import die_with_parent


@contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """Whoever sets a handler of SIGTERM meanwhile sets none, and hears of the one there is.

    torchrun would pass SIGTERM on and kill what still runs 30 s later, in the middle of a large save. Its own option
    --signals-to-handle, which says the same, came with torch 2.9.
    """
    set_handler = signal.signal

    def set_others(signum: int, handler: Any) -> Any:
        return signal.getsignal(signum) if signum == signal.SIGTERM else set_handler(signum, handler)

    signal.signal = set_others  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = set_handler


def _kept_in(folder: str, arguments: argparse.Namespace) -> argparse.Namespace:
    """Its log folders, which it would leave behind, go with this one. With --standalone, torchrun also meets itself in a file
    there, that only this user can open. By default it listens on all of the machine's addresses, and unpickles what anyone puts
    there. What keeps it alive is appended to the file: once a minute."""
    arguments.log_dir = arguments.log_dir or folder
    if arguments.standalone:
        arguments.standalone = False
        arguments.rdzv_backend, arguments.rdzv_conf = "c10d", "store_type=file,keep_alive_interval=60"
        arguments.rdzv_endpoint, arguments.rdzv_id = os.path.join(folder, "rendezvous"), secrets.token_hex(8)
    return arguments


def main() -> int:
    import psutil  # not in the handler: a second signal would find it half imported

    asked: list[int] = []

    def pass_on(signum: int, frame: object) -> None:
        """Ranks save and end with a code of their own, which ends torchrun. Without ranks there is nothing to save."""
        asked.append(signum)
        ranks = psutil.Process().children()
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):  # it has just ended
                rank.send_signal(signal.SIGTERM)
        if not ranks:
            os._exit(Incomplete.exit_code)

    signal.signal(signal.SIGTERM, pass_on)
    die_with_parent()
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    try:
        with _keeping_sigterm(), tempfile.TemporaryDirectory(prefix="demix-ranks-") as private:
            run(_kept_in(private, parse_args(sys.argv[1:])))
    except ChildFailedError as e:
        _, first = e.get_first_failure()
        if asked and first.exitcode == -signal.SIGTERM:  # it was still importing
            return Incomplete.exit_code
        return first.exitcode if first.exitcode >= 0 else 128 - first.exitcode
    except SignalException:
        return Incomplete.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
