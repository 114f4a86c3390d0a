"""Exact and near duplicates, within and across domains: datatrove's steps, the document that comes first being kept."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from megatron_demix.data.clean.trove import (
    Document,
    ExactDedupConfig,
    HashConfig,
    MinhashConfig,
    PipelineStep,
    TextNormConfig,
)
from megatron_demix.study.data import NearDuplicatesSpec

# SHA-1, because datatrove 0.10 hands strings to xxhash, which takes bytes only from its version 4 on.
HASH = HashConfig(precision=64, hash_fc="sha1")


def exact_config(domains: list[str]) -> ExactDedupConfig:
    return ExactDedupConfig(content_getter=_text, document_priority=_Priority(domains), hash_config=HASH)


def _text(document: Document) -> str:
    return document.text


class _Priority:
    """Of documents with one text, the one of the domain named first stays: datatrove keeps the highest of 1 ... 65535."""

    def __init__(self, domains: list[str]) -> None:
        self.ranks = {domain: 65535 - number for number, domain in enumerate(domains)}

    def __call__(self, document: Document) -> int:
        return self.ranks[document.metadata["domain"]]


def near_config(spec: NearDuplicatesSpec) -> MinhashConfig:
    # datatrove's default makes every number a 0: all sums and products of a domain of arithmetic would be one document.
    norm = TextNormConfig(norm_numbers=False)
    return MinhashConfig(spec.ngram, spec.bands, spec.hashes, seed=1, norm_config=norm, hash_config=HASH)


def signature_bytes(spec: NearDuplicatesSpec) -> int:
    """Of one document in one band, as MinhashDedupSignature writes it: the hashes and the document's number."""
    return struct.calcsize(f"<{spec.hashes}{HASH.struct_format}I")


class KeepFirst(PipelineStep):
    """Rewrites what MinhashDedupCluster (with save_cluster_id) would remove: all of a cluster but its first document, in the
    order of the sources. datatrove keeps whichever its union-find ends with, so a later domain could win over an earlier."""

    type, name = "🫂 - DEDUP", "first of each cluster"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        seen: set[int] = set()
        for clusters in sorted(self.folder.glob("*.clusters")):
            removed = []
            for document, cluster in struct.iter_unpack("<II", clusters.read_bytes()):
                if cluster in seen:
                    removed.append(document)
                seen.add(cluster)
            target = clusters.with_suffix(".remove")
            target.write_bytes(struct.pack(f"<{len(removed)}I", *removed)) if removed else target.unlink(missing_ok=True)
