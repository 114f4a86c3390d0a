"""Tables on standard output."""

from __future__ import annotations

import sys
from collections.abc import Collection
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
