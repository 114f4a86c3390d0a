"""Records of task files as data sets ship them: JSON lines, JSON and Parquet, by split, from a file or a folder."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_demix.errors import ConfigError, CorruptInput

SPLITS = {
    "train": {"train", "trn"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "tst"},
    "examples": {"examples", "prompt"},
}
"""The words that name each split in file and folder names."""
_SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")
_NOT_RECORDS = {"dataset_infos.json", "dataset_info.json"}  # what repositories of data sets keep beside them


@dataclass(frozen=True)
class Record:
    """One item of a task file, and where it came from. Every access checks; what is wrong names file, line and key."""

    place: str
    format: str
    expected: Sequence[str]
    """The format's keys, for messages."""
    fields: Mapping[str, Any]

    def __contains__(self, key: str) -> bool:
        return key in self.fields

    def get(self, key: str) -> Any:
        if key not in self.fields:
            raise CorruptInput(
                f"{self.place}: not in the format {self.format}: there is no {key!r}. Its keys are "
                f"{', '.join(map(repr, self.fields)) or 'none'}; expected are {', '.join(map(repr, self.expected))}."
            )
        return self.fields[key]

    def text(self, key: str) -> str:
        value = self.get(key)
        if not isinstance(value, str):
            self.refuse(key, "text")
        if not _is_text(value):
            self.refuse(key, "text without halves of surrogate pairs")
        return value

    def texts(self, key: str) -> list[str]:
        value = self.get(key)
        if (
            not isinstance(value, Sequence)
            or isinstance(value, str)
            or not all(isinstance(v, str) and _is_text(v) for v in value)
        ):
            self.refuse(key, "a list of texts (without halves of surrogate pairs)")
        return list(value)

    def inside(self, key: str, expected: Sequence[str]) -> Record:
        value = self.get(key)
        if not isinstance(value, Mapping):
            self.refuse(key, f"a mapping with {', '.join(expected)}")
        return Record(f"{self.place}, {key}", self.format, expected, value)

    def place_in(self, key: str, labels: Sequence[str]) -> int:
        """Where the label at `key` is among `labels`."""
        value = str(self.get(key)).strip()
        if value in ("", "-1"):
            raise CorruptInput(
                f"{self.place}: {key!r} is {value!r}: this split is published without answers. Choose another `split`."
            )
        if value not in labels:
            self.refuse(key, f"one of {', '.join(labels)}")
        return labels.index(value)

    def refuse(self, key: str, expected: str) -> None:
        shown = repr(self.fields[key])
        shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
        raise CorruptInput(f"{self.place}: not in the format {self.format}: {key!r} is {shown}, expected {expected}.")


def _is_text(value: str) -> bool:
    """JSON may hold half of a surrogate pair, which no tokenizer takes."""
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


def find_files(path: Path, split: str, task: str, *, by_subject: bool = False) -> list[Path]:
    """The files of a split: `path` itself, or within a folder those whose names (folders included) say the split.

    A folder none of whose files names any split is taken whole. Unless the data set is cut by_subject, they have to be parts of
    one file, whose names differ in numbers alone: a folder may hold several variants of a data set. Raises ConfigError.
    """
    if path.is_file():
        return [path]
    found = sorted(p for p in path.rglob("*") if p.name.endswith(_SUFFIXES) and p.name not in _NOT_RECORDS)
    if not found:
        what = "holds no" if path.is_dir() else "does not exist; expected a file or a folder of"
        raise ConfigError(f"task {task!r}: {path} {what} {', '.join(_SUFFIXES)} files. Correct its `path`.")
    words = {p: _split_words(p.relative_to(path)) for p in found}
    named = any(words.values())
    chosen = [p for p in found if SPLITS[split] & words[p]] if named else found
    if not chosen:
        raise ConfigError(
            f"task {task!r}: no file under {path} is named after the split {split!r} ({', '.join(sorted(SPLITS[split]))}); "
            f"found {', '.join(str(p.relative_to(path)) for p in found[:5])}{', ...' if len(found) > 5 else ''}."
        )
    variants = {re.sub(r"\d+", "*", str(p.relative_to(path))): str(p.relative_to(path)) for p in chosen}
    if len(variants) > 1 and not by_subject:
        raise ConfigError(
            f"task {task!r}: under {path} several files could be the split {split!r}: {', '.join(variants.values())}. Give the "
            "file, or the folder of one variant, as `path`."
        )
    return chosen


def _split_words(path: Path) -> set[str]:
    """Of the file's name, or of the innermost folder whose name has any: one that holds several splits may name them all."""
    known = set().union(*SPLITS.values())
    return next((w for part in reversed(path.parts) if (w := known & set(re.split(r"[^a-z]+", part.lower())))), set())


def read_records(files: Sequence[Path], format: str, expected: Sequence[str]) -> Iterator[Record]:
    """All records, in the order of the files. Where `<file's stem>-labels.lst` lies beside a file, its n-th line becomes the
    n-th record's "label". Raises CorruptInput naming file and line."""
    for file in files:
        labels = _labels(file)
        number = 0
        for number, (place, fields) in enumerate(_parsed(file), start=1):
            if not isinstance(fields, Mapping):
                raise CorruptInput(
                    f"{place}: not in the format {format}: a record is a mapping with {', '.join(expected)}, found "
                    f"{type(fields).__name__}."
                )
            if labels is not None:
                if number > len(labels):
                    raise CorruptInput(f"{place}: {_labels_file(file)} has only {len(labels)} labels, one a record expected.")
                fields = {**fields, "label": labels[number - 1]}
            yield Record(place, format, expected, fields)
        if labels is not None and number != len(labels):
            raise CorruptInput(f"{_labels_file(file)}: {len(labels)} labels, but {file.name} has {number} records.")


def with_labels(files: Sequence[Path]) -> list[Path]:
    """The files, and those with their labels: all that decides what read_records gives."""
    return [*files, *(beside for beside in map(_labels_file, files) if beside.is_file())]


def _labels_file(file: Path) -> Path:
    return file.with_name(f"{file.name.split('.')[0]}-labels.lst")


def _labels(file: Path) -> list[str] | None:
    beside = _labels_file(file)
    return beside.read_text(encoding="utf-8").split() if beside.is_file() else None


def _parsed(file: Path) -> Iterator[tuple[str, Any]]:
    """(place, value) of each record."""
    if file.name.endswith(".parquet"):
        yield from _parquet(file)
        return
    try:
        raw = file.read_bytes()
        text = (gzip.decompress(raw) if file.name.endswith(".gz") else raw).decode("utf-8-sig")
    except (OSError, EOFError, ValueError) as e:
        raise CorruptInput(f"{file}: cannot be read as text ({e}).") from e
    if ".jsonl" in file.name:
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield f"{file} line {number}", _json(line, f"{file} line {number}")
        return
    whole = _json(text, str(file))
    if isinstance(whole, list):
        yield from ((f"{file} entry {n}", entry) for n, entry in enumerate(whole, start=1))
    else:
        yield str(file), whole


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise CorruptInput(f"{place}: not JSON ({e}).") from e


def _parquet(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as e:
        raise ConfigError(f"{file}: reading Parquet needs pyarrow: pip install 'megatron-demix[eval]'.") from e
    try:
        rows = parquet.ParquetFile(file).read().to_pylist()
    except Exception as e:  # pyarrow's errors have several roots
        raise CorruptInput(f"{file}: not a Parquet file ({e}).") from e
    yield from ((f"{file} row {n}", row) for n, row in enumerate(rows, start=1))
