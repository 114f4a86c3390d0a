"""Text to indexed data: one domain's documents, tokenized and split, the same bytes whatever the number of workers."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_demix.artifact import fingerprint, write_json
from megatron_demix.data.inputs import BadDocuments, read_blocks, resolve_inputs
from megatron_demix.data.outputs import REJECTED, Outputs
from megatron_demix.data.recipe import Recipe, SentenceSplitter, tokenize
from megatron_demix.data.tokenizer import Tokenizer
from megatron_demix.errors import ConfigError, CorruptInput, OutputExists, storage_errors
from megatron_demix.progress import progress_bar
from megatron_demix.units import format_count

SPLITS = ("train", "valid", "test")
STATS = "stats.json"

__all__ = ["prepare_domain", "preprocess", "resolve_inputs"]


def prepare_domain(
    inputs: Sequence[Path],
    tokenizer: Tokenizer,
    output: Path,
    *,
    json_key: str = "text",
    split: tuple[float, float, float] = (0.94, 0.03, 0.03),
    seed: int = 0,
    workers: int = 1,
    append_eod: bool = True,
    on_bad_document: BadDocuments = "error",
    progress: bool = True,
) -> dict[str, Any]:
    """Write train, valid and test (.bin, .idx, .meta.json each), stats.json and rejected.jsonl into the folder `output`.

    Returns the statistics: {"splits": {split: {documents, tokens, bytes}}, "rejected": n, "tokenizer": fingerprint}. A folder
    in which an earlier call was interrupted is gone on with. Raises ConfigError, CorruptInput, StorageError.
    """
    if len(split) != len(SPLITS) or min(split) < 0 or abs(sum(split) - 1) > 1e-6 or split[0] == 0:
        raise ConfigError(
            f"split is {split}, expected three shares >= 0 for train, valid and test that sum to 1, with some train."
        )
    recipe = Recipe(tokenizer, json_key, append_eod, on_bad_document, tuple(split), seed)
    with _outputs(inputs, Path(output), SPLITS, recipe) as outputs:
        _fill(outputs, inputs, recipe, workers, progress)
        documents = _check_documents(inputs, outputs)
        for name, share in zip(SPLITS, split, strict=True):
            if share > 0 and outputs.counts[name]["documents"] == 0:
                raise ConfigError(
                    f"{_named(inputs)}: none of the {documents} documents fell into split {name!r} (share {share:g}). "
                    f"Give the domain more documents, or {name} a larger share."
                )
        outputs.close()
    stats = {"splits": outputs.counts, "rejected": outputs.num_rejected, "tokenizer": tokenizer.fingerprint}
    write_json(Path(output) / STATS, stats)
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
    progress: bool = True,
) -> dict[str, int]:
    """All documents as one indexed data set, `prefix`.bin/.idx/.meta.json, and `prefix`.rejected.jsonl if any was rejected.

    Interrupted, it goes on with its next call; nothing lies at `prefix` before it is whole. Returns {documents, tokens,
    bytes, rejected}. Raises OutputExists, ConfigError, CorruptInput, StorageError.
    """
    prefix = Path(prefix)
    suffixes = (".bin", ".idx", ".meta.json", f".{REJECTED}")
    for suffix in suffixes:
        if Path(f"{prefix}{suffix}").exists():
            raise OutputExists(f"{prefix}{suffix} exists. Move it away or choose another output; nothing is overwritten.")
    recipe = Recipe(tokenizer, json_key, append_eod, on_bad_document, sentences=sentences)
    work = prefix.parent / f".{prefix.name}.work"
    with storage_errors(f"writing {prefix}"):
        work.mkdir(parents=True, exist_ok=True)
        with _outputs(inputs, work, [prefix.name], recipe) as outputs:
            _fill(outputs, inputs, recipe, workers, progress)
            _check_documents(inputs, outputs)
            outputs.close()
        os.replace(work / REJECTED, work / f"{prefix.name}.{REJECTED}")
        for suffix in suffixes[::-1]:  # the .bin last: without it nobody takes the rest for a data set
            if suffix != f".{REJECTED}" or outputs.num_rejected:
                os.rename(work / f"{prefix.name}{suffix}", f"{prefix}{suffix}")
        shutil.rmtree(work)
    return outputs.counts[prefix.name] | {"rejected": outputs.num_rejected}


def _outputs(inputs: Sequence[Path], folder: Path, names: Sequence[str], recipe: Recipe) -> Outputs:
    files = [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in inputs]
    return Outputs(folder, names, recipe, fingerprint([files, recipe.describe()]))


def _fill(outputs: Outputs, inputs: Sequence[Path], recipe: Recipe, workers: int, progress: bool) -> None:
    size = sum(p.stat().st_size for p in inputs)
    blocks = read_blocks(inputs, json_key=recipe.json_key)
    label = f"tokenizing {_named(inputs)}"
    with progress_bar(label, size, unit="bytes", enabled=progress) as advance:
        for _ in range(outputs.blocks):
            advance(next(blocks).file_bytes)
        before, started = outputs.tokens, time.monotonic()
        for done in tokenize(blocks, recipe, workers):
            outputs.add(done)
            rate = int((outputs.tokens - before) / max(time.monotonic() - started, 1e-6))
            advance(done.block.file_bytes, info=f"{format_count(outputs.tokens)} tokens, {format_count(rate)}/s")


def _named(inputs: Sequence[Path]) -> str:
    more = f" and {len(inputs) - 1} more files" if len(inputs) > 1 else ""
    return f"{inputs[0]}{more}" if inputs else "no files"


def _check_documents(inputs: Sequence[Path], outputs: Outputs) -> int:
    documents = sum(c["documents"] for c in outputs.counts.values())
    if documents == 0:
        raise CorruptInput(
            f"{_named(inputs)}: no documents ({outputs.num_rejected} empty or rejected), expected text. Correct the inputs."
        )
    return documents
