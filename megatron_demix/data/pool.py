"""The pool: every domain's indexed data, checked to fit together, laid end to end in one address space of bytes."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np

from megatron_demix import native
from megatron_demix.artifact import read_json
from megatron_demix.errors import ConfigError, CorruptInput, IncompatibleInputs, MixtureError
from megatron_demix.indexed.format import bin_path, idx_path
from megatron_demix.indexed.reader import Index, read_index
from megatron_demix.mixture import tokens_of_epochs


@dataclass(frozen=True)
class Source:
    """One domain's indexed data: path prefixes without .bin/.idx, and how often it may be repeated.

    valid, test: held-out data, only passed on to Megatron by mode args.
    """

    prefixes: tuple[Path, ...]
    max_epochs: float = 4.0
    valid: tuple[Path, ...] = ()
    test: tuple[Path, ...] = ()


class Pool(dict[str, Source]):
    """Sources by domain."""

    @classmethod
    def read(cls, path: Path | str) -> Pool:
        """From pool.yaml: {domains: {code: {prefixes: [...], max_epochs: 4}}}, paths relative to the file. ConfigError."""
        from megatron_demix.yaml_file import read_yaml

        path = Path(path)
        data = read_yaml(path, f"pool {path}")
        domains = data.get("domains") if isinstance(data, dict) else None
        if not isinstance(domains, dict) or not domains:
            raise ConfigError(f"pool {path}: expected `domains: {{name: {{prefixes: [...], max_epochs: 4}}}}`.")
        pool = cls()
        for name, entry in domains.items():
            lists = ("prefixes", "valid", "test")
            if (
                not isinstance(entry, dict)
                or "prefixes" not in entry
                or set(entry) - {*lists, "max_epochs"}
                or not all(isinstance(entry.get(key, []), list) for key in lists)
                or not all(isinstance(prefix, str) for key in lists for prefix in entry.get(key, []))
            ):
                raise ConfigError(
                    f"pool {path}: domain {name!r} is {entry!r}, expected {{prefixes: [path, ...], max_epochs: number}}, and "
                    "perhaps valid: [...] and test: [...]."
                )
            limit = entry.get("max_epochs", Source.max_epochs)
            if isinstance(limit, bool) or not isinstance(limit, (int, float)):
                raise ConfigError(f"pool {path}: domain {name!r}: max_epochs is {limit!r}, expected a number > 0.")
            train, valid, test = (tuple(path.parent / p for p in entry.get(key, [])) for key in lists)
            pool[str(name)] = Source(train, float(limit), valid, test)
        return pool


@dataclass(frozen=True)
class Domain:
    """A domain of an opened pool. bases: where each index's .bin begins in the pool, in bytes."""

    name: str
    max_epochs: float
    indexes: tuple[Index, ...]
    bases: tuple[int, ...] = ()
    valid: tuple[Path, ...] = ()
    test: tuple[Path, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(i.num_tokens for i in self.indexes)

    @property
    def documents(self) -> int:
        """Those that have tokens to give: an empty one of Megatron's own data has no sequence."""
        return sum(i.num_sequences for i in self.indexes)

    @property
    def most_tokens(self) -> int:
        """The tokens a blend may take."""
        return tokens_of_epochs(self.tokens, self.max_epochs)

    def stream(self, seed: int) -> native.DocumentStream:
        """Its documents in the order that (seed, domain name) alone decides."""
        digest = hashlib.blake2b(f"{seed}/{self.name}".encode(), digest_size=8).digest()
        sources = [
            (i.lengths, i.pointers, base, 0 if i.is_view else i.dtype.itemsize)
            for i, base in zip(self.indexes, self.bases, strict=True)
        ]
        return native.DocumentStream(sources, int.from_bytes(digest, "little"))


@dataclass(frozen=True)
class OpenPool:
    """domains in the pool's order; dtype: of all tokens; tokenizer: fingerprint of all prepared data, "" if none says."""

    domains: dict[str, Domain]
    dtype: np.dtype
    tokenizer: str

    def only(self, names: Iterable[str]) -> OpenPool:
        """The pool of some of its domains, laid end to end anew."""
        return OpenPool(_laid_out([self.domains[name] for name in names]), self.dtype, self.tokenizer)

    @property
    def indexes(self) -> list[tuple[Index, int]]:
        """All indexes with their bases, in the pool's order."""
        return [pair for d in self.domains.values() for pair in zip(d.indexes, d.bases, strict=True)]

    @property
    def num_bytes(self) -> int:
        return sum(i.bin_bytes for i, _ in self.indexes)

    def check_still_there(self) -> None:
        """Raises CorruptInput if an index has become shorter, or its disk has failed, while documents were chosen by it."""
        for index, _ in self.indexes:
            index.check_still_there()

    def contents(self) -> PoolBytes:
        """Raises CorruptInput."""
        return PoolBytes([(i, base) for i, base in self.indexes if i.bin_bytes])


class PoolBytes:
    """The mapped .bin files of a pool. spans: the bytes (uint8) of each that is not empty, and its base."""

    def __init__(self, indexes: Sequence[tuple[Index, int]]) -> None:
        self._indexes, self._files = [index for index, _ in indexes], []
        for index in self._indexes:
            try:
                self._files.append(native.MappedFile(bin_path(index.prefix)))
            except OSError as e:
                raise CorruptInput(f"{bin_path(index.prefix)} cannot be read: {e.strerror}.") from e
        self.check_still_there()
        self.spans = [(file.data, base) for file, (_, base) in zip(self._files, indexes, strict=True)]

    def check_still_there(self) -> None:
        """Raises CorruptInput if a file has been cut short or its disk has failed: zeros may have been read in its place."""
        for index, file in zip(self._indexes, self._files, strict=True):
            path = bin_path(index.prefix)
            seen = path.stat().st_size if path.is_file() else 0
            if file.lost or file.data.size < index.bin_bytes or seen < index.bin_bytes:
                raise CorruptInput(
                    f"{path} has {seen:,} bytes, but had {index.bin_bytes:,} when the blend began: it became shorter, or its "
                    "disk failed, while it was read. Copy it again from its source, and leave it alone while a blend is built."
                )


def open_pool(pool: Mapping[str, Source]) -> OpenPool:
    """Read and check every index.

    Raises ConfigError (no prefix, one used twice, a bad limit), CorruptInput (an unreadable index), IncompatibleInputs
    (dtypes, tokenizers, documents of several sequences), MixtureError (an empty domain).
    """
    if not pool:
        raise ConfigError("pool: no domains. Give at least one domain with its prefixes.")
    opened: list[Domain] = []
    seen: dict[tuple[int, int], str] = {}
    for name, source in pool.items():
        if not source.prefixes:
            raise ConfigError(f"pool: domain {name!r} has no prefixes. Name its indexed data, or remove it.")
        if not (math.isfinite(source.max_epochs) and source.max_epochs > 0):
            raise ConfigError(f"pool: domain {name!r}: max_epochs is {source.max_epochs}, expected a finite number > 0.")
        indexes = []
        for prefix in source.prefixes:
            index = read_index(prefix)
            # Views of one pool may share its .bin.
            facts = os.stat((idx_path if index.is_view else bin_path)(prefix))
            file = (facts.st_dev, facts.st_ino)
            if file in seen:
                raise ConfigError(
                    f"pool: {prefix} is given twice, in domain {seen[file]!r} and {name!r}: it would be repeated."
                )
            seen[file] = name
            _check_usable(index)
            indexes.append(index)
        opened.append(Domain(name, source.max_epochs, tuple(indexes), valid=source.valid, test=source.test))
        if opened[-1].tokens == 0:
            raise MixtureError(f"pool: domain {name!r} is empty ({', '.join(map(str, source.prefixes))} hold no tokens).")
    domains = _laid_out(opened)
    return OpenPool(domains, _common_dtype(domains), _common_tokenizer(domains))


def _laid_out(domains: Sequence[Domain]) -> dict[str, Domain]:
    base, placed = 0, {}
    for domain in domains:
        bases = list(accumulate((i.bin_bytes for i in domain.indexes), initial=base))
        placed[domain.name] = replace(domain, bases=tuple(bases[:-1]))
        base = bases[-1]
    return placed


def _check_usable(index: Index) -> None:
    if index.dtype.kind not in "iu":
        raise IncompatibleInputs(f"{index.prefix}.idx holds {index.dtype} values, expected token ids (integers).")
    if index.has_several_sequences:
        raise IncompatibleInputs(
            f"{index.prefix} has {index.num_sequences} sequences in {index.num_documents} documents, expected one a document: "
            "GPTDataset shuffles sequences, so it would tear documents apart. If they are sentences, prepare the text again "
            "without --split-sentences; if they are texts that were packed together, write each as a document of its own."
        )


def _common_dtype(domains: Mapping[str, Domain]) -> np.dtype:
    first = next(iter(domains.values())).indexes[0]
    for domain in domains.values():
        for index in domain.indexes:
            if index.dtype != first.dtype:
                raise IncompatibleInputs(
                    f"domain {domain.name!r}: {index.prefix} holds {index.dtype} tokens, {first.prefix} {first.dtype}: "
                    "they were made for vocabularies of different sizes. Prepare both with one tokenizer."
                )
    return first.dtype


def _tokenizers_of(prefix: Path) -> list[str]:
    """The fingerprints noted beside the data, by the prepare step or in a blend's manifest; none for data made elsewhere."""
    from megatron_demix.data.blend_files import manifest_path

    for path in (Path(f"{prefix}.meta.json"), manifest_path(prefix)):
        facts = read_json(path) if path.is_file() else None
        if isinstance(facts, dict) and isinstance(found := facts.get("tokenizer"), str) and found:
            return [found, *facts.get("tokenizer_also", [])]
    return []


def _common_tokenizer(domains: Mapping[str, Domain]) -> str:
    common: list[str] = []
    before: Path | None = None
    for domain in domains.values():
        for index in domain.indexes:
            own = _tokenizers_of(index.prefix)
            if not own:
                continue
            if before and not set(common) & set(own):
                raise IncompatibleInputs(
                    f"domain {domain.name!r}: {index.prefix} was made with tokenizer {own[0]}, {before} with "
                    f"{common[0]}. Their ids mean different things: prepare both with one tokenizer."
                )
            common, before = [name for name in common or own if name in own], index.prefix
    return common[0] if common else ""
