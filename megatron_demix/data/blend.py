"""A mixture and a token budget become what Megatron trains on.

`view`: the pool's tokens as one .bin and a small .idx whose pointers pick, repeat and order documents; another mixture costs
another .idx. `materialise`: plain .bin/.idx with the documents written out. `args`: weights and prefixes for Megatron's own
blending. The first two are exact to the document; Megatron takes samples and not documents, so the weights are those planned.

The order of the documents is shuffled and even at every scale: in any window of the blend, every domain's tokens differ from
its share by less than two times the longest document (by less than one from the start on; the manifest has what was reached).
GPTDataset shuffles once more when it trains.

A blend with prefix P consists of P.bin, P.idx, P.domains.npy (uint16: the domain of each document, by its place in the
manifest) and, written last, P.blend.json, the manifest. In mode args: P.args.txt, P.args.json and the manifest.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_demix import native
from megatron_demix.artifact import fingerprint, only_maker
from megatron_demix.data import blend_files
from megatron_demix.data.pool import Domain, OpenPool, Pool, Source, open_pool
from megatron_demix.data.quota import OnShortfall, fitting_target, quotas
from megatron_demix.data.source_digest import fingerprint_sources
from megatron_demix.errors import ConfigError, IncompatibleInputs, MixtureError, storage_errors
from megatron_demix.mixture import Mixture, apportion

Mode = Literal["view", "materialise", "args"]
HASH_NOTES = ".source_hashes"
MODES: tuple[Mode, ...] = ("view", "materialise", "args")

__all__ = ["BlendPlan", "Pool", "Source", "build_blend", "plan_blend"]


@dataclass(frozen=True)
class DomainPlan:
    """What one domain gives: `documents` of its shuffled stream from position `begin` on.

    share: as asked for; requested: that share of the target; planned: after limits, in tokens; tokens: of the documents, or,
    where they need not be whole, as planned.
    """

    domain: Domain
    share: float
    requested: int
    planned: int
    begin: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class BlendPlan:
    """Which documents make the blend. pool: of the domains that give any; the others are `dropped`.

    short: domains that have fewer tokens left than were asked of them; fits: where there are such, the largest target without.
    """

    pool: OpenPool
    seed: int
    target_tokens: int
    parts: tuple[DomainPlan, ...]
    dropped: tuple[str, ...]
    short: tuple[str, ...] = ()
    fits: int = 0

    @property
    def documents(self) -> int:
        return sum(p.documents for p in self.parts)

    @property
    def tokens(self) -> int:
        return sum(p.tokens for p in self.parts)

    def order(self) -> Order:
        return Order(self)


@dataclass(frozen=True)
class OrderPiece:
    """Some documents in their order. lengths: int32 [n] tokens; pointers: int64 [n] bytes in the pool; owners: uint16 [n], the
    place of each one's domain in the plan."""

    lengths: np.ndarray
    pointers: np.ndarray
    owners: np.ndarray


class Order:
    """The documents of a plan in their order, made piece by piece: memory does not grow with their number."""

    PIECE = 1 << 18

    def __init__(self, plan: BlendPlan) -> None:
        self._documents = plan.documents
        parts = [native.StreamPart(p.domain.stream(plan.seed), p.begin, p.documents, p.tokens) for p in plan.parts]
        self._interleaver = native.Interleaver(parts)

    def pieces(self, threads: int = 1) -> Iterator[tuple[int, OrderPiece]]:
        """(number of its first document, piece), once."""
        for first in range(0, self._documents, self.PIECE):
            n = min(self.PIECE, self._documents - first)
            piece = OrderPiece(np.empty(n, np.int32), np.empty(n, np.int64), np.empty(n, np.uint16))
            self._interleaver.next(piece.lengths, piece.pointers, piece.owners, threads=threads)
            yield first, piece

    @property
    def drift(self) -> list[tuple[int, int]]:
        """Of the pieces given so far: for each domain, how many tokens any prefix is ahead of and behind its share, at most."""
        return self._interleaver.drift


