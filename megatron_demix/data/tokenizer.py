"""Tokenizers: one folder format and one class for every kind, whatever library encodes.

A folder holds `meta.json` ({"type", "vocab_size", "eod_id"}) and, except for type byte, the tokenizer's own file under the
name its library expects: tokenizer.json, tokenizer.model or <encoding>.tiktoken; of type gpt2 a
vocab.json and a merges.txt.
"""

from __future__ import annotations

import heapq
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_demix.artifact import fingerprint, read_json, write_json
from megatron_demix.data import vocabularies
from megatron_demix.data.engines import Engine, agrees, probe
from megatron_demix.data.inputs import BadDocuments, Documents, read_documents
from megatron_demix.data.text import TextBatch
from megatron_demix.errors import ConfigError, CorruptInput, storage_errors
from megatron_demix.study.data import TokenizerSpec

META = "meta.json"


class Tokenizer:
    """Text to ids. `eod_id` ends a document; ids are below `vocab_size`.

    engine: "auto" encodes with gigatoken where it gives the very ids the tokenizer's own library gives on engines.probe, else
    with that library; "reference" always with that library.
    """

    def __init__(self, vocabulary: vocabularies.Vocabulary, *, engine: str = "auto") -> None:
        self._vocabulary, self._engine_wanted = vocabulary, engine
        self.type = vocabulary.type
        self.vocab_size = vocabulary.vocab_size
        self.eod_id = vocabulary.eod_id
        if not 0 <= self.eod_id < self.vocab_size:
            raise CorruptInput(f"tokenizer {vocabulary.name}: end-of-document id {self.eod_id} is not below {self.vocab_size}.")

    @property
    def fingerprint(self) -> str:
        """Equal exactly for tokenizers of one kind with the same file and the same end-of-document id."""
        return self.fingerprints[0]

    @property
    def fingerprints(self) -> list[str]:
        """Its own first, then those of the same file under other types: a tokenizer.json is bpe where it was trained, elsewhere
        huggingface."""
        types = sorted(vocabularies.same_kind(self.type), key=lambda name: name != self.type)
        return [fingerprint([name, self.vocab_size, self.eod_id, self._vocabulary.digest]) for name in types]

    @cached_property
    def pieces(self) -> list[bytes]:
        """The UTF-8 bytes each id stands for; none for special tokens."""
        pieces = [b""] * self.vocab_size
        for token, raw in self._vocabulary.pieces().items():
            pieces[token] = raw
        pieces[self.eod_id] = b""
        return pieces

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: how many UTF-8 bytes each id stands for; 0 for special tokens."""
        return np.array([len(piece) for piece in self.pieces], np.int32)

    @cached_property
    def _engine(self) -> Engine:
        reference = self._vocabulary.reference_engine()
        fast = self._vocabulary.fast_engine() if self._engine_wanted == "auto" else None
        if fast is not None and agrees(fast, reference, TextBatch.of(probe(self._vocabulary.added_tokens()))):
            return fast
        return reference

    @property
    def engine_name(self) -> str:
        return getattr(self._engine, "__qualname__", "").split("_engine")[0]

    def encode_batch(self, texts: TextBatch | Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids (uint32 [N]) of all documents end to end, without end-of-document, and offsets (int64 [D + 1]) into them.

        Raises CorruptInput if an id is outside the vocabulary.
        """
        ids, offsets = self._engine(texts if isinstance(texts, TextBatch) else TextBatch.of(texts))
        if ids.size and (top := int(ids.max())) >= self.vocab_size:
            raise CorruptInput(f"tokenizer {self._vocabulary.name}: gave id {top}, but has {self.vocab_size} ids.")
        return ids, offsets


def load_tokenizer(source: Path | str | TokenizerSpec, *, engine: str = "auto") -> Tokenizer:
    """A tokenizer from a folder written by train_tokenizer, or from a spec of a type that needs no training.

    Raises ConfigError where a file is absent or of the wrong kind, CorruptInput where it cannot be read.
    """
    if isinstance(source, TokenizerSpec):
        if source.type == "bpe":
            raise ConfigError("tokenizer type 'bpe' is trained on text: give the folder train_tokenizer wrote.")
        return Tokenizer(vocabularies.load(source.type, source.model), engine=engine)
    folder = Path(source)
    if not (folder / META).is_file():
        raise ConfigError(f"tokenizer {folder}: no {META} there; expected a folder written by the prepare stage.")
    meta = read_json(folder / META)
    tokenizer = Tokenizer(vocabularies.load(meta.get("type"), _file_in(folder, meta), eod_id=meta.get("eod_id")), engine=engine)
    if tokenizer.vocab_size != meta.get("vocab_size"):
        raise CorruptInput(
            f"tokenizer {folder}: {META} says {meta.get('vocab_size')} ids, its file has {tokenizer.vocab_size}. Make it again."
        )
    return tokenizer


