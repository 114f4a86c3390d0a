"""Reading text: files of several formats as one ordered stream of blocks, and blocks as batches of documents.

Formats, by file name: .jsonl / .ndjson / .json (one JSON object a line), each also with .gz or .zst; .parquet (one document a
row); any other file is plain text, one document. Reading a block is cheap and sequential; parsing it is the expensive part and
may run in another thread.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_demix.data.text import TextBatch
from megatron_demix.errors import ConfigError, CorruptInput

BLOCK_BYTES = 8 << 20
_JSON_LINES = (".jsonl", ".ndjson", ".json")

BadDocuments = Literal["error", "reject"]


@dataclass(frozen=True)
class Block:
    """Some whole documents of one file, not yet parsed. number: its place in the stream of all inputs."""

    number: int
    file: Path
    kind: Literal["json", "text", "column"]
    data: Any
    first: int
    """Of its first document: the line (json) or row (column), counted from 1."""
    size: int
    """Bytes it stands for in the progress bar."""


@dataclass(frozen=True)
class Documents:
    """A parsed block. lines: the line or row of each document. rejected: ("file:line", reason)."""

    file: Path
    text: TextBatch
    lines: np.ndarray
    rejected: list[tuple[str, str]] = field(default_factory=list)


def resolve_inputs(patterns: Sequence[str | Path], root: Path | str = ".") -> list[Path]:
    """Files for patterns (files, folders or globs relative to root), each once, sorted within a pattern.

    Raises ConfigError for a pattern without a file, CorruptInput for an empty file.
    """
    files: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(root) / pattern
        if path.is_dir():
            found = [p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")]
        elif path.is_file():
            found = [path]
        else:
            base = Path(path.anchor) if path.is_absolute() else Path()
            found = [p for p in base.glob(str(path.relative_to(base))) if p.is_file()]
        if not found:
            raise ConfigError(f"inputs: {pattern} matches no file (looked in {Path(root).resolve()}). Correct the path.")
        files.update(dict.fromkeys(sorted(found)))
    for file in files:
        if file.stat().st_size == 0:
            raise CorruptInput(f"{file} is empty, expected text. Remove it from the inputs, or write it again.")
    return list(files)


def read_blocks(files: Sequence[Path], *, json_key: str = "text", block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """All blocks of all files, in order. Raises CorruptInput naming the file that cannot be read."""
    number = 0
    for file in files:
        try:
            for kind, data, first, size in _blocks_of(file, json_key, block_bytes):
                yield Block(number, file, kind, data, first, size)
                number += 1
        except (OSError, EOFError) as e:
            raise CorruptInput(f"{file} cannot be read: {e}.") from e


def read_documents(
    files: Sequence[Path], *, json_key: str = "text", on_bad_document: BadDocuments = "error"
) -> Iterator[Documents]:
    for block in read_blocks(files, json_key=json_key):
        yield parse(block, json_key=json_key, on_bad_document=on_bad_document)


def _blocks_of(file: Path, json_key: str, block_bytes: int) -> Iterator[tuple[Any, Any, int, int]]:
    name = file.name.removesuffix(".gz").removesuffix(".zst")
    if name.endswith(_JSON_LINES):
        with _open(file) as stream:
            yield from _lines(stream, block_bytes)
    elif file.suffix == ".parquet":
        yield from _row_groups(file, json_key)
    else:
        with _open(file) as stream:
            data = stream.read()
        yield "text", data, 1, len(data)


def _open(file: Path) -> Any:
    if file.suffix == ".gz":
        return gzip.open(file, "rb")
    if file.suffix == ".zst":
        try:
            import zstandard
        except ImportError as e:
            raise ConfigError(f"{file}: zstandard is not installed: pip install 'megatron-demix[data]'.") from e
        return _Zstd(zstandard.ZstdDecompressor().stream_reader(open(file, "rb"), read_across_frames=True, closefd=True), file)
    return open(file, "rb")


class _Zstd:
    """zstandard's reader, with its error as an OSError like those of the other formats."""

    def __init__(self, reader: Any, file: Path) -> None:
        self._reader, self._file = reader, file

    def read(self, size: int = -1) -> bytes:
        import zstandard

        try:
            return self._reader.read(size)
        except zstandard.ZstdError as e:
            raise OSError(f"not a Zstandard file, or a damaged one ({e})") from e

    def __enter__(self) -> _Zstd:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()


