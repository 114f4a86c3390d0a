"""The kinds of tokenizer files: how each is found, loaded, and what its ids stand for."""

from __future__ import annotations

import base64
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_demix.artifact import fingerprint, hash_file, read_json
from megatron_demix.data import engines
from megatron_demix.data.engines import Engine
from megatron_demix.errors import ConfigError, CorruptInput, DemixError
from megatron_demix.terminal import silent

FILE_NAMES = {"bpe": "tokenizer.json", "huggingface": "tokenizer.json", "sentencepiece": "tokenizer.model"}
_PATTERNS = {"tiktoken": "*.tiktoken", "gpt2": "*vocab.json"}
"""Of kinds whose files keep their names."""
EOD = "<|endoftext|>"
# What tokenizers of the field call the token that ends a document, where no tokenizer_config.json says so.
EOD_NAMES = (EOD, "<|end_of_text|>", "<|endofdoc|>", "<EOD>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<｜end▁of▁sentence｜>")


class Vocabulary(ABC):
    """A loaded tokenizer file."""

    type: str
    name: str
    digest: str
    vocab_size: int
    eod_id: int

    @abstractmethod
    def reference_engine(self) -> Engine:
        """The tokenizer's own library."""

    def fast_engine(self) -> Engine | None:
        """gigatoken, where it can load the file."""
        return None

    def added_tokens(self) -> list[str]:
        """Those that are found in text before the rest of it is cut into pieces, as they are spelled."""
        return []

    @abstractmethod
    def pieces(self) -> Mapping[int, bytes]:
        """The bytes of each ordinary id; special tokens may be left out."""


def load(kind: str | None, file: Path | None, *, eod_id: int | None = None) -> Vocabulary:
    """Raises ConfigError on an unknown kind or absent file, CorruptInput on one that cannot be read."""
    if kind == "byte":
        return Bytes()
    if kind not in _KINDS:
        raise ConfigError(f"tokenizer type {kind!r} is not one of byte, {', '.join(_KINDS)}.")
    if file is None:
        raise ConfigError(f"tokenizer type {kind!r} needs a file: give `model`.")
    return _KINDS[kind](kind, find_file(kind, Path(file)), eod_id)


def same_kind(kind: str) -> list[str]:
    """All names of what `kind` names."""
    return [name for name, loaded in _KINDS.items() if loaded is _KINDS.get(kind)] or [kind]


def find_file(kind: str, path: Path) -> Path:
    """The tokenizer's file: `path` itself, or within the folder `path`."""
    if path.is_dir():
        name = _PATTERNS.get(kind) or FILE_NAMES[kind]
        path = next(iter(sorted(c for c in path.glob(name) if c.is_file())), path / name)
    if not path.is_file():
        raise ConfigError(f"tokenizer type {kind!r}: {path} does not exist. Correct `model`.")
    return path


class Bytes(Vocabulary):
    """256 bytes, then end-of-document."""

    type, name, digest, vocab_size, eod_id = "byte", "byte", "", 257, 256

    def reference_engine(self) -> Engine:
        return engines.byte_engine

    def pieces(self) -> Mapping[int, bytes]:
        return {i: bytes([i]) for i in range(256)}


class HuggingFace(Vocabulary):
    """A tokenizer.json."""

    def __init__(self, kind: str, file: Path, eod_id: int | None) -> None:
        self.digest = hash_file(file)
        self._load(kind, file, lambda: file.read_text(encoding="utf-8"), "a Hugging Face tokenizer.json")
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.eod_id = _find_eod(vocabulary, file, _configured_eod(file.parent)) if eod_id is None else eod_id

    def _load(self, kind: str, file: Path, read: Callable[[], str], what: str) -> None:
        from tokenizers import Tokenizer

        self.type, self.name = kind, str(file)
        try:
            self._json = read()
            self._tokenizer = Tokenizer.from_str(self._json)
        except DemixError:
            raise
        except Exception as e:  # the library raises a bare Exception
            raise CorruptInput(f"tokenizer {file}: not {what} ({e}).") from e
        # A file keeps those of whoever saved it last, and documents are whole.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def reference_engine(self) -> Engine:
        return engines.huggingface_engine(self._tokenizer)

    def fast_engine(self) -> Engine | None:
        return _gigatoken(lambda gigatoken: gigatoken.Tokenizer.from_json(engines.without_special_tokens(self._json)))

    def added_tokens(self) -> list[str]:
        return [token["content"] for token in json.loads(self._json).get("added_tokens") or []]

    def pieces(self) -> Mapping[int, bytes]:
        data = json.loads(self._json)
        special = {t["id"] for t in data.get("added_tokens") or [] if t.get("special")}
        spelled = {i: t for t, i in self._tokenizer.get_vocab(with_added_tokens=True).items() if i not in special}
        if _uses_byte_level(data):
            return {i: _from_byte_level(t) for i, t in spelled.items()}
        return {i: _from_sentencepiece(t) for i, t in spelled.items()}


