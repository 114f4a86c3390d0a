"""Documents on their way through the steps: read from the user's files, kept between passes, written as kept or removed.

A kept document is the user's own record, with every field it had; what JSON cannot hold is text in it: bytes as base64,
decimals and integers beyond 64 bits as their digits. A removed one has one field more, "removed": where it was (`document`, a
file and line), the `reason`, and what the step noted. Files are Zstandard: gzip puts the time into its header, and two runs
could not be compared byte for byte.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_demix.artifact import write_json
from megatron_demix.data.clean.trove import Document, JsonlReader, JsonlWriter, PipelineStep, orjson
from megatron_demix.data.inputs import BadDocuments, text_of, undecoded_documents
from megatron_demix.errors import CorruptInput

REMOVED = "removed"
EXAMPLES = 3


@dataclass(frozen=True)
class Source:
    """One input file, and its name among the domain's (names_of). A file is a task of datatrove's: it is what workers share
    out."""

    domain: str
    file: Path
    name: str
    json_key: str = "text"


class ReadSources(PipelineStep):
    """Task n reads sources[n], and counts what it has read in counts/read/<task>.json. Empty documents go to `unreadable`;
    so does what is no document, unless it ends the run."""

    type, name = "📖 - READER", "domains"

    def __init__(self, work: Path, sources: list[Source], on_bad_document: BadDocuments) -> None:
        super().__init__()
        self.sources, self.on_bad_document = sources, on_bad_document
        self.counts, self.unreadable = work / "counts" / "read", RecordWriter(work, "unreadable")

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        source, num, size = self.sources[rank], 0, 0
        with self.unreadable as unreadable:
            for line, kind, item in undecoded_documents(source.file, json_key=source.json_key):
                document, problem = _document(source, line, kind, item)
                num, size = num + 1, size + len(document.text.encode())
                if problem is None:
                    yield document
                elif problem != EMPTY and self.on_bad_document == "error":
                    raise CorruptInput(
                        f"{source.file}:{line}: {problem}. Correct the file, or have such documents removed and listed "
                        "(--on-bad-document reject; in a study, prepare.on_bad_document)."
                    )
                else:
                    document.metadata["why"] = problem
                    unreadable.write(document, rank)
        self.counts.mkdir(parents=True, exist_ok=True)
        write_json(self.counts / f"{rank:05d}.json", {source.domain: {"documents": num, "bytes": size, "examples": []}})


EMPTY = "empty"


def _document(source: Source, line: int, kind: str, item: Any) -> tuple[Document, str | None]:
    """The document, and what is wrong with it: then its text is what could be read, and no other field is kept."""
    about: dict[str, Any] = {"domain": source.domain, "key": source.json_key, "record": {}}
    document = Document(text="", id=f"{source.name}:{line}", metadata=about)
    try:
        document.text = text_of(item, kind, source.json_key).decode()
        about["record"] = _record(item, kind)
    except ValueError as e:
        raw = item[source.json_key] if kind == "row" else item
        document.text = raw.decode(errors="replace") if isinstance(raw, bytes) else document.text
        return document, str(e)
    return document, None if document.text else EMPTY


def _record(item: Any, kind: str) -> dict[str, Any]:
    """Every field of the user's record, as it can be written again. Raises ValueError where it is nested too deeply."""
    record = item if kind == "row" else json.loads(item, parse_int=_integer) if kind == "json" else {}
    try:
        orjson.dumps(record)
        return record
    except TypeError:
        pass
    try:
        # A lone surrogate becomes a question mark.
        record = json.loads(json.dumps(record, ensure_ascii=False, default=_as_text).encode(errors="replace"))
        orjson.dumps(record)
    except (TypeError, RecursionError) as e:
        raise ValueError(f"a field that cannot be written as JSON ({e})") from e
    return record


def _integer(digits: str) -> int | str:
    """Of JSON; beyond 64 bits as its digits."""
    return int(digits) if len(digits) < 21 and -(2**63) <= int(digits) < 2**64 else digits


def _as_text(value: Any) -> str:
    """What JSON has no form for."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


class ReadPassed(JsonlReader):
    """Task n reads what task n of an earlier pass wrote, which may be nothing (datatrove shares out the files it finds)."""

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        name = f"{rank:05d}.jsonl.zst"
        yield from self.read_files_shard([name] if self.data_folder.isfile(name) else [])


def passed_writer(folder: Path) -> JsonlWriter:
    """Whole documents, for the next pass."""
    return JsonlWriter(str(folder), output_filename="${rank}.jsonl.zst", compression="infer")


class RecordWriter(JsonlWriter):
    """The user's records, in result/<domain> (reason None) or result/removed/<reason>/<domain>, and a count of them in
    counts/<reason or "kept">/<task>.json: {domain: {documents, bytes, examples}}."""

    def __init__(self, work: Path, reason: str | None = None) -> None:
        self.reason, self.counts = reason, work / "counts" / (reason or "kept")
        folder = work / "result" / (f"{REMOVED}/{reason}" if reason else "")
        super().__init__(str(folder), output_filename="${folder}/${rank}.jsonl.zst", compression="infer", adapter=_to_record)
        self._start()

    def _start(self) -> None:
        self._documents: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._examples: dict[str, list[dict[str, Any]]] = {}
        self._rank: int | None = None

    def write(self, document: Document, rank: int = 0, **kwargs: Any) -> None:
        folder = document.metadata.get("folder", document.metadata["domain"])
        super().write(document, rank, folder=folder, **kwargs)
        self._rank = rank
        self._documents[folder] += 1
        self._bytes[folder] += len(document.text.encode())
        if self.reason and len(examples := self._examples.setdefault(folder, [])) < EXAMPLES:
            examples.append({k: v for k, v in _removed(document, self.reason).items() if k != "reason"})

    def close(self) -> None:
        super().close()
        if self._rank is not None:
            self.counts.mkdir(parents=True, exist_ok=True)
            counts = {
                folder: {"documents": n, "bytes": self._bytes[folder], "examples": self._examples.get(folder, [])}
                for folder, n in self._documents.items()
            }
            write_json(self.counts / f"{self._rank:05d}.json", counts)
        self._start()


def _to_record(writer: RecordWriter, document: Document) -> dict[str, Any]:
    record = document.metadata["record"] | {document.metadata["key"]: document.text}
    return record | {REMOVED: _removed(document, writer.reason)} if writer.reason else record


def _removed(document: Document, reason: str) -> dict[str, Any]:
    notes = {
        k: v
        for k, v in document.metadata.items()
        if k not in ("domain", "key", "record", "folder", "file_path", "duplicate_count")
    }
    return {"document": document.id, "reason": reason} | notes
