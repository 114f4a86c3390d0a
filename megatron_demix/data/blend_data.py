"""The data of a view or a materialised blend, written piece by piece into a working folder.

The folder holds, besides the blend's own files: plan.idx (the documents in their order, as an index over the pool),
plan.domains.npy and plan.json (written last: the plan is whole), and one shard-<n>.json for each finished shard of the .bin.
A killed run goes on from what is there; several machines may write shards of one blend side by side.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_demix import native
from megatron_demix.artifact import read_json, write_json
from megatron_demix.errors import CorruptInput
from megatron_demix.indexed.format import HEADER_BYTES, bin_path, header
from megatron_demix.indexed.reader import Index
from megatron_demix.indexed.writer import index_bytes, write_index
from megatron_demix.progress import progress_bar

if TYPE_CHECKING:
    from megatron_demix.data.blend import BlendPlan

DOMAINS_SUFFIX = ".domains.npy"
# A shard is the smallest number of whole steps that reaches its size.
SHARD_BYTES = 256 << 20
SHARD_STEP_DOCUMENTS = 1 << 14
_CHUNK = 1 << 20


def write_plan(plan: BlendPlan, work: Path, threads: int) -> dict[str, Any]:
    """Choose the order of the documents, once. Returns what plan.json says: evenness, and the number of shards."""
    facts_path = work / "plan.json"
    if facts_path.is_file():
        return read_json(facts_path)
    lengths, pointers = create_index(work / "plan.idx", plan.pool.dtype, plan.documents)
    domain_of = np.lib.format.open_memmap(work / f"plan{DOMAINS_SUFFIX}", "w+", np.uint16, (plan.documents,))
    drift = dict(zip((p.domain.name for p in plan.parts), plan.write(lengths, pointers, domain_of, threads), strict=True))
    for array in (lengths, pointers, domain_of):
        array.flush()
    facts = {
        "shards": sum(1 for _ in shards(lengths, plan.pool.dtype.itemsize)),
        "evenness": {
            "longest_document_tokens": int(lengths.max(initial=0)),
            "tokens_ahead_of_share": {name: ahead for name, (ahead, _) in drift.items()},
            "tokens_behind_share": {name: behind for name, (_, behind) in drift.items()},
        },
    }
    write_json(facts_path, facts)
    return facts


def create_index(path: Path, dtype: np.dtype, documents: int) -> tuple[np.memmap, np.memmap]:
    """A new .idx of one-sequence documents, its lengths and pointers mapped for writing. Its space is reserved, so that a
    full disk is an error here and not a signal later."""
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, index_bytes(documents, documents + 1))
        file.write(header(dtype, documents, documents + 1))
        file.seek(HEADER_BYTES + 12 * documents)
        for start in range(0, documents + 1, _CHUNK):
            file.write(np.arange(start, min(start + _CHUNK, documents + 1), dtype="<i8").data)
    return _map_index(path, documents, "r+")


def _map_index(path: Path, documents: int, mode: Any) -> tuple[np.memmap, np.memmap]:
    lengths = np.memmap(path, "<i4", mode, HEADER_BYTES, (documents,))
    return lengths, np.memmap(path, "<i8", mode, HEADER_BYTES + 4 * documents, (documents,))


def shards(lengths: np.ndarray, item_bytes: int) -> Iterator[tuple[int, int, int, int]]:
    """Runs of whole documents of about SHARD_BYTES: (first document, end, first token, tokens)."""
    begin = first = tokens = 0
    for start in range(0, len(lengths), SHARD_STEP_DOCUMENTS):
        block = lengths[start : start + SHARD_STEP_DOCUMENTS]
        tokens += int(block.sum(dtype=np.int64))
        if tokens * item_bytes >= SHARD_BYTES or start + len(block) == len(lengths):
            yield begin, start + len(block), first, tokens
            begin, first, tokens = start + len(block), first + tokens, 0


def finish_view(plan: BlendPlan, work: Path, name: str, pool_id: str, cache: Path | None, *, progress: bool) -> dict[str, Any]:
    """The pool as the view's .bin, and the plan as its .idx. cache: a folder where views of one pool share its .bin."""
    facts = read_json(work / "plan.json")
    target = bin_path(work / name)
    with progress_bar(f"pooling {name}", plan.pool.num_bytes, unit="bytes", enabled=progress) as advance:
        if cache is None:
            _copy_pool(plan, target, advance)
        else:
            shared = cache / f"pool-{pool_id}.bin"
            if not shared.is_file():
                cache.mkdir(parents=True, exist_ok=True)
                temporary = cache / f".{shared.name}.tmp-{os.getpid()}-0"
                _copy_pool(plan, temporary, advance)
                os.rename(temporary, shared)
            if shared.stat().st_size != plan.pool.num_bytes:
                seen = shared.stat().st_size
                raise CorruptInput(
                    f"{shared} has {seen} bytes, expected {plan.pool.num_bytes}. Delete it to have it made anew."
                )
            target.unlink(missing_ok=True)
            _link(shared, target)
    _take(work / "plan.idx", work / f"{name}.idx")
    _take(work / f"plan{DOMAINS_SUFFIX}", work / f"{name}{DOMAINS_SUFFIX}")
    return {"evenness": facts["evenness"]}


