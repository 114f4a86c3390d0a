"""Data of rank_consistency.py: text that every installation of this project carries, and skills made up by rule.

Text domains are cut by document into training and evaluation text; held-out targets are kinds of text that no model is trained
on. A skill is a stream of problems, one a line, with new problems for evaluation.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "quickstart"))
import collect

from megatron_demix.errors import ConfigError

_EVALUATED = 10
"""One document in this many is kept for evaluation."""
_DOCUMENT_CHARS = 4000


@dataclass(frozen=True)
class EvalSet:
    """tokens: uint8 [windows, seq_length + 1]. counted: bool [windows, seq_length], the targets that are scored.

    problems: for a skill, int [targets] the problem each counted target belongs to; None for text.
    """

    name: str
    kind: str
    """in_domain, held_out, or skill."""
    tokens: np.ndarray
    counted: np.ndarray
    problems: np.ndarray | None = None

    @property
    def targets(self) -> np.ndarray:
        return self.tokens[:, 1:][self.counted].astype(np.int64)

    def scores(self, log_TV: np.ndarray) -> dict[str, float]:
        """From log-probabilities at the counted targets: bits per byte, and for a skill the share of problems answered without
        a wrong byte (each byte given the right ones before it)."""
        targets = self.targets
        bits = float(-log_TV[np.arange(len(targets)), targets].mean() / np.log(2))
        if self.problems is None:
            return {self.name: bits}
        wrong_P = np.bincount(self.problems, log_TV.argmax(axis=1) != targets)
        return {f"{self.name} bits": bits, f"{self.name} accuracy": float((wrong_P == 0).mean())}


@dataclass(frozen=True)
class Suite:
    """train: bytes by domain. nearest: for a text set, the domain that is most like it, chosen before anything was trained."""

    name: str
    train: dict[str, np.ndarray]
    sets: tuple[EvalSet, ...]
    nearest: dict[str, str]

    @property
    def domains(self) -> list[str]:
        return list(self.train)


# --- text -------------------------------------------------------------------------------------------------------------

_Text = Callable[[], Iterator[str]]


def _collected(domain: str) -> _Text:
    return lambda: (text for text, source in collect.DOMAINS[domain]() if not source.startswith("generated:"))


def _files(packages: Iterable[str], pattern: str) -> _Text:
    def texts() -> Iterator[str]:
        for package in packages:
            for path in sorted(_folder(package).rglob(pattern)):
                text = path.read_text(encoding="utf-8", errors="ignore")
                yield from (text[at : at + _DOCUMENT_CHARS] for at in range(0, len(text), _DOCUMENT_CHARS))

    return texts


def _licences() -> Iterator[str]:
    for path in sorted(_folder("numpy").parent.glob("*.dist-info/**/*LICENSE*")):
        if path.is_dir():
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        yield from (text[at : at + _DOCUMENT_CHARS] for at in range(0, len(text), _DOCUMENT_CHARS))


def _folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"the text of package {package!r} is part of this benchmark, and it is not installed: pip install {package}."
        )
    return Path(next(iter(spec.submodule_search_locations)))


TEXT: dict[str, _Text] = {
    "code": _collected("code"),
    "english": _collected("english"),
    "math": _collected("math"),
    "c": _collected("c"),
    "yaml": _files(["torchgen"], "*.yaml"),
}
HELD_OUT: dict[str, tuple[str, _Text]] = {
    "cython": ("code", _files(["scipy", "sklearn"], "*.pyx")),
    "cuda": ("c", _files(["torch"], "*.cuh")),
    "stubs": ("code", _files(["torch"], "*.pyi")),
    "licences": ("english", _licences),
    "rst": ("english", _files(["sklearn", "numpy"], "*.rst")),
}


def text_suite(seq_length: int, eval_windows: int, train_bytes: int) -> Suite:
    train, sets, nearest = {}, [], {}
    for name, texts in TEXT.items():
        train[name], evaluated = _split(name, texts(), train_bytes)
        sets.append(_windows(name, "in_domain", evaluated, seq_length, eval_windows))
        nearest[name] = name
    for name, (near, texts) in HELD_OUT.items():
        _, everything = _split(name, texts(), train_bytes, evaluated=1)
        sets.append(_windows(name, "held_out", everything, seq_length, eval_windows))
        nearest[name] = near
    return Suite("text", train, tuple(sets), nearest)


def _split(name: str, texts: Iterator[str], num_bytes: int, evaluated: int = _EVALUATED) -> tuple[np.ndarray, np.ndarray]:
    """Training and evaluation bytes; documents are told apart by a digest of their text, and repeated ones left out."""
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    seen, total = set(), 0
    for text in texts:
        data = text.encode()
        digest = hashlib.blake2b(data, digest_size=8).digest()
        if digest in seen or not data:
            continue
        seen.add(digest)
        parts[int.from_bytes(digest, "big") % evaluated == 0].append(data)
        total += len(data)
        if total >= num_bytes:
            break
    trained, held = (np.frombuffer(b"\n".join(part), np.uint8) for part in parts)
    return trained, held


def _windows(name: str, kind: str, data: np.ndarray, seq_length: int, num: int) -> EvalSet:
    """Windows at equal distances, every target counted. Raises ConfigError where they would overlap."""
    if len(data) < num * (seq_length + 1):
        raise ConfigError(
            f"{name}: this machine has {len(data)} bytes of such text to evaluate on, expected at least "
            f"{num * (seq_length + 1)}."
        )
    starts = np.linspace(0, len(data) - seq_length - 1, num).astype(int)
    tokens = np.stack([data[s : s + seq_length + 1] for s in starts])
    return EvalSet(name, kind, tokens, np.ones((num, seq_length), bool))


# --- skills -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difficulty:
    letters: int
    """Letters to sort, and letters to give the next one of."""
    digits: int
    """Of each number to add."""


def _next(rng: random.Random, d: Difficulty) -> tuple[str, str]:
    letters = [rng.randrange(15) for _ in range(d.letters)]
    return "".join(chr(97 + n) for n in letters) + ":", "".join(chr(98 + n) for n in letters)


def _sort(rng: random.Random, d: Difficulty) -> tuple[str, str]:
    letters = rng.sample("ABCDEFGHIJKLMNOP", d.letters)
    return "".join(letters) + ">", "".join(sorted(letters))


def _add_easy(rng: random.Random, d: Difficulty) -> tuple[str, str]:
    """No digit is carried."""
    pairs = [(a, rng.randint(0, 9 - a)) for a in (rng.randint(0, 9) for _ in range(d.digits))]
    left, right = ("".join(str(p[i]) for p in pairs) for i in (0, 1))
    return f"{left}+{right}=", f"{int(left) + int(right):0{d.digits + 1}d}"


def _add_hard(rng: random.Random, d: Difficulty) -> tuple[str, str]:
    """At least one digit is carried."""
    while True:
        left, right = (rng.randrange(10**d.digits) for _ in range(2))
        if any(left % 10**p + right % 10**p >= 10**p for p in range(1, d.digits + 1)):
            return f"{left:0{d.digits}d}+{right:0{d.digits}d}=", f"{left + right:0{d.digits + 1}d}"


SKILLS = {"next": _next, "sort": _sort, "add_easy": _add_easy, "add_hard": _add_hard}


def skill_suite(seq_length: int, eval_windows: int, train_bytes: int, difficulty: Difficulty) -> Suite:
    english, evaluated = _split("english", TEXT["english"](), train_bytes)
    train, sets = {"english": english}, [_windows("english", "in_domain", evaluated, seq_length, eval_windows)]
    for number, (name, make) in enumerate(SKILLS.items()):
        rng = random.Random(number)
        problems = (make(rng, difficulty) for _ in iter(int, 1))
        lines = b"".join(f"{q}{a}\n".encode() for q, a in islice(problems, train_bytes // 12))
        train[name] = np.frombuffer(lines, np.uint8)
        sets.append(_problems(name, make, random.Random(1000 + number), difficulty, seq_length, eval_windows))
    return Suite("skills", train, tuple(sets), {name: name for name in train})


def _problems(name: str, make, rng: random.Random, difficulty: Difficulty, seq_length: int, num: int) -> EvalSet:
    """Windows that begin with a problem; the answers of all problems that lie whole in them are counted."""
    tokens, counted, problems = np.empty((num, seq_length + 1), np.uint8), np.zeros((num, seq_length), bool), []
    count = 0
    for w in range(num):
        line, answers = b"", []
        while len(line) <= seq_length:
            question, answer = make(rng, difficulty)
            begin = len(line) + len(question)
            line += f"{question}{answer}\n".encode()
            if begin + len(answer) <= seq_length + 1:
                answers.append((begin, begin + len(answer)))
        tokens[w] = np.frombuffer(line[: seq_length + 1], np.uint8)
        for begin, end in answers:
            counted[w, begin - 1 : end - 1] = True  # target b is token b + 1
            problems += [count] * (end - begin)
            count += 1
    return EvalSet(name, "skill", tokens, counted, np.array(problems))
