"""Text to indexed data: one domain's documents, tokenized and split, the same bytes whatever the number of workers."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_demix.artifact import fingerprint, only_maker, write_json
from megatron_demix.data.encode_blocks import Recipe, SentenceSplitter, tokenize
from megatron_demix.data.inputs import BadDocuments, read_blocks
from megatron_demix.data.outputs import REJECTED, Outputs
from megatron_demix.data.parts import complete_parts, part_folder, remove_parts
from megatron_demix.data.prefix import finished, is_sealed, publish, seal, unseal
from megatron_demix.data.tokenizer import Tokenizer
from megatron_demix.errors import ConfigError, CorruptInput, storage_errors
from megatron_demix.progress import progress_bar
from megatron_demix.study.data import SPLITS
from megatron_demix.units import format_count

STATS = "stats.json"
MANY_REJECTED = 0.1
"""A share of the documents above which a warning says so: it may be the wrong key."""

__all__ = ["prepare_domain", "preprocess"]


def prepare_domain(
    inputs: Sequence[Path],
    tokenizer: Tokenizer,
    output: Path,
    *,
    json_key: str = "text",
    split: tuple[float, float, float] = (0.94, 0.03, 0.03),
    seed: int = 0,
    workers: int = 1,
    on_bad_document: BadDocuments = "error",
    part: tuple[int, int] | None = None,
    progress: bool = True,
) -> dict[str, Any] | None:
    """Write train, valid and test (.bin, .idx, .meta.json each), stats.json and rejected.jsonl into the folder `output`.

    part: (i, n), make only the i-th of n parts, in a folder there; a call without it makes the whole, of the parts if all are
    there. A folder in which an earlier call was interrupted is gone on with. Returns the statistics, None of a part:
    {"splits": {split: {documents, tokens, bytes}}, "rejected": n, "tokenizer": fingerprint}. Raises ConfigError, CorruptInput,
    StorageError.
    """
    if len(split) != len(SPLITS) or min(split) < 0 or abs(sum(split) - 1) > 1e-6 or split[0] == 0:
        raise ConfigError(
            f"split is {split}, expected three shares >= 0 for train, valid and test that sum to 1, with some train."
        )
    recipe = Recipe(tokenizer, json_key, True, on_bad_document, tuple(split), seed)
    run = _Run(inputs, Path(output), SPLITS, recipe, workers, progress)
    if part is not None:
        run.make_part(part)
        return None
    with run.whole() as outputs:
        documents = _check_documents(inputs, outputs, f"{REJECTED} beside the tokens")
        for name, share in zip(SPLITS, split, strict=True):
            if share > 0 and outputs.counts[name]["documents"] == 0:
                raise ConfigError(
                    f"{_named(inputs)}: none of the {documents} documents fell into split {name!r} (share {share:g}). "
                    f"Give the domain more documents, or {name} a larger share."
                )
        outputs.close()
    stats = {"splits": outputs.counts, "rejected": outputs.num_rejected, "tokenizer": tokenizer.fingerprint}
    write_json(Path(output) / STATS, stats)
    remove_parts(Path(output))
    return stats


def preprocess(
    inputs: Sequence[Path],
    tokenizer: Tokenizer,
    prefix: Path,
    *,
    json_key: str = "text",
    workers: int = 1,
    append_eod: bool = True,
    sentences: SentenceSplitter | None = None,
    on_bad_document: BadDocuments = "error",
    part: tuple[int, int] | None = None,
    progress: bool = True,
) -> dict[str, int] | None:
    """All documents as one indexed data set, `prefix`.bin/.idx/.meta.json, and `prefix`.rejected.jsonl if any was rejected.

    Interrupted, it goes on with its next call; nothing lies at `prefix` before it is whole. Done before with the same inputs
    and settings, it returns at once. Of several processes with one prefix, one works and the others wait for it.

    part: (i, n), make only the i-th of n parts of the input, and the whole if all others are there. Returns {documents, tokens,
    bytes, rejected}, None while parts are missing. Raises OutputExists, ConfigError, CorruptInput, StorageError.
    """
    if part is not None and not 0 <= part[0] < part[1]:
        raise ConfigError(f"part is {part[0]} of {part[1]}, expected 0 <= part < parts.")
    prefix = Path(prefix)
    recipe = Recipe(tokenizer, json_key, append_eod, on_bad_document, sentences=sentences)
    work = prefix.parent / f".{prefix.name}.work"
    run = _Run(inputs, work, [prefix.name], recipe, workers, progress)
    with storage_errors(f"writing {prefix}"):
        prefix.parent.mkdir(parents=True, exist_ok=True)
        if part is not None:
            with only_maker(prefix):
                if done := finished(prefix, run.identity, work):
                    return done
            run.make_part(part)
        with only_maker(prefix):
            if done := finished(prefix, run.identity, work):
                return done
            if part is not None and not complete_parts(work, run.identity) and not is_sealed(work, run.identity):
                return None
            if not is_sealed(work, run.identity):
                unseal(work)
                with run.whole() as outputs:
                    _check_documents(inputs, outputs, f"{prefix}.{REJECTED}")
                    outputs.close({"rejected": outputs.num_rejected, "made_from": run.identity})
                seal(work, prefix.name, run.identity)
            publish(work, prefix)
            return finished(prefix, run.identity, work)


class _Run:
    """One tokenizing of some inputs into a folder, as a whole or in parts."""

    def __init__(
        self, inputs: Sequence[Path], folder: Path, names: Sequence[str], recipe: Recipe, workers: int, progress: bool
    ) -> None:
        self._inputs, self._folder, self._names, self._recipe = inputs, folder, names, recipe
        self._workers, self._progress = workers, progress
        # A moved or copied file that kept its time is the same file.
        files = [[p.name, (facts := p.stat()).st_size, facts.st_mtime_ns] for p in inputs]
        self.identity = fingerprint([files, recipe.describe()])

    def make_part(self, part: tuple[int, int]) -> None:
        """Raises ConfigError, CorruptInput, StorageError."""
        folder = part_folder(self._folder, part)
        self._make_folder(self._folder)
        # The lock lies beside the folder that is removed when everything is published.
        with only_maker(self._folder.with_name(f"{self._folder.name}.{folder.name}")):
            self._make_folder(folder)
            with Outputs(folder, self._names, self._recipe, self.identity) as outputs:
                if outputs.whole:
                    outputs.abandon()
                    return
                self._fill(outputs, part)
                outputs.finish_part()

    @contextmanager
    def whole(self) -> Iterator[Outputs]:
        """Everything, filled and not yet closed: of the parts if all are there."""
        self._make_folder(self._folder)
        parts = complete_parts(self._folder, self.identity)
        with Outputs(self._folder, self._names, self._recipe, self.identity, resume=not parts) as outputs:
            if parts:
                outputs.take(parts)
            else:
                self._fill(outputs, (0, 1))
            yield outputs

    def _make_folder(self, folder: Path) -> None:
        with storage_errors(f"writing {folder}"):
            folder.mkdir(parents=True, exist_ok=True)

    def _fill(self, outputs: Outputs, part: tuple[int, int]) -> None:
        size = sum(p.stat().st_size for p in self._inputs) // part[1]
        blocks = read_blocks(self._inputs, json_key=self._recipe.json_key, part=part)
        label = f"tokenizing {_named(self._inputs)}" + (f", part {part[0]} of {part[1]}" if part[1] > 1 else "")
        with progress_bar(label, size, unit="bytes", enabled=self._progress) as advance:
            for _ in range(outputs.blocks):
                advance(next(blocks).file_bytes)
            before, started = outputs.tokens, time.monotonic()
            for done in tokenize(blocks, self._recipe, self._workers):
                outputs.add(done)
                rate = int((outputs.tokens - before) / max(time.monotonic() - started, 1e-6))
                advance(done.block.file_bytes, info=f"{format_count(outputs.tokens)} tokens, {format_count(rate)}/s")


def _named(inputs: Sequence[Path]) -> str:
    more = f" and {len(inputs) - 1} more files" if len(inputs) > 1 else ""
    return f"{inputs[0]}{more}" if inputs else "no files"


def _check_documents(inputs: Sequence[Path], outputs: Outputs, rejected_list: str) -> int:
    """How many there are. rejected_list: where the others will be listed. Raises CorruptInput where all were rejected."""
    documents, rejected = sum(c["documents"] for c in outputs.counts.values()), outputs.num_rejected
    first = outputs.first_rejected() if rejected > MANY_REJECTED * (documents + rejected) or not documents else ""
    if documents == 0:
        why = f"; the first, {first}; {outputs.rejected_list} has all" if first else ""
        raise CorruptInput(
            f"{_named(inputs)}: no documents ({rejected} empty or rejected{why}), expected text. Correct the inputs, or the "
            "key of their text."
        )
    if first:
        warnings.warn(
            f"{_named(inputs)}: {rejected} of {documents + rejected} documents are empty or rejected, the first, {first}. "
            f"{rejected_list} lists them; they are left out.",
            stacklevel=3,
        )
    return documents
