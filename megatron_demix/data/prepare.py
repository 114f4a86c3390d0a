"""Text to indexed data: one domain's documents, tokenized and split, the same bytes whatever the number of workers."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_demix import native
from megatron_demix.artifact import write_json
from megatron_demix.data.inputs import BadDocuments, Block, parse, read_blocks, resolve_inputs
from megatron_demix.data.tokenizer import Tokenizer
from megatron_demix.errors import ConfigError, CorruptInput, storage_errors
from megatron_demix.indexed.format import token_dtype
from megatron_demix.indexed.writer import IndexedWriter
from megatron_demix.progress import progress_bar
from megatron_demix.units import format_count

SPLITS = ("train", "valid", "test")
STATS, REJECTED = "stats.json", "rejected.jsonl"

__all__ = ["prepare_domain", "resolve_inputs"]


@dataclass(frozen=True)
class Tokenized:
    """One block's documents, by output: tokens ready to be written, lengths int32 [D], and the bytes of text they stand for."""

    block: Block
    tokens: list[np.ndarray]
    lengths: list[np.ndarray]
    text_bytes: list[int]
    rejected: list[tuple[str, str]]


@dataclass(frozen=True)
class Recipe:
    """How a block becomes tokens: everything that decides the bytes of the output."""

    tokenizer: Tokenizer
    json_key: str = "text"
    append_eod: bool = True
    on_bad_document: BadDocuments = "error"
    split: tuple[float, ...] = (1.0,)
    seed: int = 0

    def __call__(self, block: Block) -> Tokenized:
        documents = parse(block, json_key=self.json_key, on_bad_document=self.on_bad_document)
        route = self.route(documents.text.content, documents.text.offsets)
        ids, offsets = self.tokenizer.encode_batch(documents.text)
        dtype = token_dtype(self.tokenizer.vocab_size)
        eod = self.tokenizer.eod_id if self.append_eod else None
        packed = [native.pack_tokens(ids, offsets, dtype, eod, route, n) for n in range(len(self.split))]
        sizes = documents.text.lengths()
        text_bytes = [int(sizes[route == n].sum()) for n in range(len(self.split))]
        return Tokenized(block, [t for t, _ in packed], [n for _, n in packed], text_bytes, documents.rejected)

    def route(self, content: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """uint8 [D]: the split of each document, from a seeded hash of its text: neither its place in the corpus nor the
        tokenizer counts, and equal documents go the same way."""
        if len(self.split) == 1:
            return np.zeros(len(offsets) - 1, np.uint8)
        # 53 bits, so that the comparison with the shares is exact.
        uniform = (native.hash_documents(content, offsets, self.seed) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        edges = np.cumsum(self.split)[:-1] / sum(self.split)
        return np.searchsorted(edges, uniform, side="right").astype(np.uint8)


def tokenize(blocks: Iterable[Block], recipe: Recipe, workers: int) -> Iterator[Tokenized]:
    """Blocks through the recipe in `workers` threads (parsing apart, the work lets go of the interpreter), in their order.

    At most workers + 2 blocks are held in memory.
    """
    if workers <= 1:
        yield from map(recipe, blocks)
        return
    pending: deque[Future[Tokenized]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="tokenize") as pool:
        try:
            for block in blocks:
                pending.append(pool.submit(recipe, block))
                if len(pending) > workers + 1:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


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

    Returns the statistics: {"splits": {split: {documents, tokens, bytes}}, "rejected": n}. Raises ConfigError, CorruptInput,
    StorageError; what was written until then is the caller's to remove.
    """
    _check_split(split)
    recipe = Recipe(tokenizer, json_key, append_eod, on_bad_document, tuple(split), seed)
    output = Path(output)
    dtype = token_dtype(tokenizer.vocab_size)
    totals = {name: {"documents": 0, "tokens": 0, "bytes": 0} for name in SPLITS}
    num_rejected = 0
    size = sum(p.stat().st_size for p in inputs)
    writers = [IndexedWriter(output / name, dtype) for name in SPLITS]
    with (
        storage_errors(f"writing {output}"),
        open(output / REJECTED, "w", encoding="utf-8") as rejected,
        progress_bar(f"tokenizing {output.name}", size, unit="bytes", enabled=progress) as advance,
    ):
        for done in tokenize(read_blocks(inputs, json_key=json_key), recipe, workers):
            for n, name in enumerate(SPLITS):
                writers[n].add(done.tokens[n], done.lengths[n])
                totals[name]["documents"] += len(done.lengths[n])
                totals[name]["tokens"] += len(done.tokens[n])
                totals[name]["bytes"] += done.text_bytes[n]
            for where, reason in done.rejected:
                rejected.write(json.dumps({"document": where, "reason": reason}) + "\n")
            num_rejected += len(done.rejected)
            advance(done.block.size, info=f"{format_count(sum(t['tokens'] for t in totals.values()))} tokens")
        _check_documents(inputs, split, totals, num_rejected)
        for name, writer in zip(SPLITS, writers, strict=True):
            writer.close()
            write_json(output / f"{name}.meta.json", describe(tokenizer, totals[name], append_eod=append_eod))
    stats = {"splits": totals, "rejected": num_rejected, "tokenizer": tokenizer.fingerprint}
    write_json(output / STATS, stats)
    return stats


def describe(tokenizer: Tokenizer, counts: dict[str, int], *, append_eod: bool) -> dict[str, Any]:
    """What stands beside a prepared data set as `<prefix>.meta.json`; the blend refuses to mix tokenizers by it."""
    facts = {"type": tokenizer.type, "vocab_size": tokenizer.vocab_size, "eod_id": tokenizer.eod_id, "append_eod": append_eod}
    return {"tokenizer": tokenizer.fingerprint} | facts | counts


def _check_split(split: tuple[float, ...]) -> None:
    if len(split) != len(SPLITS) or min(split) < 0 or abs(sum(split) - 1) > 1e-6 or split[0] == 0:
        raise ConfigError(
            f"split is {split}, expected three shares >= 0 for train, valid and test that sum to 1, with some train."
        )


def _check_documents(inputs: Sequence[Path], split: Sequence[float], totals: dict[str, dict[str, int]], rejected: int) -> None:
    documents = sum(t["documents"] for t in totals.values())
    named = f"{inputs[0]}{f' and {len(inputs) - 1} more files' if len(inputs) > 1 else ''}" if inputs else "no files"
    if documents == 0:
        raise CorruptInput(f"{named}: no documents ({rejected} empty or rejected), expected text. Correct the inputs.")
    for (name, counts), share in zip(totals.items(), split, strict=True):
        if share > 0 and counts["documents"] == 0:
            raise ConfigError(
                f"{named}: none of the {documents} documents fell into split {name!r} (share {share:g}). "
                f"Give the domain more documents, or {name} a larger share."
            )
