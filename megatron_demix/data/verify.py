"""Reading a finished blend again, through Megatron's own IndexedDataset, and counting everything anew."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_demix import native
from megatron_demix.artifact import hash_file
from megatron_demix.data.blend import BlendPlan, DomainPlan, contradicts_itself
from megatron_demix.data.blend_data import DOMAINS_SUFFIX
from megatron_demix.data.blend_files import manifest_path, read_manifest
from megatron_demix.data.pool import Pool, Source, open_pool
from megatron_demix.data.source_digest import fingerprint_sources, hash_span
from megatron_demix.errors import ConfigError, DemixError, VerificationFailed
from megatron_demix.indexed.format import bin_path
from megatron_demix.indexed.reader import Index, read_index
from megatron_demix.progress import progress_bar

_BATCH_DOCUMENTS = 4096
_BATCH_TOKENS = 1 << 22


def verify_blend(prefix: Path | str, *, progress: bool = True) -> dict[str, Any]:
    """Count a view or materialised blend again and compare it with its manifest.

    Checks: sizes, digests, every pointer; documents and tokens of each domain; the content digest (materialised), or the hash
    that each source's .bin had (view). Where the sources still lie where the manifest says, the plan is made again from them
    and compared document by document. Returns the counts. Raises VerificationFailed naming the first difference, CorruptInput
    or ConfigError where there is no blend.
    """
    prefix = Path(prefix)
    manifest = read_manifest(prefix)
    if manifest is None:
        raise ConfigError(f"{manifest_path(prefix)} does not exist: {prefix} is not the prefix of a finished blend.")
    if manifest.get("mode") == "args":
        raise ConfigError(f"blend {prefix} consists of arguments for Megatron; it has no data of its own to verify.")
    if contradicts_itself(manifest):
        raise VerificationFailed(
            f"{manifest_path(prefix)} does not agree with its own key and totals: it was changed since the blend was built. "
            "Copy it again from its source, or build the blend again."
        )
    for suffix, facts in manifest["files"].items():
        if "blake2b" in facts and hash_file(Path(f"{prefix}{suffix}")) != facts["blake2b"]:
            raise VerificationFailed(f"{prefix}{suffix} has other bytes than when it was built. Build the blend again.")
    index = read_index(prefix)
    domain_of = np.load(f"{prefix}{DOMAINS_SUFFIX}", mmap_mode="r")
    names = list(manifest["domains"])
    if len(domain_of) != index.num_documents or (len(domain_of) and int(domain_of.max()) >= len(names)):
        raise VerificationFailed(f"{prefix}{DOMAINS_SUFFIX}: {len(domain_of)} entries for {index.num_documents} documents.")
    counted, content = _recount(prefix, index, domain_of, len(names), progress)
    for n, name in enumerate(names):
        expected = manifest["domains"][name]
        if counted[n] != (expected["documents"], expected["tokens"]):
            raise VerificationFailed(
                f"blend {prefix}: domain {name!r} has {counted[n][0]:,} documents and {counted[n][1]:,} tokens, expected "
                f"{expected['documents']:,} and {expected['tokens']:,}. Build the blend again."
            )
    if manifest["mode"] == "view":
        _check_pool(prefix, manifest, progress)
    elif f"{content:016x}" != manifest["content"]:
        raise VerificationFailed(
            f"blend {prefix}: content digest {content:016x}, expected {manifest['content']}: tokens changed since it was built."
        )
    sources = _compare_with_sources(prefix, manifest, index, domain_of, progress)
    index.check_still_there()
    return {
        "documents": index.num_documents,
        "tokens": index.num_tokens,
        "domains": {name: {"documents": counted[n][0], "tokens": counted[n][1]} for n, name in enumerate(names)},
        "sources": sources,
    }


def _recount(
    prefix: Path, index: Index, domain_of: np.ndarray, num_domains: int, progress: bool
) -> tuple[list[tuple[int, int]], int]:
    """Documents and tokens of each domain, and the content digest, as the stock reader sees them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron.core warns about every package it can do without
        from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    documents, tokens = np.zeros(num_domains, np.int64), np.zeros(num_domains, np.int64)
    content = 0
    with progress_bar(f"verifying {prefix.name}", len(dataset), unit="documents", enabled=progress) as advance:
        for start, end in _batches(index.lengths):
            batch = [dataset[i] for i in range(start, end)]
            lengths = np.array([len(document) for document in batch], np.int64)
            owner = domain_of[start : start + len(batch)]
            documents += np.bincount(owner, minlength=num_domains)
            np.add.at(tokens, owner, lengths)
            offsets = np.concatenate([[0], np.cumsum(lengths)]) * batch[0].itemsize
            joined = np.concatenate(batch).view(np.uint8)
            content += int(native.hash_documents(joined, offsets, start, step=1).sum(dtype=np.uint64))
            advance(len(batch))
    return list(zip(documents.tolist(), tokens.tolist(), strict=True)), content % 2**64