def plan_blend(
    pool: OpenPool,
    mixture: Mixture,
    target_tokens: int,
    *,
    seed: int,
    on_shortfall: OnShortfall = "error",
    begin: Mapping[str, tuple[int, int]] | None = None,
    whole_documents: bool = True,
    threads: int = 1,
) -> BlendPlan:
    """Choose whole documents: every domain within one document of its quota, the total at least the target (less only where
    "cap" cut it), by less than one document. Without whole_documents every domain gives its quota, of a part of its last one.

    begin: (documents, tokens) of each domain that earlier stages used. Raises MixtureError, ConfigError.
    """
    used_before = begin or {}
    taken = {name: tokens for name, (_, tokens) in used_before.items()}
    planned = quotas(pool.domains, mixture, target_tokens, on_shortfall, taken=taken)
    start = {name: used_before.get(name, (0, 0))[0] for name in planned}
    try:
        below = {
            name: pool.domains[name].stream(seed).advance(start[name], quota, pool.domains[name].tokens, threads=threads)
            for name, quota in planned.items()
        }
    finally:
        pool.check_still_there()
    if whole_documents:
        chosen = _whole(planned, below)
    else:
        chosen = {n: (documents + (tokens < planned[n]), planned[n]) for n, (documents, tokens, _) in below.items()}
    shares = mixture.over(list(pool.domains))
    requested = dict(zip(shares, apportion(target_tokens, list(shares.values())), strict=True))
    if not any(documents for documents, _ in chosen.values()):
        raise MixtureError(
            f"a blend of {target_tokens:,} tokens would hold none (on_shortfall=cap): its domains, {', '.join(planned)}, have "
            "no tokens left within their max_epochs. Leave it out, raise max_epochs, or give it other domains."
        )
    used = pool.only(n for n in planned if chosen[n][0])
    parts = tuple(DomainPlan(d, shares[n], requested[n], planned[n], start[n], *chosen[n]) for n, d in used.domains.items())
    dropped = tuple(n for n in pool.domains if n not in used.domains)
    short, fits = tuple(n for n in planned if planned[n] < requested[n]), fitting_target(pool.domains, mixture, taken)
    plan = BlendPlan(used, seed, target_tokens, parts, dropped, short, fits)
    if plan.documents >= 2**31:
        raise IncompatibleInputs(
            f"the blend has {plan.documents:,} documents; Megatron's GPTDataset numbers documents with int32 and holds "
            "2,147,483,647 at most. Build several blends and give Megatron their paths with equal weights."
        )
    return plan


def _whole(planned: Mapping[str, int], below: Mapping[str, tuple[int, int, int]]) -> dict[str, tuple[int, int]]:
    """(documents, tokens) of each domain. below: of the documents that fit into what is planned, and the next one's length."""
    chosen = {name: (documents, tokens) for name, (documents, tokens, _) in below.items()}
    missing = sum(planned.values()) - sum(tokens for _, tokens in chosen.values())
    # Largest remainder, in documents: who is owed most of its next document gets it, until the total is reached.
    owed = {name: (planned[name] - tokens) / max(next_length, 1) for name, (_, tokens, next_length) in below.items()}
    for name in sorted(owed, key=lambda n: -owed[n]):
        if missing <= 0:
            break
        documents, tokens, next_length = below[name]
        chosen[name] = (documents + 1, tokens + next_length)
        missing -= next_length
    return chosen


