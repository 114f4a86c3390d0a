"""Which files are text to be read: those that patterns name, in order. Tables and archives, which would be one senseless
document of plain text, are refused."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_demix.errors import ConfigError, CorruptInput

JSON_LINES, PARQUET = (".jsonl", ".ndjson", ".json"), ".parquet"
_ABOUT = re.compile(r"(readme|licen[sc]e|copying|notice|citation)([-_.][a-z]{2})?(\.(md|txt|rst|cff|html))?", re.IGNORECASE)
"""Names of files that lie beside published records and speak of them."""
_TABLES, _ARCHIVES = (".csv", ".tsv"), (".tar", ".tgz", ".zip", ".bz2", ".xz", ".7z")


def resolve_inputs(patterns: Sequence[str | Path], root: Path | str = ".") -> list[Path]:
    """Files for patterns (files, folders or globs relative to root), sorted within a pattern, each once: of the names of one
    file, which links and different ways to write a path give it, the first.

    Folders, and ** in a glob, are looked through with those that links in them lead to; names that begin with a dot or, as
    Spark's _SUCCESS, with _ are left out, and so is a README or LICENSE beside records (JSON Lines, Parquet).
    Raises ConfigError for a pattern without a file and for a table or an archive, CorruptInput for an empty file.
    """
    files: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(root) / pattern
        if path.is_dir():
            found = _files([folder / name for folder, names in _folders(path) for name in names])
        elif path.is_file():
            found = [path]
        elif "**" in path.parts:
            found = _files(_matches(Path(glob.escape(str(root))) / pattern))
        else:
            found = [p for p in _matches(Path(glob.escape(str(root))) / pattern) if p.is_file()]
        if not found:
            raise ConfigError(f"inputs: {pattern} matches no file (looked in {Path(root).resolve()}). Correct the path.")
        files.update(dict.fromkeys(sorted(found)))
    once: dict[tuple[int, int], Path] = {}
    for file in files:
        _check_format(file)
        facts = file.stat()
        if facts.st_size == 0:
            raise CorruptInput(f"{file} is empty, expected text. Remove it from the inputs, or write it again.")
        once.setdefault((facts.st_dev, facts.st_ino), file)
    return list(once.values())


def _folders(top: Path) -> Iterator[tuple[Path, list[str]]]:
    """A folder and all below it, each once although links may lead back to it, with the names of the files there."""
    seen = set()
    for path, folders, names in os.walk(top, onerror=_cannot_be_read, followlinks=True):
        facts = os.stat(path)
        if (facts.st_dev, facts.st_ino) in seen:
            folders.clear()
            continue
        seen.add((facts.st_dev, facts.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith((".", "_")))
        yield Path(path), [name for name in names if not name.startswith((".", "_"))]


def _files(paths: list[Path]) -> list[Path]:
    """The files among what a folder or ** holds; where some of them hold records, without those that speak of the data."""
    files = [p for p in paths if p.is_file()]
    if any(format_of(p).endswith((*JSON_LINES, PARQUET)) for p in files):
        files = [p for p in files if format_of(p).endswith((*JSON_LINES, PARQUET)) or not _ABOUT.fullmatch(p.name)]
    return files


def _cannot_be_read(e: OSError) -> None:
    raise ConfigError(f"inputs: {e.filename} cannot be read: {e.strerror}. Correct its permissions, or leave it out.") from e


def _matches(pattern: Path) -> list[Path]:
    """What a glob matches. Python's own does not end with every ** where links lead back."""
    if "**" not in pattern.parts:
        return [Path(path) for path in glob.glob(str(pattern))]
    at = pattern.parts.index("**")
    rest = pattern.parts[at + 1 :] or ("*",)
    folders = [f for top in _matches(Path(*pattern.parts[:at])) if top.is_dir() for f, _ in _folders(top)]
    found = [path for folder in folders for path in _matches(Path(glob.escape(str(folder)), *rest))]
    named = rest[-1] != "*" and not rest[-1].startswith("*.")  # a pattern of names, and not of all that lies there
    return [path for path in found if named or not path.name.startswith("_")]


def names_of(files: Sequence[Path]) -> list[str]:
    """What lists of documents call each file: its path from the folder that holds all of them, since shards of several dumps
    often have the same names."""
    paths = [os.path.abspath(file) for file in files]
    folder = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
    return [Path(os.path.relpath(path, folder)).as_posix() for path in paths]


def format_of(file: Path) -> str:
    """Its name in lower case, without what says how it is compressed."""
    return file.name.lower().removesuffix(".gz").removesuffix(".zst")


def _check_format(file: Path) -> None:
    """Raises ConfigError for what would be read as one document of plain text, and is none."""
    name = format_of(file)
    if name.endswith(_TABLES):
        raise ConfigError(
            f"inputs: {file} is a table, which would be one document of plain text. Write it as .jsonl (an object a row) or "
            ".parquet, or leave it out of the pattern."
        )
    if name.endswith(_ARCHIVES):
        raise ConfigError(
            f"inputs: {file} is an archive or has a compression that is not read. Unpack it (.gz and .zst are read as they "
            "are), or leave it out of the pattern."
        )