def _batches(lengths: np.ndarray) -> Iterator[tuple[int, int]]:
    """[begin, end) of the documents that are held at once: many short ones, few long ones."""
    begin = 0
    while begin < len(lengths):
        tokens = np.cumsum(lengths[begin : begin + _BATCH_DOCUMENTS], dtype=np.int64)
        end = begin + max(1, int(np.searchsorted(tokens, _BATCH_TOKENS, side="right")))
        yield begin, end
        begin = end


def _check_pool(prefix: Path, manifest: dict[str, Any], progress: bool) -> None:
    """A view's .bin is its sources' end to end: each part still has the hash that its source had."""
    base = 0
    path, size = bin_path(prefix), manifest["files"][".bin"]["bytes"]
    with open(path, "rb") as file, progress_bar(f"hashing {path.name}", size, unit="bytes", enabled=progress) as advance:
        for name, domain in manifest["domains"].items():
            for source in domain["sources"]:
                end = base + source["bin_bytes"]
                seen = hash_span(file.fileno(), base, source["bin_bytes"], threads=native.default_threads(), advance=advance)
                if seen != source["bin_hash64"]:
                    raise VerificationFailed(
                        f"{path}: bytes {base:,} to {end:,}, domain {name!r}, have hash {seen}, expected "
                        f"{source['bin_hash64']}: tokens changed since it was built. Build the blend again; if it shared its "
                        ".bin by --pool-cache, with another folder there."
                    )
                base = end


def _compare_with_sources(prefix: Path, manifest: dict[str, Any], index: Index, domain_of: np.ndarray, progress: bool) -> str:
    """ "compared", or why not: the sources are gone or have changed since."""
    pool = Pool(
        {
            name: Source(tuple(Path(prefix.parent, s["prefix"]) for s in d["sources"]), d["max_epochs"])
            for name, d in manifest["domains"].items()
        }
    )
    try:
        opened = open_pool(pool)
        for name, d in manifest["domains"].items():
            indexes = opened.domains[name].indexes
            hashed = fingerprint_sources(indexes, threads=native.default_threads(), progress=progress)
            for source, seen, noted in zip(indexes, hashed, d["sources"], strict=True):
                if seen != {k: v for k, v in noted.items() if k != "prefix"}:
                    return f"not compared: {source.prefix} has changed since"
    except DemixError as e:  # they fitted together when the blend was built
        return f"not compared: {e}"
    parts = tuple(
        DomainPlan(
            opened.domains[name],
            d["share"],
            d["requested_tokens"],
            d["planned_tokens"],
            d["begin"],
            d["documents"],
            d["tokens"],
        )
        for name, d in manifest["domains"].items()
    )
    plan = BlendPlan(opened, manifest["seed"], manifest["target_tokens"], parts, ())
    for first, piece in plan.order().pieces(native.default_threads()):
        opened.check_still_there()
        here = slice(first, first + len(piece.lengths))
        same = np.array_equal(piece.lengths, index.lengths[here]) and np.array_equal(piece.owners, domain_of[here])
        if manifest["mode"] == "view":
            same = same and np.array_equal(piece.pointers, index.pointers[here])
        if not same:
            raise VerificationFailed(f"blend {prefix}: its order of documents is not the one its sources and seed give.")
    return "compared"
