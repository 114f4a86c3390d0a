"""Reading text: files of several formats as one ordered stream of blocks, and blocks as batches of documents.

Formats, by file name: .jsonl / .ndjson / .json (one JSON object a line), each also with .gz or .zst; .parquet (one document a
row); any other file is plain text, one document. Reading a block is cheap and sequential; parsing it is the expensive part and
may run in another thread.
"""

from __future__ import annotations

import codecs
import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from megatron_demix import native
from megatron_demix.data.input_files import JSON_LINES, PARQUET, format_of, names_of
from megatron_demix.data.text import TextBatch
from megatron_demix.errors import ConfigError, CorruptInput

BLOCK_BYTES = 8 << 20
_WHOLE = 1 << 62
"""An end that is beyond that of any file."""

BadDocuments = Literal["error", "reject"]

_COMPRESSED_BYTES, _PIECE_BYTES = 1 << 20, 1 << 10
"""Read from a compressed file at once, and decompressed at once: 4 bytes can stand for 128 KiB."""
_MOST_ROWS = 1 << 14
_STRINGS = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
"""Arrow's types that may hold text."""


@dataclass(frozen=True)
class Block:
    """Some whole documents of one file, not yet parsed. number: its place in the stream of all inputs."""

    number: int
    file: Path
    name: str
    """Its file's, as names_of gives it for all inputs."""
    kind: Literal["json", "text", "column"]
    data: Any
    first: int
    """Of its first document: the line (json) or row (column), counted from 1."""
    file_bytes: int
    """How much of its file it took, as compressed as the file is: the blocks of a file add up to its size, those
    of its parts to within a line each."""
    num_lines: int = 0
    """json: line ends in it."""
    skipped_bytes: int = 0
    """json: of its file, before the part that is read. `first` counts from there, since nobody has counted the lines before."""


@dataclass(frozen=True)
class Documents:
    """A parsed block. rejected: ("name of the file:line", reason)."""

    text: TextBatch
    rejected: list[tuple[str, str]] = field(default_factory=list)


def read_blocks(
    files: Sequence[Path], *, json_key: str = "text", block_bytes: int | None = None, part: tuple[int, int] = (0, 1)
) -> Iterator[Block]:
    """All blocks of all files, in order. Raises CorruptInput naming the file that cannot be read.

    part: (i, n), only the i-th of n parts of the stream, cut by bytes. What begins in a part belongs to it: a line of an
    uncompressed file, a row group of a Parquet file, and compressed and plain text files as a whole. So the parts are known
    to each process by itself, and end to end they are the stream.
    """
    number, names = 0, dict(zip(files, names_of(files), strict=True))
    for file, begin, end in _part_of(files, part):
        try:
            taken = begin
            for kind, data, first, lines, position in _blocks_of(file, json_key, block_bytes or BLOCK_BYTES, begin, end):
                skipped = begin if kind == "json" else 0
                yield Block(number, file, names[file], kind, data, first, position - taken, lines, skipped)
                number, taken = number + 1, position
        except (OSError, EOFError, zlib.error) as e:
            raise CorruptInput(f"{file} cannot be read: {e}.") from e


