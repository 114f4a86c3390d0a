"""Reading text: files of several formats as one ordered stream of blocks, and blocks as batches of documents.

Formats, by file name: .jsonl / .ndjson / .json (one JSON object a line), each also with .gz or .zst; .parquet (one document a
row); any other file is plain text, one document. Reading a block is cheap and sequential; parsing it is the expensive part and
may run in another thread.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from megatron_demix import native
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
    file_bytes: int
    """How much of its file it took, as compressed as the file is: the blocks of a file add up to its size."""


@dataclass(frozen=True)
class Documents:
    """A parsed block. rejected: ("file:line", reason)."""

    text: TextBatch
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
        taken = 0
        try:
            for kind, data, first, position in _blocks_of(file, json_key, block_bytes):
                yield Block(number, file, kind, data, first, position - taken)
                number, taken = number + 1, position
        except (OSError, EOFError, zlib.error) as e:
            raise CorruptInput(f"{file} cannot be read: {e}.") from e


def read_documents(
    files: Sequence[Path], *, json_key: str = "text", on_bad_document: BadDocuments = "error"
) -> Iterator[Documents]:
    for block in read_blocks(files, json_key=json_key):
        yield parse(block, json_key=json_key, on_bad_document=on_bad_document)


def undecoded_documents(file: Path, *, json_key: str | None) -> Iterator[tuple[int, str, Any]]:
    """(line or row, kind, item) of one file's documents, for text_of: kind "json" is a line's bytes, "text" the file's bytes,
    "row" a dictionary with every column of a Parquet file. json_key: the column that must be there.

    Raises CorruptInput naming the file that cannot be read.
    """
    if file.suffix == ".parquet":
        row = 1
        for batch, _ in _batches(file, json_key, None):
            for record in batch.to_pylist():
                yield row, "row", record
                row += 1
        return
    for block in read_blocks([file]):
        yield from ((line, block.kind, item) for line, item in _items(block))


def _blocks_of(file: Path, json_key: str, block_bytes: int) -> Iterator[tuple[Any, Any, int, int]]:
    """(kind, data, first line or row, bytes of the file read so far)."""
    if file.suffix == ".parquet":
        yield from _rows(file, json_key)
        return
    name = file.name.removesuffix(".gz").removesuffix(".zst")
    with open(file, "rb") as raw:
        stream = _decompressed(raw, file)
        if name.endswith(_JSON_LINES):
            for data, first in _lines(stream, block_bytes):
                yield "json", data, first, raw.tell()
        else:
            yield "text", stream.read(), 1, raw.tell()


def _decompressed(raw: IO[bytes], file: Path) -> Any:
    if file.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if file.suffix == ".zst":
        try:
            import zstandard
        except ImportError as e:
            raise ConfigError(f"{file}: zstandard is not installed: pip install 'megatron-demix[data]'.") from e
        return _Zstd(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
    return raw


class _Zstd:
    """zstandard's reader, with its error as an OSError like those of the other formats."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader

    def read(self, size: int = -1) -> bytes:
        import zstandard

        try:
            return self._reader.read(size)
        except zstandard.ZstdError as e:
            raise OSError(f"not a Zstandard file, or a damaged one ({e})") from e


def _lines(stream: Any, block_bytes: int) -> Iterator[tuple[bytes, int]]:
    rest: list[bytes] = []
    first = 1
    while chunk := stream.read(block_bytes):
        cut = chunk.rfind(b"\n") + 1
        if cut == 0:
            rest.append(chunk)
            continue
        data = b"".join([*rest, memoryview(chunk)[:cut]])
        rest = [chunk[cut:]]
        yield data, first
        first += native.count_newlines(data)
    if last := b"".join(rest):
        yield last, first


def _rows(file: Path, column: str) -> Iterator[tuple[str, Any, int, int]]:
    row, size = 1, file.stat().st_size
    for batch, rows in _batches(file, column, [column]):
        values = batch.column(0)
        yield "column", values, row, size * (row - 1 + len(values)) // max(rows, 1)
        row += len(values)


def _batches(file: Path, column: str | None, columns: list[str] | None) -> Iterator[tuple[Any, int]]:
    """(record batch of these or all columns, rows of the file). column: must be there and hold strings."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as e:
        raise ConfigError(f"{file}: pyarrow is not installed: pip install 'megatron-demix[data]'.") from e
    try:
        with pq.ParquetFile(file) as table:
            schema = table.schema_arrow
            if column is not None and column not in schema.names:
                names = ", ".join(schema.names)
                raise CorruptInput(f"{file}: no column {column!r}; it has {names}. Name the right one as the JSON key.")
            if column is not None and not (pa.types.is_string(t := schema.field(column).type) or pa.types.is_large_string(t)):
                raise CorruptInput(f"{file}: column {column!r} holds {t}, expected strings.")
            for batch in table.iter_batches(batch_size=1 << 14, columns=columns):
                yield batch, table.metadata.num_rows
    except pa.ArrowException as e:
        raise CorruptInput(f"{file}: not a Parquet file, or a damaged one ({e}).") from e


def parse(block: Block, *, json_key: str = "text", on_bad_document: BadDocuments = "error") -> Documents:
    """The documents of a block.

    An empty document is always rejected. A line that is not UTF-8, not a JSON object, or has no string under json_key raises
    CorruptInput, or is rejected with the same reason.
    """
    scanned = native.scan_json_lines(block.data, json_key) if block.kind == "json" else None
    if scanned is None:
        return _parse_one_by_one(block, json_key, on_bad_document)
    content, offsets, lines = scanned
    empty = np.diff(offsets) == 0
    rejected = [(f"{block.file.name}:{block.first + n}", "empty") for n in lines[empty].tolist()]
    return Documents(TextBatch(content, np.append(offsets[:-1][~empty], offsets[-1])), rejected)


def _parse_one_by_one(block: Block, json_key: str, on_bad_document: BadDocuments) -> Documents:
    texts: list[bytes] = []
    rejected: list[tuple[str, str]] = []
    for line, item in _items(block):
        try:
            text = text_of(item, block.kind, json_key)
        except ValueError as e:
            if on_bad_document == "error":
                raise CorruptInput(
                    f"{block.file}:{line}: {e}. Correct the file, or have such documents rejected and listed "
                    "(--on-bad-document reject)."
                ) from e
            rejected.append((f"{block.file.name}:{line}", str(e)))
            continue
        if text:
            texts.append(text)
        else:
            rejected.append((f"{block.file.name}:{line}", "empty"))
    return Documents(TextBatch.of(texts), rejected)


def _items(block: Block) -> Iterator[tuple[int, Any]]:
    if block.kind == "json":
        for offset, line in enumerate(block.data.split(b"\n")):
            if line and not line.isspace():
                yield block.first + offset, line
    elif block.kind == "column":
        yield from enumerate(block.data.to_pylist(), block.first)
    else:
        yield block.first, block.data


def text_of(item: Any, kind: str, json_key: str) -> bytes:
    """The text of one document as UTF-8, b"" for a missing value of a column. Raises ValueError with what is wrong."""
    if kind == "row":
        item, kind = item[json_key], "column"
    if kind == "column":
        return b"" if item is None else item.encode()
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
