from pathlib import Path

import numpy as np
import pytest

from megatron_demix.errors import CorruptInput, IncompatibleInputs, MixtureError
from megatron_demix.search.tables import Table, as_mixtures


def written(folder: Path, text: str, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_table_reads_back_what_was_written(tmp_path: Path) -> None:
    table = Table(tmp_path, "id", ("m0", "m1"), ("a", "b, c"), np.array([[1 / 3, 2e-17], [np.nan, -1]]))
    table.write(tmp_path / "t.csv")
    again = Table.read(tmp_path / "t.csv")
    assert (again.id_name, again.ids, again.columns) == ("id", ("m0", "m1"), ("a", "b, c"))
    assert np.array_equal(again.values_MC, table.values_MC, equal_nan=True)


def test_rows_and_columns_are_selected_by_name(tmp_path: Path) -> None:
    table = Table.read(written(tmp_path, "id,a,b\nx,1,2\n\ny,3,4\n"))
    assert table.select(["y", "x"], ["b", "a"], other=Path("o.csv")).tolist() == [[4, 3], [2, 1]]
    turned = table.with_columns(["b", "a"], other="the domains file")
    assert (turned.ids, turned.columns, turned.values_MC.tolist()) == (("x", "y"), ("b", "a"), [[2, 1], [4, 3]])
    with pytest.raises(IncompatibleInputs, match=r"t\.csv: column 'c' of the domains file is missing \(1 such\)"):
        table.with_columns(["b", "a", "c"], other="the domains file")
    with pytest.raises(IncompatibleInputs, match=r"t\.csv: id 'z' of o\.csv is missing \(1 such\)"):
        table.select(["z"], ["a", "b"], other=Path("o.csv"))
    with pytest.raises(IncompatibleInputs, match=r"t\.csv: column 'b' is not in o\.csv \(1 such\)"):
        table.select(["x"], ["a"], other=Path("o.csv"))
    with pytest.raises(IncompatibleInputs, match=r"t\.csv: column 'c' of o\.csv is missing"):
        table.select(["x"], ["a", "b", "c"], other=Path("o.csv"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a header of an id column and at least one more column"),
        ("id\nx\n", "expected a header"),
        ("id,a,a\nx,1,2\n", r"t\.csv, line 1: column 'a' is given twice\. Keep one of them"),
        ("id,a\nx,1\nx,2\n", "line 3: id 'x' was already on line 2"),
        ("id,a\nx,1,2\n", "line 2: expected a name and 1 numbers, found 'x,1,2'"),
        ("id,a\nx,one\n", "line 2: 'one' in column 'a' is not a number"),
        ('id,a\n"x\ny",1\n\nz,one\n', "line 5: 'one' in column 'a' is not a number"),
        ('id,a\n"x\ny",one\n', "line 2: 'one' in column 'a' is not a number"),
        ('id,a\n"x,1\n', r"t\.csv, line 2: not CSV \(unexpected end of data\)"),
        ('id,a\n"x"y,1\n', r"t\.csv, line 2: not CSV"),
        ("id,a\nx,\x00\n", "t.csv"),
    ],
)
def test_damaged_tables_are_refused_with_the_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CorruptInput, match=message):
        Table.read(written(tmp_path, text))


def test_a_missing_file_or_foreign_encoding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptInput, match=r"none\.csv: cannot be read as CSV"):
        Table.read(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes(b"id,a\n\xe9,1\n")
    with pytest.raises(CorruptInput, match=r"latin\.csv: cannot be read as CSV"):
        Table.read(tmp_path / "latin.csv")


def test_rounded_mixtures_are_divided_by_their_sum_and_others_refused(tmp_path: Path) -> None:
    shares_MD, gap = as_mixtures(Table.read(written(tmp_path, "id,a,b\nx,0.333,0.666\ny,0.5,0.5\n")))
    assert gap == pytest.approx(0.001)
    assert (shares_MD.sum(axis=1) == 1).all()
    for row, message in (
        ("0.5,0.6", r"mixture 'y' sums to 1\.1, expected 1"),
        ("1.2,-0.2", r"mixture 'y' has weight -0\.2 for 'b'"),
        (",1", "mixture 'y' has weight nan for 'a'"),
    ):
        with pytest.raises(MixtureError, match=message):
            as_mixtures(Table.read(written(tmp_path, f"id,a,b\nx,0.5,0.5\ny,{row}\n")))
