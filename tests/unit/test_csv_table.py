"""The reader of all CSV tables: strict, and right about lines."""

from pathlib import Path

import pytest

from megatron_demix.csv_table import NotATable, read_csv


def test_rows_know_the_lines_they_begin_on(tmp_path: Path) -> None:
    text = '\ufeffid, "a, b",c \r\n\r\n"x\r\ny", 1,\r\n   \r\n\tz,"2",3 '
    (tmp_path / "t.csv").write_bytes(text.encode())
    assert read_csv(tmp_path / "t.csv") == [(1, ["id", "a, b", "c"]), (3, ["x\ny", "1", ""]), (6, ["z", "2", "3"])]
    (tmp_path / "t.csv").write_text("\n\n")
    assert read_csv(tmp_path / "t.csv") == []


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("\nid,a, a\n", 2, "column 'a' is given twice. Keep one of them."),
        ('id,a\n"x\ny",1\nz,1,2\n', 4, "expected a name and 1 numbers, found 'z,1,2'."),
        ('id,a\n"x,1\n', 2, "not CSV (unexpected end of data)."),
        ('id,a\nx,"1"2\n', 2, "not CSV (',' expected after '\"')."),
    ],
)
def test_what_is_no_table_is_refused_with_the_line(tmp_path: Path, text: str, line: int, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(NotATable) as refused:
        read_csv(tmp_path / "t.csv")
    assert (refused.value.line, str(refused.value)) == (line, message)
    assert refused.value.place(tmp_path / "t.csv") == f"{tmp_path / 't.csv'}, line {line}"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.csv").write_bytes(b"id,a\n\xe9,1\n")
    for name in ("none.csv", "latin.csv"):
        with pytest.raises(NotATable, match="cannot be read as CSV") as refused:
            read_csv(tmp_path / name)
        assert refused.value.place(tmp_path / name) == str(tmp_path / name)
