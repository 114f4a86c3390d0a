"""Which files are text to be read: those that patterns name, in order. Tables and archives, which would be one senseless
document of plain text, are refused."""

from __future__ import annotations

import errno
import glob
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megatron_demix.errors import ConfigError, CorruptInput

JSON_LINES, PARQUET = (".jsonl", ".ndjson", ".json"), ".parquet"
_ABOUT = re.compile(r"(readme|licen[sc]e|copying|notice|citation)([-_.][a-z]{2})?(\.(md|txt|rst|cff|html))?", re.IGNORECASE)
"""Names of files that lie beside published records and speak of them."""
_TABLES, _ARCHIVES = (".csv", ".tsv"), (".tar", ".tgz", ".zip", ".bz2", ".xz", ".7z")
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP)

Look = Callable[[Path], os.stat_result]
"""os.stat, or something that remembers what it says: corpora have files by the ten thousand, on disks that others use."""


def resolve_inputs(patterns: Sequence[str | Path], root: Path | str = ".", look: Look = os.stat) -> list[Path]:
    """Files for patterns (files, folders or globs relative to root), sorted within a pattern, each once: of the names of one
    file, which links and different ways to write a path give it, the first.

    Folders, and ** in a glob, are looked through with those that links in them lead to; names that begin with a dot or, as
    Spark's _SUCCESS, with _ are left out, and so is a README or LICENSE beside records (JSON Lines, Parquet).
    Raises ConfigError for a pattern without a file and for a table or an archive, CorruptInput for an empty file.
    """
    files: dict[Path, os.stat_result] = {}
    for pattern in patterns:
        path = Path(root) / pattern
        facts = facts_of(path, look)
        if facts and stat.S_ISDIR(facts.st_mode):
            found = _data([folder / name for folder, names in _folders(path) for name in names], look)
        elif facts and stat.S_ISREG(facts.st_mode):
            found = {path: facts}
        elif "**" in path.parts:
            found = _data(_matches(Path(glob.escape(str(root))) / pattern), look)
        else:
            found = _files(_matches(Path(glob.escape(str(root))) / pattern), look)
        if not found:
            raise ConfigError(f"inputs: {pattern} matches no file (looked in {Path(root).resolve()}). Correct the path.")
        files.update(sorted(found.items()))
    once: dict[tuple[int, int], Path] = {}
    for file, facts in files.items():
        _check_format(file)
        if facts.st_size == 0:
            raise CorruptInput(f"{file} is empty, expected text. Remove it from the inputs, or write it again.")
        once.setdefault((facts.st_dev, facts.st_ino), file)
    return list(once.values())


def facts_of(path: Path, look: Look = os.stat) -> os.stat_result | None:
    """What lies at a path, links followed; None where nothing does."""
    try:
        return look(path)
    except OSError as e:
        if e.errno not in _NOT_THERE:
            raise
        return None


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


def _files(paths: list[Path], look: Look) -> dict[Path, os.stat_result]:
    """The files among some paths."""
    seen = {path: facts_of(path, look) for path in paths}
    return {path: facts for path, facts in seen.items() if facts and stat.S_ISREG(facts.st_mode)}


def _data(paths: list[Path], look: Look) -> dict[Path, os.stat_result]:
    """The files among what a folder or ** holds; where some of them hold records, without those that speak of the data."""
    files = _files(paths, look)
    records = {path for path in files if format_of(path).endswith((*JSON_LINES, PARQUET))}
    return {p: facts for p, facts in files.items() if not records or p in records or not _ABOUT.fullmatch(p.name)}


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
