"""The data of a view or a materialised blend, written piece by piece into a working folder.

The folder holds, besides the blend's own files: plan-idx (the documents in their order, as an index over the pool),
plan-domains (an .npy) and plan-facts (JSON, written last: the plan is whole), which are no blend's own files whatever its name
is, and one shard-<n>.json for each finished shard of the .bin. A killed run goes on from what is there; several machines may
write shards of one blend side by side.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_demix import native
from megatron_demix.artifact import (
    only_maker,
    read_json,
    remove_leftovers,
    remove_lock,
    sync_path,
    temporary_beside,
    write_json,
)
from megatron_demix.errors import CorruptInput
from megatron_demix.indexed.format import HEADER_BYTES, bin_path, header
from megatron_demix.indexed.reader import Index
from megatron_demix.indexed.writer import write_index
from megatron_demix.progress import progress_bar

if TYPE_CHECKING:
    from megatron_demix.data.blend import BlendPlan, OrderPiece

DOMAINS_SUFFIX = ".domains.npy"
PLAN_INDEX, PLAN_DOMAINS, PLAN_FACTS = "plan-idx", "plan-domains", "plan-facts"
# A shard is the smallest number of whole steps that reaches its size.
SHARD_BYTES = 256 << 20
SHARD_STEP_DOCUMENTS = 1 << 14
_COPIED_BYTES = 8 << 20


def write_plan(plan: BlendPlan, work: Path, threads: int) -> None:
    """Choose the order of the documents, once; plan-facts says how even it is, and the number of shards."""
    facts_path = work / PLAN_FACTS
    if facts_path.is_file():
        return
    order = plan.order()
    longest = 0
    with (
        open(work / PLAN_INDEX, "wb", 0) as index,
        open(work / PLAN_DOMAINS, "wb", 0) as owners,
        ThreadPoolExecutor(1, thread_name_prefix="writer") as writer,
    ):
        index.write(header(plan.pool.dtype, plan.documents, plan.documents + 1))
        described = {"descr": "<u2", "fortran_order": False, "shape": (plan.documents,)}
        np.lib.format.write_array_header_1_0(owners, described)
        targets = _Targets(index.fileno(), owners.fileno(), plan.documents, owners.tell())
        written: deque[Future[None]] = deque()
        for first, piece in order.pieces(threads):
            # One piece is written while the next is ordered.
            while len(written) > 1:
                written.popleft().result()
            longest = max(longest, int(piece.lengths.max(initial=0)))
            written.append(writer.submit(targets.write, first, piece))
        while written:
            written.popleft().result()
        targets.finish()
    plan.pool.check_still_there()
    drift = dict(zip((p.domain.name for p in plan.parts), order.drift, strict=True))
    lengths, _ = map_index(work / PLAN_INDEX, plan.documents)
    facts = {
        "shards": sum(1 for _ in shards(lengths, plan.pool.dtype.itemsize)),
        "evenness": {
            "longest_document_tokens": longest,
            "tokens_ahead_of_share": {name: ahead for name, (ahead, _) in drift.items()},
            "tokens_behind_share": {name: behind for name, (_, behind) in drift.items()},
        },
    }
    write_json(facts_path, facts)


@dataclass(frozen=True)
class _Targets:
    """The open plan-idx and plan-domains (its data from byte `owners_at` on), filled piece by piece."""

    index: int
    owners: int
    documents: int
    owners_at: int

    def write(self, first: int, piece: OrderPiece) -> None:
        """Documents [first, first + n). Written, not mapped: that is faster, and a full disk is an error and not a signal."""
        count = len(piece.lengths)
        _write_at(self.index, piece.lengths, HEADER_BYTES + 4 * first)
        _write_at(self.index, piece.pointers, HEADER_BYTES + 4 * self.documents + 8 * first)
        boundaries = np.arange(first, first + count, dtype="<i8")
        _write_at(self.index, boundaries, HEADER_BYTES + 12 * self.documents + 8 * first)
        _write_at(self.owners, piece.owners, self.owners_at + 2 * first)

    def finish(self) -> None:
        _write_at(self.index, np.array([self.documents], "<i8"), HEADER_BYTES + 20 * self.documents)
        for descriptor in (self.index, self.owners):
            os.fdatasync(descriptor)


def _write_at(descriptor: int, array: np.ndarray, offset: int) -> None:
    left = array.view(np.uint8).data
    while left:
        written = os.pwrite(descriptor, left, offset)
        left, offset = left[written:], offset + written


def map_index(path: Path, documents: int) -> tuple[np.memmap, np.memmap]:
    """Lengths and pointers of an .idx of one-sequence documents."""
    lengths = np.memmap(path, "<i4", "r", HEADER_BYTES, (documents,))
    return lengths, np.memmap(path, "<i8", "r", HEADER_BYTES + 4 * documents, (documents,))


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
    facts = read_json(work / PLAN_FACTS)
    target = bin_path(work / name)
    with progress_bar(f"pooling {name}", plan.pool.num_bytes, unit="bytes", enabled=progress) as advance:
        if cache is None:
            _copy_pool(plan, target, advance)
        else:
            shared = cache / f"pool-{pool_id}.bin"
            if shared.is_file():
                remove_lock(shared)
            else:
                _make_shared(plan, shared, advance)
            if shared.stat().st_size != plan.pool.num_bytes:
                seen = shared.stat().st_size
                raise CorruptInput(
                    f"{shared} has {seen} bytes, expected {plan.pool.num_bytes}. Delete it to have it made anew."
                )
            target.unlink(missing_ok=True)
            _link(shared, target)
    _take(work / PLAN_INDEX, work / f"{name}.idx")
    _take(work / PLAN_DOMAINS, work / f"{name}{DOMAINS_SUFFIX}")
    return {"evenness": facts["evenness"]}


def _make_shared(plan: BlendPlan, shared: Path, advance: Any) -> None:
    """The pool in a cache, by one of all the builders that want it; the others wait."""
    shared.parent.mkdir(parents=True, exist_ok=True)
    with only_maker(shared):
        if shared.is_file():
            return
        remove_leftovers(shared.parent)
        temporary = temporary_beside(shared)
        try:
            _copy_pool(plan, temporary, advance)
            os.rename(temporary, shared)
        finally:
            temporary.unlink(missing_ok=True)
        sync_path(shared.parent)


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
            count = _copy_range(source.fileno(), out, some, copied, base + copied)
            if count == 0:
                raise CorruptInput(f"{bin_path(index.prefix)} became shorter while it was read.")
            copied += count
            advance(count)


def _copy_range(source: int, out: int, some: int, at: int, to: int) -> int:
    """Bytes copied, at least 1 unless the source has ended."""
    try:
        return os.copy_file_range(source, out, some, at, to)
    except OSError as e:
        # Between file systems, and on some of them, the kernel does not copy by itself.
        if e.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return os.pwrite(out, os.pread(source, min(some, _COPIED_BYTES), at), to)


def write_shards(plan: BlendPlan, work: Path, name: str, worker: tuple[int, int], *, threads: int, progress: bool) -> None:
    """Write every n-th shard of the .bin from the i-th on, worker = (i, n); finished ones are left alone."""
    item = plan.pool.dtype.itemsize
    lengths, pointers = map_index(work / PLAN_INDEX, plan.documents)
    pool = plan.pool.contents()
    todo = list(enumerate(shards(lengths, item)))[worker[0] :: worker[1]]
    total = sum(tokens for _, (*_, tokens) in todo)
    descriptor = os.open(bin_path(work / name), os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        native.reserve(descriptor, plan.tokens * item)
        with progress_bar(f"writing {name}", total, unit="tokens", enabled=progress) as advance:
            for number, (begin, end, first_token, tokens) in todo:
                marker = work / f"shard-{number}.json"
                if not marker.is_file():
                    offset = first_token * item
                    try:
                        content = native.gather(
                            lengths, pointers, begin, end, item, pool.spans, descriptor, offset, threads=threads
                        )
                    finally:
                        pool.check_still_there()
                    os.fdatasync(descriptor)
                    write_json(marker, {"content": f"{content:016x}"})
                advance(tokens)
    finally:
        os.close(descriptor)


def finish_materialised(plan: BlendPlan, work: Path, name: str) -> dict[str, Any] | None:
    """The .idx, once all shards are written; None while some are missing."""
    facts = read_json(work / PLAN_FACTS)
    markers = [work / f"shard-{number}.json" for number in range(facts["shards"])]
    if not all(marker.is_file() for marker in markers):
        return None
    content = sum(int(read_json(marker)["content"], 16) for marker in markers) % 2**64
    lengths, _ = map_index(work / PLAN_INDEX, plan.documents)
    write_index(work / f"{name}.idx", plan.pool.dtype, lengths)
    _take(work / PLAN_DOMAINS, work / f"{name}{DOMAINS_SUFFIX}")
    return {"content": f"{content:016x}", "evenness": facts["evenness"]}