def build_blend(
    pool: Mapping[str, Source],
    mixture: Mixture,
    target_tokens: int,
    output: Path,
    *,
    mode: Mode = "view",
    seed: int,
    on_shortfall: OnShortfall = "error",
    begin: Mapping[str, tuple[int, int]] | None = None,
    pool_cache: Path | None = None,
    index_cache: Path | None = None,
    worker: tuple[int, int] | None = None,
    remember_hashes: bool = False,
    label: str | None = None,
    threads: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Build the blend with path prefix `output` and return its manifest.

    mixture: actual data shares, in trained tokens. target_tokens: what the run consumes, plus one for the last target; the
    blend has at least that many, by less than one document, so that GPTDataset starts no second epoch. Done before with the
    same inputs and settings: returns at once; interrupted: goes on.

    begin: (documents, tokens) of each domain that an earlier stage of a curriculum used; the blend goes on after them.
    pool_cache: a folder where views of one pool share its .bin. index_cache: the run's --data-cache-path, searched for stale
    indexes. worker: (i, n), one of n processes that write a materialised blend together, on any machines with one file
    system; the last to finish publishes, the others get a manifest whose "files" is empty. remember_hashes: note each source's
    hash in a hidden file beside it, or where that cannot be in a hidden folder beside `output`, and believe such notes; without
    it all lie in that folder, which a call that is not a worker's removes in the end. label: what warnings call it,
    where it will not stay at `output`.

    Raises MixtureError, ConfigError, IncompatibleInputs, CorruptInput, OutputExists, StorageError; then nothing at `output`
    has changed.
    """
    from megatron_demix.data.stale import warn_of_stale_indexes

    if worker is not None and (mode != "materialise" or not 0 <= worker[0] < worker[1]):
        raise ConfigError(
            f"worker is {worker[0]} of {worker[1]} in mode {mode}; expected 0 <= worker < n, and mode materialise."
        )
    if mode not in MODES:
        raise ConfigError(f"blend mode is {mode!r}, expected one of {', '.join(MODES)}.")
    threads = threads or native.default_threads()
    opened = open_pool(pool)
    plan = plan_blend(
        opened,
        mixture,
        target_tokens,
        seed=seed,
        on_shortfall=on_shortfall,
        begin=begin,
        whole_documents=mode != "args",
        threads=threads,
    )
    sources = [i for i, _ in plan.pool.indexes]
    output = Path(output)
    notes = output.parent / HASH_NOTES
    with storage_errors(f"writing blend {output}"):
        output.parent.mkdir(parents=True, exist_ok=True)
        # Of several workers one reads the sources, and the others its notes.
        with only_maker(output.with_name(f"{output.name}.hashes")):
            hashed = fingerprint_sources(sources, threads=threads, progress=progress, beside=remember_hashes, notes=notes)
    manifest = _manifest(plan, hashed, output, mode, on_shortfall)
    warn_of_stale_indexes(output, index_cache)
    _warn_of_other_shares(plan, mixture.over(list(pool)), label or f"blend {output}")
    written = blend_files.write(
        plan, manifest, output, threads=threads, progress=progress, worker=worker, pool_cache=pool_cache
    )
    if worker is None and not remember_hashes:
        shutil.rmtree(notes, ignore_errors=True)
    return written


_NOTICEABLE = 0.02
"""Of a share, by which it may differ from what was asked for; the report has the same bound."""


def _warn_of_other_shares(plan: BlendPlan, asked: Mixture, label: str) -> None:
    """Where a domain's documents are long for its part of the budget, or its epochs are limited."""
    given = {p.domain.name: p.tokens / plan.tokens for p in plan.parts}
    off = {n: given.get(n, 0.0) for n, share in asked.items() if abs(given.get(n, 0.0) - share) > _NOTICEABLE * share}
    if off:
        listed = ", ".join(f"{name} {share:.4g} instead of {asked[name]:.4g}" for name, share in off.items())
        why = "Documents are whole; a larger target, or shorter documents, would come nearer."
        if plan.short:
            fits = (
                f"a target of at most {plan.fits:,} tokens keeps the shares, and so does" if plan.fits else "what keeps them is"
            )
            why = f"{', '.join(plan.short)}: too few tokens within max_epochs for this target; {fits} a larger max_epochs."
        warnings.warn(f"{label}: the shares of its tokens are not those asked for: {listed}. {why}", stacklevel=3)


def _manifest(
    plan: BlendPlan, hashed: Sequence[Mapping[str, Any]], output: Path, mode: Mode, on_shortfall: OnShortfall
) -> dict[str, Any]:
    """What the blend is. hashed: what identifies each source, in the pool's order. No time and no absolute path: two runs of
    one study give the same bytes. Only the key of mode args depends on where the data lies, since that is what it gives."""
    sources, folder = iter(hashed), os.path.realpath(output.parent)
    domains = {
        p.domain.name: {
            "share": p.share,
            "requested_tokens": p.requested,
            "planned_tokens": p.planned,
            "tokens": p.tokens,
            "begin": p.begin,
            "documents": p.documents,
            "epochs": p.tokens / p.domain.tokens,
            "max_epochs": p.domain.max_epochs,
            "available_tokens": p.domain.tokens,
            "available_documents": p.domain.documents,
            "sources": [{"prefix": os.path.relpath(_real(i.prefix), folder), **next(sources)} for i in p.domain.indexes],
        }
        for p in plan.parts
    }
    identity = {
        "mode": mode,
        "seed": plan.seed,
        "on_shortfall": on_shortfall,
        "target_tokens": plan.target_tokens,
        "domains": domains,
    }
    paths = {}
    if mode == "args":
        planned = {p.domain.name: p.planned for p in plan.parts}
        paths = {"paths": blend_files.megatron_words(planned, plan.pool.domains)}
    return {
        "kind": "blend",
        "key": _key(identity | paths),
        "unit": "tokens",
        "tokens": plan.tokens,
        "documents": plan.documents,
        "pool": fingerprint([_contents(d) for d in domains.values()]),
        "dtype": str(plan.pool.dtype),
        "tokenizer": plan.pool.tokenizer,
        "dropped_domains": list(plan.dropped),
    } | identity


_IDENTITY = ("mode", "seed", "on_shortfall", "target_tokens", "domains")


def _key(identity: Mapping[str, Any]) -> str:
    """Of what decides a blend. The order of the domains counts, and where they lie does not."""
    domains = [[name, d | {"sources": _contents(d)}] for name, d in identity["domains"].items()]
    return fingerprint({**identity, "domains": domains})


def contradicts_itself(manifest: Mapping[str, Any]) -> bool:
    """Whether the manifest of a view or a materialised blend says something else than when it was written."""
    try:
        parts = manifest["domains"].values()
        totals = {what: sum(d[what] for d in parts) for what in ("tokens", "documents")}
        return _key({k: manifest[k] for k in _IDENTITY}) != manifest["key"] or any(
            manifest[what] != total for what, total in totals.items()
        )
    except (KeyError, TypeError, AttributeError):
        return True


def _real(prefix: Path) -> Path:
    """With no link among its folders: the relative path between two of them is as many folders up and down as it says."""
    return Path(os.path.realpath(prefix.parent), prefix.name)


def _contents(domain: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A domain's sources without their paths: moved data is the same data."""
    return [{k: v for k, v in s.items() if k != "prefix"} for s in domain["sources"]]