def _file_in(folder: Path, meta: Mapping[str, Any]) -> Path | None:
    name = meta.get("file")
    if name is None:
        return None
    if not (folder / name).is_file():
        raise CorruptInput(f"tokenizer {folder}: {name} is missing. Make the tokenizer again.")
    return folder / name


def train_tokenizer(
    spec: TokenizerSpec,
    samples: Mapping[str, Sequence[Path]],
    output: Path,
    *,
    json_key: str | Mapping[str, str] = "text",
    on_bad_document: BadDocuments = "error",
) -> None:
    """Write the tokenizer's folder: trained on the domains' text (type bpe), or copied from spec.model.

    samples: text inputs by domain; each gives the same number of bytes, spec.train_bytes in all. json_key: for all domains,
    or by domain. The result depends on the text and the spec only. Raises ConfigError, CorruptInput, StorageError.
    """
    output = Path(output)
    with storage_errors(f"writing tokenizer {output}"):
        output.mkdir(parents=True, exist_ok=True)
        if spec.type == "bpe":
            file: Path | None = output / "tokenizer.json"
            text = _sample(spec, samples, json_key, on_bad_document)
            (output / "tokenizer.json").write_text(vocabularies.train_bpe(text, spec.train_vocab_size))
        else:
            file = _copy(spec, output)
    tokenizer = Tokenizer(vocabularies.load(spec.type, file))
    meta = {"type": spec.type, "vocab_size": tokenizer.vocab_size, "eod_id": tokenizer.eod_id}
    write_json(output / META, meta | ({"file": file.name} if file else {}))


def source_files(type: str, model: Path) -> list[Path]:
    """What a tokenizer is copied from: its file, and those beside it that count. Raises ConfigError."""
    source = vocabularies.find_file(type, model)
    beside = [source.parent / name for name in ("tokenizer_config.json", f"{source.name}.json")]
    if type == "gpt2":
        beside = [vocabularies.find_file(type, vocabularies.merges_beside(source))]
    return [source, *(file for file in beside if file.is_file())]


def _copy(spec: TokenizerSpec, output: Path) -> Path | None:
    if spec.model is None:
        return None
    source, *beside = source_files(spec.type, spec.model)
    target = output / vocabularies.FILE_NAMES.get(spec.type, source.name)
    shutil.copyfile(source, target)
    for file in beside:
        shutil.copyfile(file, output / file.name)
    return target


def _lowest(batches: Iterable[Documents], quota: int) -> list[bytes]:
    """Different documents, by their hashes: the lowest ones that hold `quota` bytes together, or all. Each is cut at the quota,
    so that no more than two quotas are held at any time."""
    from megatron_demix import native

    highest_first: list[tuple[int, bytes]] = []
    held, size, bound = set[int](), 0, 2**64 - 1
    for text in (batch.text for batch in batches):
        hashes = native.hash_documents(text.content, text.offsets, 0)
        for number in np.flatnonzero(hashes <= np.uint64(bound)).tolist():
            key = int(hashes[number])
            if key > bound or key in held:
                continue
            begin, end = text.offsets[number : number + 2].tolist()
            document = text.content[begin : min(end, begin + quota)].tobytes()
            heapq.heappush(highest_first, (-key, document))
            held.add(key)
            size += len(document)
            while highest_first and size - len(highest_first[0][1]) >= quota:
                bound = -highest_first[0][0]
                size -= len(heapq.heappop(highest_first)[1])
                held.remove(bound)
    return [document for _, document in sorted(highest_first, reverse=True)]


def _sample(
    spec: TokenizerSpec,
    samples: Mapping[str, Sequence[Path]],
    json_key: str | Mapping[str, str],
    on_bad_document: BadDocuments,
) -> bytes:
    """An even sample of every domain's documents, chosen by their content so that it does not depend on their order."""
    if not samples:
        raise ConfigError("tokenizer type 'bpe' needs text to be trained on, and no domain has text inputs.")
    quota = spec.train_bytes // len(samples)
    pieces: list[bytes] = []
    for name, paths in samples.items():
        key = json_key if isinstance(json_key, str) else json_key.get(name, "text")
        taken = 0
        for document in _lowest(read_documents(paths, json_key=key, on_bad_document=on_bad_document), quota):
            pieces.append(document[: quota - taken])
            taken += len(pieces[-1])
        if taken < quota:
            warnings.warn(
                f"tokenizer: domain {name!r} has {taken} bytes of different documents, fewer than its part of train_bytes, "
                f"{quota}: it counts less than others. Give it more text, or train on fewer bytes.",
                stacklevel=3,
            )
    text = b"\n".join(pieces)
    if not text.strip():
        raise ConfigError(f"tokenizer: the text of {', '.join(samples)} is empty; there is nothing to train on.")
    return text
