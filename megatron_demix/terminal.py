"""What people see on standard output, and what libraries would say there."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def new_table(*columns: str, right: Collection[str] = (), folding: Collection[str] = ()) -> Table:
    """right: the columns of numbers. folding: those that give way where a terminal is narrow, and go on in the next line; by
    default the last, which holds paths."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in columns:
        folds = column in (folding or columns[-1:])
        table.add_column(
            column,
            no_wrap=not folds,
            overflow="fold" if folds else "ellipsis",
            justify="right" if column in right else "left",
        )
    return table


def on_terminal() -> Console:
    from rich.console import Console

    # What is not a terminal may be grep: a row is a line, however long.
    return Console(width=None if sys.stdout.isatty() else 1000, highlight=False)


def shown(path: Path) -> str:
    """Relative to where one stands, if that is shorter."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


@contextmanager
def silent() -> Iterator[None]:
    """Without what libraries report on standard output and error, from native code, too: shown only if an error comes of it."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        try:
            for descriptor in (1, 2):
                os.dup2(said.fileno(), descriptor)
            with redirect_stdout(said), redirect_stderr(said):
                yield
        except BaseException:
            said.seek(0)
            os.write(kept[1], said.read().encode())
            raise
        finally:
            for descriptor, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, descriptor)
                os.close(copy)