def _lines(stream: Any, block_bytes: int) -> Iterator[tuple[str, bytes, int, int]]:
    rest, first = b"", 1
    while chunk := stream.read(block_bytes):
        cut = chunk.rfind(b"\n") + 1
        if cut == 0:
            rest += chunk
            continue
        data, rest = rest + chunk[:cut], chunk[cut:]
        yield "json", data, first, len(data)
        first += data.count(b"\n")
    if rest:
        yield "json", rest, first, len(rest)


def _row_groups(file: Path, column: str) -> Iterator[tuple[str, Any, int, int]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as e:
        raise ConfigError(f"{file}: pyarrow is not installed: pip install 'megatron-demix[data]'.") from e
    try:
        with pq.ParquetFile(file) as table:
            if column not in table.schema_arrow.names:
                names = ", ".join(table.schema_arrow.names)
                raise CorruptInput(f"{file}: no column {column!r}; it has {names}. Name the right one as the JSON key.")
            row = 1
            for batch in table.iter_batches(batch_size=1 << 14, columns=[column]):
                values = batch.column(0)
                if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
                    raise CorruptInput(f"{file}: column {column!r} holds {values.type}, expected strings.")
                yield "column", values, row, values.nbytes
                row += len(values)
    except pa.ArrowException as e:
        raise CorruptInput(f"{file}: not a Parquet file, or a damaged one ({e}).") from e


def parse(block: Block, *, json_key: str = "text", on_bad_document: BadDocuments = "error") -> Documents:
    """The documents of a block.

    An empty document is always rejected. A line that is not UTF-8, not a JSON object, or has no string under json_key raises
    CorruptInput, or is rejected with the same reason.
    """
    texts: list[bytes] = []
    lines: list[int] = []
    rejected: list[tuple[str, str]] = []
    for line, item in _items(block):
        try:
            text = _text(item, block.kind, json_key)
        except ValueError as e:
            where = f"{block.file}:{line}"
            if on_bad_document == "error":
                raise CorruptInput(
                    f"{where}: {e}. Correct the file, or have such documents rejected and listed (--on-bad-document reject)."
                ) from e
            rejected.append((f"{block.file.name}:{line}", str(e)))
            continue
        if not text:
            rejected.append((f"{block.file.name}:{line}", "empty"))
            continue
        texts.append(text)
        lines.append(line)
    return Documents(block.file, TextBatch.of(texts), np.asarray(lines, np.int64), rejected)


def _items(block: Block) -> Iterator[tuple[int, Any]]:
    if block.kind == "json":
        for offset, line in enumerate(block.data.split(b"\n")):
            if line and not line.isspace():
                yield block.first + offset, line
    elif block.kind == "column":
        yield from enumerate(block.data.to_pylist(), block.first)
    else:
        yield block.first, block.data


def _text(item: Any, kind: str, json_key: str) -> bytes:
    if kind == "column":
        if item is None:
            return b""
        return item.encode()
    try:
        text = item.decode("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"not UTF-8 (byte 0x{item[e.start]:02x} at offset {e.start})") from e
    if kind == "text":
        return item
    try:
        value = json.loads(text)
    except json.JSONDecodeError as e:
        raise ValueError(f"not JSON ({e.msg} at column {e.colno})") from e
    except RecursionError as e:
        raise ValueError("not JSON that can be read (nested too deeply)") from e
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object with the text under {json_key!r}, found {type(value).__name__}")
    if json_key not in value:
        raise ValueError(f"no key {json_key!r} (it has {', '.join(map(repr, list(value)[:8]))})")
    if not isinstance(value[json_key], str):
        raise ValueError(f"{json_key!r} is {type(value[json_key]).__name__}, expected a string")
    try:
        return value[json_key].encode("utf-8")
    except UnicodeEncodeError as e:
        raise ValueError(f"text with a lone surrogate at character {e.start}, which UTF-8 cannot hold") from e