def _take(source: Path, target: Path) -> None:
    """Rename, unless a run that was killed since has done it."""
    if source.exists() or not target.exists():
        os.replace(source, target)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def _copy_pool(plan: BlendPlan, target: Path, advance: Any) -> None:
    """All .bin files of the pool end to end. The kernel copies; file systems that can, share the blocks instead."""
    with open(target, "wb") as out:
        for index, base in plan.pool.indexes:
            _copy_bin(index, base, out.fileno(), advance)
        os.fsync(out.fileno())


def _copy_bin(index: Index, base: int, out: int, advance: Any) -> None:
    with open(bin_path(index.prefix), "rb") as source:
        copied = 0
        while copied < index.bin_bytes:
            some = min(64 << 20, index.bin_bytes - copied)
            count = os.copy_file_range(source.fileno(), out, some, copied, base + copied)
            if count == 0:
                raise CorruptInput(f"{bin_path(index.prefix)} became shorter while it was read.")
            copied += count
            advance(count)


def write_shards(plan: BlendPlan, work: Path, name: str, worker: tuple[int, int], *, threads: int, progress: bool) -> None:
    """Write every n-th shard of the .bin from the i-th on, worker = (i, n); finished ones are left alone."""
    item = plan.pool.dtype.itemsize
    lengths, pointers = _map_index(work / "plan.idx", plan.documents, "r")
    pool = plan.pool.contents()
    todo = list(enumerate(shards(lengths, item)))[worker[0] :: worker[1]]
    total = sum(tokens for _, (*_, tokens) in todo)
    descriptor = os.open(bin_path(work / name), os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.posix_fallocate(descriptor, 0, max(1, plan.tokens * item))
        with progress_bar(f"writing {name}", total, unit="tokens", enabled=progress) as advance:
            for number, (begin, end, first_token, tokens) in todo:
                marker = work / f"shard-{number}.json"
                if not marker.is_file():
                    offset = first_token * item
                    content = native.gather(lengths, pointers, begin, end, item, pool, descriptor, offset, threads=threads)
                    os.fdatasync(descriptor)
                    write_json(marker, {"content": f"{content:016x}"})
                advance(tokens)
    finally:
        os.close(descriptor)


def finish_materialised(plan: BlendPlan, work: Path, name: str) -> dict[str, Any] | None:
    """The .idx, once all shards are written; None while some are missing."""
    facts = read_json(work / "plan.json")
    markers = [work / f"shard-{number}.json" for number in range(facts["shards"])]
    if not all(marker.is_file() for marker in markers):
        return None
    content = sum(int(read_json(marker)["content"], 16) for marker in markers) % 2**64
    lengths, _ = _map_index(work / "plan.idx", plan.documents, "r")
    write_index(work / f"{name}.idx", plan.pool.dtype, lengths)
    _take(work / f"plan{DOMAINS_SUFFIX}", work / f"{name}{DOMAINS_SUFFIX}")
    return {"content": f"{content:016x}", "evenness": facts["evenness"]}
