"""The indexed data sets of one tokenizing run, with a journal: a killed run goes on where it stopped, to the same bytes.

A run over one part of the input leaves its journal and its files as they are when it is finished; from those of all parts,
`take` makes what one run over everything would have made.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_demix.artifact import read_json, write_json
from megatron_demix.data.encode_blocks import Recipe, Tokenized
from megatron_demix.data.parts import JOURNAL, Lines, moved
from megatron_demix.errors import storage_errors
from megatron_demix.indexed.writer import IndexedWriter, Written

REJECTED = "rejected.jsonl"
CHECKPOINT_S = 10.0


class Outputs:
    """Writers for `names` in `folder`, a list of rejected documents, and counts. identity: what the bytes depend on; a
    journal of another identity is not resumed but overwritten."""

    def __init__(self, folder: Path, names: Sequence[str], recipe: Recipe, identity: str, *, resume: bool = True) -> None:
        self.folder, self.names, self._identity = Path(folder), list(names), identity
        self._recipe = recipe
        state = self._read_journal() if resume else None
        if state is None:
            # Gone before anything is overwritten, or a run with its identity would go on with other bytes.
            (self.folder / JOURNAL).unlink(missing_ok=True)
            state = self._nothing()
        self.whole: bool = state["whole"]
        """Whether a run over a part has come to its end."""
        self._lines = Lines(**state["lines"])
        self.blocks: int = state["blocks"]
        """Blocks that are in the outputs already; the run goes on with this one."""
        self.counts: dict[str, dict[str, int]] = state["counts"]
        self.num_rejected: int = state["rejected"]
        sentences = recipe.sentences is not None
        self._writers = [
            IndexedWriter(self.folder / name, recipe.dtype, sentences=sentences, resume=Written(**written))
            for name, written in zip(names, state["written"], strict=True)
        ]
        with storage_errors(f"writing {self.folder}"):
            self._rejected = open(self.folder / REJECTED, "r+b" if state["rejected_bytes"] else "wb")  # noqa: SIM115
            self._rejected.seek(state["rejected_bytes"])
            if state["rejected_bytes"]:
                self._rejected.truncate()
        self._last_checkpoint = time.monotonic()

    def _read_journal(self) -> dict[str, Any] | None:
        path = self.folder / JOURNAL
        state = read_json(path) if path.is_file() else {}
        return state if state.get("identity") == self._identity and self._still_there(state) else None

    def _nothing(self) -> dict[str, Any]:
        return {
            "whole": False,
            "blocks": 0,
            "lines": {},
            "counts": {name: {"documents": 0, "tokens": 0, "bytes": 0} for name in self.names},
            "rejected": 0,
            "rejected_bytes": 0,
            "written": [asdict(Written())] * len(self.names),
        }

    def _still_there(self, state: dict[str, Any]) -> bool:
        sizes = {REJECTED: state["rejected_bytes"]}
        for name, written in zip(self.names, state["written"], strict=True):
            sizes |= {f"{name}.bin": written["bin_bytes"], f"{name}.lengths": 4 * written["sequences"]}
            if self._recipe.sentences:
                sizes[f"{name}.groups"] = 4 * written["documents"]
        files = {name: self.folder / name for name in sizes}
        return all(files[name].is_file() and files[name].stat().st_size >= size for name, size in sizes.items())

    def add(self, done: Tokenized) -> None:
        for name, writer, output in zip(self.names, self._writers, done.outputs, strict=True):
            writer.add(output.tokens, output.lengths, sequences_a_document=output.groups)
            counts = self.counts[name]
            counts["documents"] += output.documents
            counts["tokens"] += len(output.tokens)
            counts["bytes"] += output.text_bytes
        self.num_rejected += len(done.rejected)
        self._lines.add(done.block, len(done.rejected))
        lines = (json.dumps({"document": where, "reason": reason}) + "\n" for where, reason in done.rejected)
        with storage_errors(f"writing {self.folder / REJECTED}"):
            self._rejected.write("".join(lines).encode())
        self.blocks = done.block.number + 1
        if time.monotonic() - self._last_checkpoint > CHECKPOINT_S:
            self.checkpoint()

    @property
    def rejected_list(self) -> Path:
        return self.folder / REJECTED

    def first_rejected(self) -> str:
        """The first rejected document and its reason; "" if there is none."""
        with storage_errors(f"writing {self.rejected_list}"):
            self._rejected.flush()
        with open(self.rejected_list, encoding="utf-8") as file:
            line = file.readline()
        return "{document}: {reason}".format(**json.loads(line)) if line else ""

    def checkpoint(self) -> None:
        """Note how far the outputs have come, after making that much of them last."""
        written = [asdict(writer.checkpoint()) for writer in self._writers]
        with storage_errors(f"writing {self.folder / REJECTED}"):
            self._rejected.flush()
            os.fsync(self._rejected.fileno())
        state = {"identity": self._identity, "whole": self.whole, "blocks": self.blocks, "lines": asdict(self._lines)}
        state |= {"counts": self.counts, "rejected": self.num_rejected, "rejected_bytes": self._rejected.tell()}
        write_json(self.folder / JOURNAL, state | {"written": written})
        self._last_checkpoint = time.monotonic()

    def finish_part(self) -> None:
        """This was one part of the input: leave everything as `take` wants it."""
        self.whole = True
        self.checkpoint()
        self.abandon()

    def take(self, parts: Sequence[Path]) -> None:
        """Append what finished runs over all parts of the input left in these folders, in their order."""
        before = 0
        for part in parts:
            state = read_json(part / JOURNAL)
            for name, writer, written in zip(self.names, self._writers, state["written"], strict=True):
                writer.append(part / name, Written(**written))
                for what, number in state["counts"][name].items():
                    self.counts[name][what] += number
            self.num_rejected += state["rejected"]
            lines = Lines(**state["lines"])
            shift = before if lines.begins_within else 0
            with storage_errors(f"writing {self.folder / REJECTED}"), open(part / REJECTED, "rb") as rejected:
                for number, line in enumerate(rejected):
                    self._rejected.write(moved(line, shift) if shift and number < lines.first_rejected else line)
            if lines.files:
                before = lines.last + (shift if lines.files == 1 else 0)

    @property
    def tokens(self) -> int:
        return sum(c["tokens"] for c in self.counts.values())

    def close(self, more: Mapping[str, Any] | None = None) -> None:
        """Write the .idx files and what stands beside them, and remove the scratch. more: to be said in .meta.json."""
        for name, writer in zip(self.names, self._writers, strict=True):
            writer.close()
            write_json(self.folder / f"{name}.meta.json", self._describe(name) | dict(more or {}))
        self._rejected.close()
        (self.folder / JOURNAL).unlink(missing_ok=True)

    def _describe(self, name: str) -> dict[str, Any]:
        """`<prefix>.meta.json`: what the tokens are. The blend refuses to mix tokenizers by it."""
        t = self._recipe.tokenizer
        facts = {"type": t.type, "vocab_size": t.vocab_size, "eod_id": t.eod_id, "append_eod": self._recipe.append_eod}
        counts = self.counts[name]
        rate = counts["bytes"] / counts["tokens"] if counts["tokens"] else 0.0
        sentences = {"sentences": self._recipe.sentences is not None}
        names = {"tokenizer": t.fingerprint} | ({"tokenizer_also": t.fingerprints[1:]} if t.fingerprints[1:] else {})
        return names | facts | sentences | counts | {"bytes_per_token": round(rate, 4)}

    def __enter__(self) -> Outputs:
        return self

    def abandon(self) -> None:
        """Close the files as they are."""
        for writer in self._writers:
            writer.abandon()
        self._rejected.close()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self.abandon()