class GPT2(HuggingFace):
    """GPT-2's vocab.json and merges.txt, or others like them, with the ids that Megatron's own GPT2BPETokenizer gives; from
    megatron.core 0.15 on that is transformers', which also reads <|endoftext|> in text as the token.

    merges: by default beside the file, whose name has "merges" for "vocab" and ends in .txt.
    """

    def __init__(self, kind: str, file: Path, eod_id: int | None, merges: Path | None = None) -> None:
        merges = find_file(kind, merges or merges_beside(file))
        self.digest = fingerprint([hash_file(file), hash_file(merges)])
        self._load(kind, file, lambda: _gpt2_json(file, merges), f"a vocabulary that {merges} makes tokens of")
        self.eod_id = _find_eod(self._tokenizer.get_vocab(), file, EOD) if eod_id is None else eod_id


def merges_beside(vocabulary: Path) -> Path:
    return vocabulary.with_name(vocabulary.stem.replace("vocab", "merges") + ".txt")


def _gpt2_json(file: Path, merges: Path) -> str:
    """A tokenizer.json of the two files. Raises ConfigError, CorruptInput, and what the library raises."""
    vocabulary = read_json(file)
    if missing := [c for c in (EOD, *_FROM_BYTE_LEVEL) if c not in vocabulary]:
        raise CorruptInput(
            f"tokenizer {file}: has no {missing[0]!r}, expected GPT-2's spelling of all 256 bytes, and {EOD}, which ends a "
            "document. Give the vocab.json that belongs to the merges."
        )
    first, *lines = merges.read_text(encoding="utf-8").split("\n")
    last = lines.pop() if lines else ""
    if not first.startswith("#version") or last:
        seen = f"begins with {first!r}" if not first.startswith("#version") else f"ends with {last!r} and no line break"
        raise ConfigError(
            f"tokenizer {merges}: {seen}. Megatron passes over the first line, expected '#version: 0.2', and over what comes "
            "after the last line break; other readers do not. Write the file so that neither is a merge."
        )
    pairs = []
    for line in filter(str.strip, lines):
        left, _, right = line.strip().partition(" ")
        if not right or " " in right:
            raise CorruptInput(f"tokenizer {merges}: {line!r} is no pair of tokens. Copy the file again from its source.")
        pairs.append((left, right))
    return _byte_level_bpe(vocabulary, pairs)


class SentencePiece(Vocabulary):
    """A SentencePiece .model. gigatoken reads control symbols in text as tokens, so its own library encodes."""

    def __init__(self, kind: str, file: Path, eod_id: int | None) -> None:
        sentencepiece = _import("sentencepiece")
        self.type, self.name, self.digest = kind, str(file), hash_file(file)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (OSError, RuntimeError) as e:
            raise CorruptInput(f"tokenizer {file}: not a SentencePiece model ({e}).") from e
        self.vocab_size = self._processor.get_piece_size()
        self.eod_id = self._processor.eos_id() if eod_id is None else eod_id
        if self.eod_id < 0:
            raise ConfigError(f"tokenizer {file}: the model has no end-of-sentence piece, so nothing could end a document.")

    def reference_engine(self) -> Engine:
        return engines.sentencepiece_engine(self._processor)

    def pieces(self) -> Mapping[int, bytes]:
        p = self._processor
        ordinary = (i for i in range(self.vocab_size) if not (p.is_control(i) or p.is_unknown(i) or p.is_unused(i)))
        return {i: _from_sentencepiece(p.id_to_piece(i)) for i in ordinary}


class Tiktoken(Vocabulary):
    """A .tiktoken file of ranks. How text is cut before the ranks apply is not in the file: it follows from a name that
    OpenAI publishes (cl100k_base, o200k_base, ...), or from `<file>.json`: {"pattern": ..., "special_tokens": {...}}."""

    def __init__(self, kind: str, file: Path, eod_id: int | None) -> None:
        tiktoken = _import("tiktoken")
        self.type, self.name, self._file = kind, str(file), file
        self._ranks = _read_ranks(file)
        sidecar = file.with_name(f"{file.name}.json")
        if sidecar.is_file():
            described = read_json(sidecar)
            pattern, special = described.get("pattern"), described.get("special_tokens") or {EOD: max(self._ranks.values()) + 1}
        else:
            pattern, special = _published_encoding(file, self._ranks)
        self.digest = fingerprint([hash_file(file), pattern, special])
        try:
            self._encoding = tiktoken.Encoding(file.stem, pat_str=pattern, mergeable_ranks=self._ranks, special_tokens=special)
        except Exception as e:  # an invalid pattern raises the regex engine's own error
            raise CorruptInput(f"tokenizer {file}: tiktoken refuses it ({e}).") from e
        self.vocab_size = self._encoding.max_token_value + 1
        self.eod_id = _find_eod(special, file, None) if eod_id is None else eod_id

    def reference_engine(self) -> Engine:
        return engines.tiktoken_engine(self._encoding)

    def fast_engine(self) -> Engine | None:
        if self._file.with_name(f"{self._file.name}.json").is_file():
            return None
        return _gigatoken(lambda gigatoken: gigatoken.Tokenizer.from_tiktoken(self._file, special_tokens={}))

    def pieces(self) -> Mapping[int, bytes]:
        return {rank: token for token, rank in self._ranks.items()}