def _part_of(files: Sequence[Path], part: tuple[int, int]) -> Iterator[tuple[Path, int, int]]:
    """(file, begin, end): the bytes of each file that lie in a part, if any do."""
    if part == (0, 1):
        yield from ((file, 0, _WHOLE) for file in files)
        return
    sizes = [file.stat().st_size for file in files]
    begin, end = (sum(sizes) * i // part[1] for i in (part[0], part[0] + 1))
    for file, size in zip(files, sizes, strict=True):
        if max(begin, 0) < min(end, size):
            yield file, max(begin, 0), min(end, size)
        begin, end = begin - size, end - size


def read_documents(
    files: Sequence[Path], *, json_key: str = "text", on_bad_document: BadDocuments = "error"
) -> Iterator[Documents]:
    for block in read_blocks(files, json_key=json_key):
        yield parse(block, json_key=json_key, on_bad_document=on_bad_document)


def undecoded_documents(file: Path, *, json_key: str | None) -> Iterator[tuple[int, str, Any]]:
    """(line or row, kind, item) of one file's documents, for text_of: kind "json" is a line's bytes, "text" the file's bytes,
    "row" a dictionary with every column of a Parquet file, in which a string that is not UTF-8 is its bytes. json_key: the
    column that must be there.

    Raises CorruptInput naming the file that cannot be read.
    """
    if format_of(file).endswith(PARQUET):
        for batch, first, _ in _batches(file, json_key, None, BLOCK_BYTES):
            yield from ((row, "row", record) for row, record in enumerate(_records(batch), first))
        return
    for block in read_blocks([file]):
        yield from ((line, block.kind, item) for line, item in _items(block))


def _blocks_of(file: Path, json_key: str, block_bytes: int, begin: int, end: int) -> Iterator[tuple[Any, Any, int, int, int]]:
    """(kind, data, first line or row, line ends, bytes of the file read so far) of what begins in its bytes [begin, end)."""
    if format_of(file).endswith(PARQUET):
        yield from _rows(file, json_key, block_bytes, begin, end)
        return
    name = format_of(file)
    with open(file, "rb") as raw:
        if name == file.name.lower() and name.endswith(JSON_LINES):
            for data, first, lines, position in _lines_of(raw, block_bytes, begin, end):
                yield "json", data if begin > 0 or first > 1 else data.removeprefix(codecs.BOM_UTF8), first, lines, position
        elif begin > 0:
            return
        elif name.endswith(JSON_LINES):
            for data, first, lines in _lines(_decompressed(raw, file), block_bytes):
                yield "json", data if first > 1 else data.removeprefix(codecs.BOM_UTF8), first, lines, raw.tell()
        else:
            yield "text", _decompressed(raw, file).read().removeprefix(codecs.BOM_UTF8), 1, 0, raw.tell()


def _lines_of(raw: IO[bytes], block_bytes: int, begin: int, end: int) -> Iterator[tuple[bytes, int, int, int]]:
    """(whole lines, number of the first, how many end, where they end) of a plain file's lines that begin in [begin, end).

    A block's end is found before it is read, so that it is read into place and copied no more.
    """
    first, at, size = 1, _line_from(raw, begin), os.fstat(raw.fileno()).st_size
    while at < min(end, size):
        stop = _line_from(raw, min(at + block_bytes, end, size))
        raw.seek(at)
        data = raw.read(stop - at)
        lines = native.count_newlines(data)
        yield data, first, lines, stop
        first, at = first + lines, stop


def _line_from(raw: IO[bytes], position: int) -> int:
    """Where the first line begins that does not begin before this byte."""
    if position == 0:
        return 0
    raw.seek(position - 1)
    raw.readline()
    return raw.tell()


def _decompressed(raw: IO[bytes], file: Path) -> Any:
    if file.suffix.lower() == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if file.suffix.lower() == ".zst":
        try:
            import zstandard  # noqa: F401
        except ImportError as e:
            raise ConfigError(f"{file}: zstandard is not installed: pip install 'megatron-demix[data]'.") from e
        return _Zstd(raw)
    return raw


class _Zstd:
    """Zstandard frames one after another. Damage and, which zstandard's own reader passes over, a file that ends within a frame
    are OSErrors, like those of the other formats."""

    def __init__(self, raw: IO[bytes]) -> None:
        import zstandard

        # As large as `zstd --long=31` makes it; the default is 128 MiB.
        self._raw, self._decompressor = raw, zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame: Any = None
        self._compressed, self._used, self._ready = memoryview(b""), 0, bytearray()

    def read(self, size: int = -1) -> bytes:
        while size < 0 or len(self._ready) < size:
            if not self._more():
                break
        taken = bytes(self._ready[:size] if size >= 0 else self._ready)
        del self._ready[: len(taken)]
        return taken

    def _more(self) -> bool:
        import zstandard

        if self._used == len(self._compressed):
            self._compressed, self._used = memoryview(self._raw.read(_COMPRESSED_BYTES)), 0
        if not self._compressed:
            if self._frame is not None:
                raise OSError("the file ends within a Zstandard frame: it was cut short")
            return False
        self._frame = self._frame or self._decompressor.decompressobj()
        piece = self._compressed[self._used : self._used + _PIECE_BYTES]
        self._used += len(piece)
        try:
            self._ready += self._frame.decompress(piece)
        except zstandard.ZstdError as e:
            raise OSError(f"not a Zstandard file, or a damaged one ({e})") from e
        if self._frame.eof:
            self._used -= len(self._frame.unused_data)
            self._frame = None
        return True


def _lines(stream: Any, block_bytes: int) -> Iterator[tuple[bytes, int, int]]:
    """(whole lines, number of the first, how many end) of a stream that cannot be read twice."""
    rest: list[bytes] = []
    first = 1
    while chunk := stream.read(block_bytes):
        cut = chunk.rfind(b"\n") + 1
        if cut == 0:
            rest.append(chunk)
            continue
        data = b"".join([*rest, memoryview(chunk)[:cut]])
        rest = [chunk[cut:]]
        lines = native.count_newlines(data)
        yield data, first, lines
        first += lines
    if last := b"".join(rest):
        yield last, first, 0


def _rows(file: Path, column: str, block_bytes: int, begin: int, end: int) -> Iterator[tuple[str, Any, int, int, int]]:
    size = file.stat().st_size
    for batch, row, rows in _batches(file, column, [column], block_bytes, begin, end):
        yield "column", batch.column(0), row, 0, size * (row - 1 + len(batch)) // max(rows, 1)


def _batches(
    file: Path, column: str | None, columns: list[str] | None, block_bytes: int, begin: int = 0, end: int = _WHOLE
) -> Iterator[tuple[Any, int, int]]:
    """(record batch of these or all columns, number of its first row from 1 on, rows of the file) of the row groups that
    begin in the file's bytes [begin, end), rows being taken as equally large. column: must be there and hold strings, at most
    block_bytes of them in a batch unless one row alone has more."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as e:
        raise ConfigError(f"{file}: pyarrow is not installed: pip install 'megatron-demix[data]'.") from e
    try:
        # Else all of a row group is read before its first row is given.
        with pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as table:
            schema = table.schema_arrow
            if column is not None and column not in schema.names:
                names = ", ".join(schema.names)
                raise CorruptInput(
                    f"{file}: no column {column!r}; it has {names}. Name the right one "
                    "(domains[].json_key in a study, --json-key of a tool)."
                )
            if column is not None and str(_value_type(kind := schema.field(column).type)) not in _STRINGS:
                raise CorruptInput(f"{file}: column {column!r} holds {kind}, expected strings.")
            rows, row, size = table.metadata.num_rows, 0, file.stat().st_size
            for group in range(table.num_row_groups):
                facts = table.metadata.row_group(group)
                first, row = row, row + facts.num_rows
                if begin <= size * first // max(rows, 1) < end:
                    # What is decoded at once: about as much as a block holds, by the group's mean.
                    num = min(max(block_bytes * facts.num_rows // max(facts.total_byte_size, 1), 1), _MOST_ROWS)
                    for decoded in table.iter_batches(batch_size=num, columns=columns, row_groups=[group]):
                        for batch in _halves(_with_strings(decoded, column), column, block_bytes):
                            yield batch, first + 1, rows
                            first += len(batch)
    except pa.ArrowException as e:
        raise CorruptInput(f"{file}: not a Parquet file, or a damaged one ({e}).") from e


def _value_type(kind: Any) -> Any:
    """Of an Arrow type, which may be a dictionary's."""
    import pyarrow as pa

    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _with_strings(batch: Any, column: str | None) -> Any:
    """A record batch with a column of _STRINGS as plain strings, which may be other than UTF-8."""
    import pyarrow as pa

    if column is None or str(kind := (strings := batch.column(column)).type) in ("string", "large_string"):
        return batch
    if pa.types.is_dictionary(kind):
        strings = strings.dictionary_decode()
    strings = strings.cast(pa.large_binary()).view(pa.large_string())
    names = batch.schema.names
    return pa.RecordBatch.from_arrays([strings if name == column else batch.column(name) for name in names], names=names)


def _halves(batch: Any, column: str | None, block_bytes: int) -> Iterator[Any]:
    """A record batch, cut in two until the column's strings are few enough. Nothing is copied."""
    if column is None or len(batch) < 2 or batch.column(column).nbytes <= block_bytes:
        yield batch
        return
    middle = len(batch) // 2
    yield from _halves(batch.slice(0, middle), column, block_bytes)
    yield from _halves(batch.slice(middle), column, block_bytes)


def _records(batch: Any) -> list[dict[str, Any]]:
    """The rows of a record batch. Arrow does not look whether its strings are UTF-8: those that are not stay bytes."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        columns = {name: batch.column(name) for name in batch.schema.names}
        return [{name: _value(column[row]) for name, column in columns.items()} for row in range(len(batch))]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as e:
        return e.object


def parse(block: Block, *, json_key: str = "text", on_bad_document: BadDocuments = "error") -> Documents:
    """The documents of a block.

    An empty document is always rejected. A line or row that is not UTF-8, not a JSON object, or has no string under json_key
    raises CorruptInput, or is rejected with the same reason.
    """
    scanned = None
    if block.kind == "json":
        scanned = native.scan_json_lines(block.data, json_key, block.num_lines)
    elif block.kind == "column":
        scanned = _scan_column(block.data)
    if scanned is None:
        return _parse_one_by_one(block, json_key, on_bad_document)
    content, offsets, lines = scanned
    empty = np.diff(offsets) == 0
    rejected = [(f"{block.name}:{block.first + n}", "empty") for n in lines[empty].tolist()]
    return Documents(TextBatch(content, np.append(offsets[:-1][~empty], offsets[-1])), rejected)


def _scan_column(strings: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """What native.scan_json_lines gives, of an Arrow array and where its text lies; None if a string is not UTF-8."""
    import pyarrow as pa

    try:
        strings.validate(full=True)
    except pa.ArrowInvalid:
        return None
    strings = strings.cast(pa.large_string())
    if strings.null_count:
        strings = strings.fill_null("")
    _, places, text = strings.buffers()
    offsets = np.frombuffer(places, np.int64, len(strings) + 1, 8 * strings.offset)
    content = np.frombuffer(text or b"", np.uint8)[offsets[0] : offsets[-1]]
    return content, offsets - offsets[0], np.arange(len(strings))


def _parse_one_by_one(block: Block, json_key: str, on_bad_document: BadDocuments) -> Documents:
    texts: list[bytes] = []
    rejected: list[tuple[str, str]] = []
    for line, item in _items(block):
        try:
            text = text_of(item, block.kind, json_key)
        except ValueError as e:
            if on_bad_document == "error":
                named = "Name its key (domains[].json_key in a study, --json-key of a tool), c"
                key = named if isinstance(e, _NoSuchKey) else "C"
                raise CorruptInput(
                    f"{block.file}:{line + _lines_before(block)}: {e}. {key}orrect the file, or have such documents "
                    "rejected and listed (--on-bad-document reject; in a study, prepare.on_bad_document)."
                ) from e
            rejected.append((f"{block.name}:{line}", str(e)))
            continue
        if text:
            texts.append(text)
        else:
            rejected.append((f"{block.name}:{line}", "empty"))
    return Documents(TextBatch.of(texts), rejected)


def _lines_before(block: Block) -> int:
    """Lines of its file before the part that was read, counted now that someone wants to know."""
    number, left = 0, block.skipped_bytes
    with open(block.file, "rb") as file:
        left = _line_from(file, left)
        file.seek(0)
        while left > 0 and (chunk := file.read(min(BLOCK_BYTES, left))):
            number, left = number + native.count_newlines(chunk), left - len(chunk)
    return number


def _items(block: Block) -> Iterator[tuple[int, Any]]:
    if block.kind == "json":
        for offset, line in enumerate(block.data.split(b"\n")):
            if line and not line.isspace():
                yield block.first + offset, line
    elif block.kind == "column":
        yield from enumerate(map(_value, block.data), block.first)
    else:
        yield block.first, block.data


class _NoSuchKey(ValueError):
    """A record without the key that its text was looked for under."""


def text_of(item: Any, kind: str, json_key: str) -> bytes:
    """The text of one document as UTF-8, b"" for a missing value (null). Raises ValueError with what is wrong."""
    if kind == "row":
        item, kind = item[json_key], "column"
    if kind == "column" and not isinstance(item, bytes):
        return b"" if item is None else item.encode()
    try:
        text = item.decode("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"not UTF-8 (byte 0x{item[e.start]:02x} at offset {e.start})") from e
    if kind != "json":
        return item
    try:
        # Only the text counts. Python refuses integers of more than 4300 digits, the quick path does not: whether a document is
        # kept would depend on what else is in its block.
        value = json.loads(text, parse_int=lambda _: 0)
    except json.JSONDecodeError as e:
        if text.strip() == "[":
            raise ValueError("it begins an array, expected one JSON object a line; `jq -c '.[]'` makes such lines of it") from e
        raise ValueError(f"not JSON ({e.msg} at column {e.colno})") from e
    except RecursionError as e:
        raise ValueError("not JSON that can be read (nested too deeply)") from e
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object with the text under {json_key!r}, found {type(value).__name__}")
    if json_key not in value:
        raise _NoSuchKey(f"no key {json_key!r} (it has {', '.join(map(repr, list(value)[:8]))})")
    if value[json_key] is None:
        return b""
    if not isinstance(value[json_key], str):
        raise ValueError(f"{json_key!r} is {type(value[json_key]).__name__}, expected a string")
    try:
        return value[json_key].encode("utf-8")
    except UnicodeEncodeError as e:
        raise ValueError(f"text with a lone surrogate at character {e.start}, which UTF-8 cannot hold") from e
