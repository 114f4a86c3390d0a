"""CSV tables as everyone here writes and reads them: a header, then rows of an id and a number for each other column."""

from __future__ import annotations

import csv
import io
from pathlib import Path


class NotATable(ValueError):
    """Says what a file is instead, for the reader's own error. line: where, as an editor counts; None: the file as a whole."""

    def __init__(self, what: str, line: int | None = None) -> None:
        super().__init__(what)
        self.line = line

    def place(self, path: Path) -> str:
        return f"{path}" if self.line is None else f"{path}, line {self.line}"


def read_csv(path: Path) -> list[tuple[int, list[str]]]:
    """(line, cells) of each row, the header first; none of an empty file. line: where the row begins, which is above its last
    where a cell holds a line break. Cells are stripped, empty lines left out.

    Raises NotATable: unreadable or no UTF-8, quotes that do not pair, a column twice, a row with more or fewer cells than the
    header.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise NotATable(f"cannot be read as CSV ({e}).") from e
    reader = csv.reader(io.StringIO(text), skipinitialspace=True, strict=True)
    rows: list[tuple[int, list[str]]] = []
    line = 1
    try:
        for cells in reader:
            row, begins, line = [cell.strip() for cell in cells], line, reader.line_num + 1
            if row in ([], [""]):
                continue
            header = rows[0][1] if rows else row
            if not rows and (repeated := {name for name in row if row.count(name) > 1}):
                raise NotATable(f"column {min(repeated)!r} is given twice. Keep one of them.", begins)
            if len(row) != len(header):
                found = ",".join(cells)[:80]
                raise NotATable(f"expected a name and {len(header) - 1} numbers, found {found!r}.", begins)
            rows.append((begins, row))
    except csv.Error as e:
        raise NotATable(f"not CSV ({e}).", reader.line_num) from e
    return rows