_KINDS: dict[str, type[HuggingFace] | type[SentencePiece] | type[Tiktoken]] = {
    "bpe": HuggingFace,
    "huggingface": HuggingFace,
    "gpt2": GPT2,
    "sentencepiece": SentencePiece,
    "tiktoken": Tiktoken,
}


def train_bpe(text: bytes, vocab_size: int) -> str:
    """A tokenizer.json: byte-level BPE with GPT-2's pre-tokenizer, ids 0-255 the bytes, then merges, last end-of-document."""
    import gigatoken

    with silent():
        vocabulary, merges = gigatoken.train_bpe(text, vocab_size - 1, [])
    spelled = {_to_byte_level(token): i for i, token in vocabulary.items()}
    return _byte_level_bpe(spelled, [(_to_byte_level(a), _to_byte_level(b)) for a, b in merges])


def _byte_level_bpe(vocabulary: dict[str, int], merges: Sequence[tuple[str, str]]) -> str:
    """A tokenizer.json with GPT-2's pre-tokenizer; end-of-document has the next id where it has none."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOD, special=True, normalized=False)])
    return tokenizer.to_str(pretty=True)


def _gigatoken(load_with: Any) -> Engine | None:
    import gigatoken

    try:
        return engines.gigatoken_engine(lambda: load_with(gigatoken))
    except Exception:  # an unsupported tokenizer: its own library encodes instead
        return None


def _import(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise ConfigError(f"{name} is not installed: pip install 'megatron-demix[data]'.") from e


def _configured_eod(folder: Path) -> str | None:
    """eos_token of a tokenizer_config.json."""
    path = folder / "tokenizer_config.json"
    token = read_json(path).get("eos_token") if path.is_file() else None
    return token.get("content") if isinstance(token, dict) else token


def _find_eod(vocabulary: Mapping[str, int], file: Path, configured: str | None) -> int:
    names = (configured,) if configured else EOD_NAMES
    for name in names:
        if name in vocabulary:
            return vocabulary[name]
    raise ConfigError(
        f"tokenizer {file}: none of {', '.join(map(str, names))} is in the vocabulary, so nothing could end a document. "
        "Name it as eos_token in a tokenizer_config.json beside the file."
    )


def _read_ranks(file: Path) -> dict[bytes, int]:
    try:
        lines = [line.split() for line in file.read_bytes().splitlines() if line.strip()]
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError as e:
        raise CorruptInput(f"tokenizer {file}: expected a base64 token and its rank on every line ({e}).") from e


def _published_encoding(file: Path, ranks: dict[bytes, int]) -> tuple[str, dict[str, int]]:
    """Split pattern and special tokens of the encoding that tiktoken itself knows under the file's name."""
    from unittest.mock import patch

    from tiktoken_ext import openai_public

    known = openai_public.ENCODING_CONSTRUCTORS
    if file.stem not in known:
        raise ConfigError(
            f"tokenizer {file}: no encoding is called {file.stem!r} (known: {', '.join(known)}), and {file}.json does not "
            'exist. Write it: {"pattern": "<split regex>", "special_tokens": {"<|endoftext|>": id}}.'
        )
    # The constructors would download the ranks that we already have.
    with patch.object(openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks):
        facts = known[file.stem]()
    return facts["pat_str"], facts["special_tokens"]


def _uses_byte_level(data: Any) -> bool:
    """Whether a tokenizer.json spells bytes as GPT-2 does: a ByteLevel step anywhere in its pre-tokenizer or decoder."""
    if isinstance(data, dict):
        return data.get("type") == "ByteLevel" or any(
            _uses_byte_level(data.get(k)) for k in ("pre_tokenizer", "decoder", "pretokenizers", "decoders")
        )
    return any(map(_uses_byte_level, data)) if isinstance(data, list) else False


def _byte_level_alphabet() -> dict[int, str]:
    """GPT-2's spelling of each byte: itself where it prints, else the next unused character from U+0100 on."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printing]
    return {b: chr(b) for b in printing} | {b: chr(0x100 + i) for i, b in enumerate(others)}


_TO_BYTE_LEVEL = _byte_level_alphabet()
_FROM_BYTE_LEVEL = {c: b for b, c in _TO_BYTE_LEVEL.items()}


def _to_byte_level(token: bytes) -> str:
    return "".join(_TO_BYTE_LEVEL[b] for b in token)


def _from_byte_level(token: str) -> bytes:
    if all(c in _FROM_BYTE_LEVEL for c in token):
        return bytes(_FROM_BYTE_LEVEL[c] for c in token)
    return token.encode()  # an added token, spelled as it is


def _from_sentencepiece(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()
