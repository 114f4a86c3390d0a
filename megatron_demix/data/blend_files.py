"""Writing a planned blend: into a working folder beside its target, then renamed into place, the manifest last."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_demix import native
from megatron_demix.artifact import hash_file, read_json, write_atomic, write_json
from megatron_demix.errors import CorruptInput, OutputExists, storage_errors
from megatron_demix.indexed.format import HEADER_BYTES, bin_path, header
from megatron_demix.indexed.writer import index_bytes, write_index
from megatron_demix.progress import Advance, progress_bar

if TYPE_CHECKING:
    from megatron_demix.data.blend import BlendPlan
    from megatron_demix.data.pool import Domain

MANIFEST_SUFFIX, DOMAINS_SUFFIX = ".blend.json", ".domains.npy"
SHARD_BYTES = 256 << 20
_CHUNK = 1 << 20


def manifest_path(prefix: Path | str) -> Path:
    return Path(f"{prefix}{MANIFEST_SUFFIX}")


def read_manifest(prefix: Path | str) -> dict[str, Any] | None:
    """The manifest of a finished blend, or None. Raises CorruptInput if it is damaged or a file has another size."""
    path = manifest_path(prefix)
    if not path.is_file():
        return None
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("kind") != "blend" or not isinstance(manifest.get("files"), dict):
        raise CorruptInput(f"{path}: not the manifest of a blend.")
    for suffix, facts in manifest["files"].items():
        file = Path(f"{prefix}{suffix}")
        size = file.stat().st_size if file.is_file() else None
        if size != facts["bytes"]:
            seen = "is missing" if size is None else f"has {size} bytes"
            raise CorruptInput(
                f"blend {prefix}: {file.name} {seen}, expected {facts['bytes']} bytes. Build it again elsewhere."
            )
    return manifest


def write(
    plan: BlendPlan, manifest: dict[str, Any], output: Path, mode: str, *, threads: int, progress: bool
) -> dict[str, Any]:
    """Write the files of one mode and publish them with their manifest; returns it. Raises OutputExists, StorageError."""
    with storage_errors(f"writing blend {output}"):
        output.parent.mkdir(parents=True, exist_ok=True)
        with _only_builder(output):
            done = read_manifest(output)
            if done is not None:
                if done["key"] != manifest["key"]:
                    raise OutputExists(
                        f"blend {output} exists with key {done['key']}, expected {manifest['key']}: it was built from other "
                        "data or settings. Choose another output; nothing is overwritten."
                    )
                return done
            work = output.parent / f".{output.name}.work-{manifest['key']}"
            work.mkdir(exist_ok=True)
            name = work / output.name
            if not manifest_path(name).is_file():
                if mode == "args":
                    _write_args(plan, name)
                else:
                    manifest = manifest | _write_data(plan, name, mode, threads, progress)
                _seal(work, output, manifest)
            _publish(work, output)
            shutil.rmtree(work)
            return read_manifest(output) or manifest


@contextmanager
def _only_builder(output: Path) -> Iterator[None]:
    """One builder at a time for a target; the others wait and then find it done."""
    lock = output.parent / f".{output.name}.lock"
    with open(lock, "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _seal(work: Path, output: Path, manifest: dict[str, Any]) -> None:
    """Make the files of `work` last, and write the manifest that counts them."""
    prefix = work / output.name
    facts = {}
    for file in sorted(p for p in work.iterdir() if p.name.startswith(f"{output.name}.")):
        with open(file, "rb+") as opened:
            os.fsync(opened.fileno())
        suffix = file.name[len(output.name) :]
        # verify_blend reads the .bin again; its digest here would cost a second pass over it.
        facts[suffix] = {"bytes": file.stat().st_size} | ({} if suffix == ".bin" else {"blake2b": hash_file(file)})
    write_json(manifest_path(prefix), manifest | {"files": facts})


def _publish(work: Path, output: Path) -> None:
    """Rename a sealed blend into place, the manifest last. Killed in between, the next call goes on where it stopped."""
    sealed = manifest_path(work / output.name)
    files = [f"{output.name}{suffix}" for suffix in read_json(sealed)["files"]]
    left = [name for name in files if (work / name).exists()] + [sealed.name]
    for name in left:
        if (output.parent / name).exists():
            raise OutputExists(
                f"{output.parent / name} exists, but no finished blend does. Move it away or choose another output; nothing is "
                "overwritten."
            )
    for name in left:
        os.rename(work / name, output.parent / name)
    descriptor = os.open(output.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _write_data(plan: BlendPlan, name: Path, mode: str, threads: int, progress: bool) -> dict[str, Any]:
    index = Path(f"{name}.idx") if mode == "view" else Path(f"{name}.plan.idx")
    domain_of = np.lib.format.open_memmap(f"{name}{DOMAINS_SUFFIX}", "w+", np.uint16, (plan.documents,))
    lengths, pointers = create_index(index, plan.pool.dtype, plan.documents)
    drift = plan.write(lengths, pointers, domain_of, threads)
    for array in (lengths, pointers, domain_of):
        array.flush()
    facts: dict[str, Any] = {
        "evenness": {
            "longest_document_tokens": int(lengths.max(initial=0)),
            "tokens_ahead_of_share": {p.domain.name: ahead for p, (ahead, _) in zip(plan.parts, drift, strict=True)},
            "tokens_behind_share": {p.domain.name: behind for p, (_, behind) in zip(plan.parts, drift, strict=True)},
        }
    }
    with progress_bar(f"blending {name.name}", plan.tokens, unit="tokens", enabled=progress) as advance:
        if mode == "view":
            _copy_pool(plan, bin_path(name), advance)
        else:
            facts["content"] = f"{_gather(plan, bin_path(name), lengths, pointers, threads, advance):016x}"
            write_index(Path(f"{name}.idx"), plan.pool.dtype, lengths)
            index.unlink()
    return facts


def create_index(path: Path, dtype: np.dtype, documents: int) -> tuple[np.memmap, np.memmap]:
    """A new .idx of one-sequence documents, its lengths and pointers mapped for writing. Its space is reserved, so that a
    full disk is an error here and not a signal later."""
    size = index_bytes(documents, documents + 1)
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
        file.write(header(dtype, documents, documents + 1))
        file.seek(HEADER_BYTES + 12 * documents)
        for start in range(0, documents + 1, _CHUNK):
            file.write(np.arange(start, min(start + _CHUNK, documents + 1), dtype="<i8").data)
    lengths = np.memmap(path, "<i4", "r+", HEADER_BYTES, (documents,))
    pointers = np.memmap(path, "<i8", "r+", HEADER_BYTES + 4 * documents, (documents,))
    return lengths, pointers


def _copy_pool(plan: BlendPlan, target: Path, advance: Advance) -> None:
    """All .bin files of the pool end to end. The kernel copies; file systems that can, share the blocks instead."""
    total = plan.pool.num_bytes
    with open(target, "wb") as out:
        for index, base in plan.pool.indexes:
            with open(bin_path(index.prefix), "rb") as source:
                copied = 0
                while copied < index.bin_bytes:
                    some = min(64 << 20, index.bin_bytes - copied)
                    count = os.copy_file_range(source.fileno(), out.fileno(), some, copied, base + copied)
                    if count == 0:
                        raise CorruptInput(f"{bin_path(index.prefix)} became shorter while it was read.")
                    copied += count
                    advance(plan.tokens * count / total)


def _gather(plan: BlendPlan, target: Path, lengths: np.ndarray, pointers: np.ndarray, threads: int, advance: Advance) -> int:
    """Write the documents out; returns the content digest that verify_blend computes again."""
    item = plan.pool.dtype.itemsize
    pool = plan.pool.contents()
    content = 0
    with open(target, "wb") as out:
        os.posix_fallocate(out.fileno(), 0, plan.tokens * item)
        for begin, end, first_token, tokens in shards(lengths, max(1, SHARD_BYTES // item)):
            offset = first_token * item
            content += native.gather(lengths, pointers, begin, end, item, pool, out.fileno(), offset, threads=threads)
            advance(tokens)
    return content % 2**64


def shards(lengths: np.ndarray, tokens_a_shard: int) -> Iterator[tuple[int, int, int, int]]:
    """Runs of whole documents with about tokens_a_shard tokens: (first document, end, first token, tokens)."""
    begin = first = tokens = 0
    for start in range(0, len(lengths), 1 << 14):
        block = lengths[start : start + (1 << 14)]
        tokens += int(block.sum(dtype=np.int64))
        if tokens >= tokens_a_shard or start + len(block) == len(lengths):
            yield begin, start + len(block), first, tokens
            begin, first, tokens = start + len(block), first + tokens, 0


def _write_args(plan: BlendPlan, name: Path) -> None:
    """The blend as Megatron's arguments: .args.txt for --data-args-path and, where every domain names valid and test data,
    .args.json for --per-split-data-args-path. A weight is a share of samples; the data sets of one domain share its weight in
    proportion to their tokens. None is zero: Megatron dies on those."""
    total = sum(p.planned for p in plan.parts)
    train = _weighted({p.domain.name: p.planned / total for p in plan.parts}, plan.pool.domains)
    write_atomic(Path(f"{name}.args.txt"), "".join(f"{weight} {prefix}\n" for weight, prefix in train))
    splits = {"train": train}
    for split in ("valid", "test"):
        held_out = {p.domain.name: getattr(p.domain, split) for p in plan.parts}
        if not all(held_out.values()):
            return
        splits[split] = [(f"{1 / len(held_out) / len(ps):.17g}", str(q.resolve())) for ps in held_out.values() for q in ps]
    write_json(Path(f"{name}.args.json"), {split: [word for pair in pairs for word in pair] for split, pairs in splits.items()})


def _weighted(shares: Mapping[str, float], domains: Mapping[str, Domain]) -> list[tuple[str, str]]:
    return [
        (f"{share * index.num_tokens / domains[name].tokens:.17g}", str(Path(index.prefix).resolve()))
        for name, share in shares.items()
        for index in domains[name].indexes
        if share * index.num_tokens > 0
    ]
