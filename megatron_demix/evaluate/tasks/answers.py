"""Whether a generated answer is right: final numbers, formulas in \\boxed{}, and code that has to pass tests."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from megatron_demix.errors import ConfigError, StageFailed
from megatron_demix.evaluate.tasks import sandbox

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")


def final_number(text: str) -> Decimal | None:
    """The number behind the first ####, where GSM8K puts the answer; without it the last number there is."""
    _, mark, answer = text.partition("####")
    numbers = _NUMBER.findall(answer.strip().splitlines()[0] if mark and answer.strip() else "" if mark else text)
    if not numbers:
        return None
    try:
        return Decimal((numbers[0] if mark else numbers[-1]).replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None


def boxed(text: str) -> str | None:
    """What stands in the last \\boxed{} or \\fbox{} (or behind `\\boxed `), braces matched; None where there is none."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    rest = text[start:].split("box" if text.startswith("\\fbox", start) else "boxed", 1)[1]
    rest = rest.lstrip()
    if not rest.startswith("{"):
        words = rest.split("$")[0].split()
        return words[0] if words else None
    depth = 0
    for i, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:i]
    return None


def normalised(formula: str) -> str:
    """Without what does not change a formula's value: blanks, sizes of brackets, units in text, degree and dollar signs."""
    formula = re.sub(r"\s+", " ", formula)
    formula = re.sub(r"\\(?:left|right|[!,:; ]|quad|qquad|displaystyle)(?![a-zA-Z])", "", formula)
    formula = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", formula)
    formula = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", formula)
    formula = re.sub(r"\^\{?\\circ\}?|\\degree|\\?\$|\\?%", "", formula)
    if only_text := re.fullmatch(r"\s*\\(?:text|mbox|mathrm)\{([^{}]*)\}\s*\.?\s*", formula):
        formula = only_text[1]
    # A unit: text that ends the formula, behind a number. Any other text may be what tells two answers apart.
    formula = re.sub(r"(?:(?<=\d)|(?<=\d\}))\s*\\(?:text|mbox)\{[^{}]*\}\s*(?=\.?\s*$)", "", formula)
    formula = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", formula)
    formula = re.sub(r"\s+", "", formula).rstrip(".")
    return re.sub(r"^(-?)0?\.(?=\d)", r"\g<1>0.", formula)


@dataclass(frozen=True)
class Judgement:
    """stopped: running or comparing the answer hung, or ended the process that did it; such an answer is wrong."""

    right: bool
    stopped: bool = False


class Judge:
    """Judges answers, and remembers them: many proxies give the same ones.

    kind: as in tasks.formats. workers: processes that judge side by side. Raises ConfigError where a kind needs what is
    missing.
    """

    def __init__(self, kind: str, *, timeout_s: float, workers: int) -> None:
        self._kind, self._timeout_s, self._workers = kind, timeout_s, workers
        self._known: dict[bytes, Judgement] = {}
        if kind == "formula":
            self._told([])

    def judge(self, answers: Sequence[str], references: Sequence[Mapping[str, str]]) -> list[Judgement]:
        """references: the item's, for each answer (see tasks.formats)."""
        asked = list(zip(answers, references, strict=True))
        names = [_name(*pair) for pair in asked]
        new = {name: pair for name, pair in zip(names, asked, strict=True) if name not in self._known}
        given = list(new.values())
        if self._kind == "number":
            judged = [Judgement(_same_number(answer, reference["answer"])) for answer, reference in given]
        elif self._kind == "formula":
            judged = self._formulas([(boxed(a) or _in_dollars(a), boxed(r["answer"]) or "") for a, r in given])
        else:
            programs = [f"{reference['before']}{answer}\n{reference['after']}" for answer, reference in given]
            outcomes = sandbox.run_all(programs, timeout_s=self._timeout_s, workers=self._workers)
            judged = [Judgement(outcome.passed, outcome.timed_out) for outcome in outcomes]
        self._known |= dict(zip(new, judged, strict=True))
        return [self._known[name] for name in names]

    def _formulas(self, pairs: Sequence[tuple[str | None, str]]) -> list[Judgement]:
        judged = [Judgement(answer is not None and normalised(answer) == normalised(right)) for answer, right in pairs]
        unsure = [i for i, (answer, _) in enumerate(pairs) if answer and not judged[i].right]
        # A process that compares takes seconds to start.
        count = max(1, min(self._workers, len(unsure) // _LEAST_PAIRS))
        parts = [unsure[n::count] for n in range(count)]
        with ThreadPoolExecutor(count) as pool:
            for part, results in zip(
                parts, pool.map(lambda part: self._compared([pairs[i] for i in part]), parts), strict=True
            ):
                for i, result in zip(part, results, strict=True):
                    judged[i] = result
        return judged

    def _compared(self, pairs: Sequence[tuple[str | None, str]]) -> list[Judgement]:
        judged: list[Judgement] = []
        while len(judged) < len(pairs):
            told = self._told(pairs[len(judged) :])
            judged += [Judgement(result == "True", stopped=result not in ("True", "False")) for result in told]
            if len(judged) < len(pairs):
                judged.append(Judgement(False, stopped=True))
        return judged

    def _told(self, pairs: Sequence[tuple[str | None, str]]) -> list[str]:
        """What comparing says of each pair, up to one that hangs or ends it. Raises ConfigError where none can be compared."""
        # Parsing may hang or take all memory: it happens in a process of its own, which says after each pair how it went. The
        # program is ours, so it may find packages wherever this process does.
        outcome = sandbox.run_python(
            _COMPARE.format(pairs=json.dumps(pairs), timeout_s=max(1, int(self._timeout_s))),
            timeout_s=_START_S + self._timeout_s * len(pairs),
            memory_bytes=4 << 30,
            packages=[os.path.abspath(folder) for folder in sys.path],
        )
        started, *told = outcome.output.split() or [""]
        if started:
            return told
        if outcome.timed_out:
            raise StageFailed(
                f"math-verify, which compares formulas, could not be imported in {_START_S} s or more. Run again."
            )
        raise ConfigError(
            f"tasks of format math compare formulas with math-verify, which cannot be imported ({outcome.problem}): "
            "pip install 'megatron-demix[eval]'."
        )


def _name(answer: str, reference: Mapping[str, str]) -> bytes:
    """Of an answer to an item: the answers of all proxies together may be gigabytes."""
    return hashlib.blake2b(json.dumps([answer, dict(reference)]).encode(), digest_size=16).digest()


_START_S, _LEAST_PAIRS = 60, 100
_COMPARE = """
import json, logging
from math_verify import parse, verify
from math_verify.errors import TimeoutException
logging.disable()
print("started", flush=True)
for answer, right in json.loads({pairs!r}):
    try:
        found = parse(f"${{answer}}$", parsing_timeout={timeout_s})
        result = bool(found) and verify(parse(f"${{right}}$"), found, timeout_seconds={timeout_s})
    except (Exception, TimeoutException) as e:
        result = "error"
    print(result, flush=True)
"""


def _same_number(answer: str, right: str) -> bool:
    found = final_number(answer)
    return found is not None and found == final_number(right)


def _in_dollars(text: str) -> str | None:
    """The last formula between dollar signs, of an answer that boxes none."""
    found = re.findall(r"\$([^$]+)\$", text)
    return found[-1] if found else None
