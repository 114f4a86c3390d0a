"""Tables of mixtures and scores as CSV: the first column is an id, the others are found by name and never by position."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_demix.artifact import write_atomic
from megatron_demix.csv_table import NotATable, read_csv
from megatron_demix.errors import CorruptInput, IncompatibleInputs, MixtureError

MERGE_WEIGHTS, SHARES = "merge_weights", "shares"
"""The header of the id column where a table holds mixtures as the one or the other. Tables of others may say anything."""
ROUNDING = 0.02
"""Mixtures printed with few digits miss 1 by less than this; a larger gap is a mistake."""


@dataclass(frozen=True)
class Table:
    """ids_M, column names and float64 values_MC of one CSV file. Missing cells are NaN."""

    path: Path
    id_name: str
    ids: tuple[str, ...]
    columns: tuple[str, ...]
    values_MC: np.ndarray

    @classmethod
    def read(cls, path: Path) -> Table:
        """Raises CorruptInput naming the line: what read_csv does not take, no header, repeated id, not a number."""
        path = Path(path)
        try:
            rows = read_csv(path)
        except NotATable as e:
            raise CorruptInput(f"{e.place(path)}: {e}") from e
        if not rows or len(rows[0][1]) < 2:
            raise CorruptInput(f"{path}: expected a header of an id column and at least one more column, found none.")
        id_name, *columns = rows[0][1]
        ids: dict[str, int] = {}
        values_MC = np.empty((len(rows) - 1, len(columns)))
        for m, (line, (name, *cells)) in enumerate(rows[1:]):
            if name in ids:
                raise CorruptInput(f"{path}, line {line}: id {name!r} was already on line {ids[name]}.")
            ids[name] = line
            values_MC[m] = [_number(cell, path, line, column) for cell, column in zip(cells, columns, strict=True)]
        return cls(path, id_name, tuple(ids), tuple(columns), values_MC)

    def write(self, path: Path) -> None:
        """Write as CSV, atomically. Raises StorageError."""
        write_atomic(Path(path), self.as_csv())

    def as_csv(self) -> str:
        """Numbers with all their digits, NaN as an empty cell."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([self.id_name, *self.columns])
        for name, row in zip(self.ids, self.values_MC, strict=True):
            writer.writerow([name, *("" if np.isnan(value) else repr(float(value)) for value in row)])
        return text.getvalue()

    def check_holds(self, what: str) -> None:
        """Raises IncompatibleInputs if the header says that these mixtures are shares where `what` is merge weights, or the
        reverse."""
        if self.id_name in (MERGE_WEIGHTS, SHARES) and self.id_name != what:
            is_, expected = ("merge weights", "actual shares") if what == SHARES else ("actual shares", "merge weights")
            raise IncompatibleInputs(
                f"{self.path}: its first cell, {self.id_name!r}, says that it holds {is_}; expected {expected}. `sample` "
                "writes both (--output: merge weights, --shares: actual shares). Where no component saw an anchor they are the "
                f"same: write {what!r} there."
            )

    def column(self, name: str) -> np.ndarray:
        """values_M of one column. Raises IncompatibleInputs listing the columns there are."""
        if name not in self.columns:
            raise IncompatibleInputs(f"{self.path}: no column {name!r}; the columns are {', '.join(self.columns)}.")
        return self.values_MC[:, self.columns.index(name)]

    def with_columns(self, columns: Sequence[str], *, other: Path | str) -> Table:
        """The same rows with exactly these columns, in this order. Raises as select does."""
        return replace(self, columns=tuple(columns), values_MC=self.select(self.ids, columns, other=other))

    def select(self, ids: Sequence[str], columns: Sequence[str], *, other: Path | str) -> np.ndarray:
        """values of exactly these rows and columns, in this order, as `other` (a file, or its name in words) has them. Raises
        IncompatibleInputs naming what is absent here, or there."""
        for what, wanted, present in (("column", columns, self.columns), ("id", ids, self.ids)):
            here, there = set(present), set(wanted)
            lacking, extra = [x for x in wanted if x not in here], [x for x in present if x not in there]
            if what == "column" and extra:
                raise IncompatibleInputs(
                    f"{self.path}: column {extra[0]!r} is not in {other} ({len(extra)} such). Name both sides alike."
                )
            if lacking:
                raise IncompatibleInputs(
                    f"{self.path}: {what} {lacking[0]!r} of {other} is missing ({len(lacking)} such). "
                    "Nothing is filled in: add it here, or remove it there."
                )
        row_of, column_of = ({name: i for i, name in enumerate(names)} for names in (self.ids, self.columns))
        return self.values_MC[np.ix_([row_of[name] for name in ids], [column_of[name] for name in columns])]


def _number(cell: str, path: Path, line: int, column: str) -> float:
    if not cell:
        return float("nan")
    try:
        return float(cell)
    except ValueError as e:
        raise CorruptInput(f"{path}, line {line}: {cell!r} in column {column!r} is not a number.") from e


def no_number(value: float) -> str:
    """What a score is that is not finite, in words: a cell that is empty or nan, or infinity, as of a model that diverged."""
    return "missing" if np.isnan(value) else "infinite"


def as_mixtures(table: Table) -> tuple[np.ndarray, float]:
    """shares_MD whose rows sum to 1, and by how much the worst row missed it (rounded numbers do; each row is then divided by
    its sum). Raises MixtureError naming the first row that is not a mixture even so."""
    sums_M = table.values_MC.sum(axis=1)
    gaps_M = np.abs(sums_M - 1)
    for m in np.flatnonzero(~(gaps_M <= ROUNDING) | ~(table.values_MC >= 0).all(axis=1)):
        row = table.values_MC[m]
        if np.isfinite(row).all() and (row >= 0).all():
            raise MixtureError(
                f"{table.path}: mixture {table.ids[m]!r} sums to {sums_M[m]:.6g}, expected 1 (tolerance {ROUNDING:g}, for "
                "rounding). Correct the row."
            )
        c = int((~(row >= 0)).argmax())
        raise MixtureError(
            f"{table.path}: mixture {table.ids[m]!r} has weight {row[c]:g} for {table.columns[c]!r}, "
            "expected a finite number >= 0."
        )
    return table.values_MC / sums_M[:, None], float(gaps_M.max(initial=0.0))
