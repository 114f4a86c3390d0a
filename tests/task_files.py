"""Task files in the public formats, with items written for these tests: as the data sets ship them, a few records each."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def _arc(question: str, texts: list[str], labels: str, answer: str) -> dict[str, Any]:
    return {"id": question, "question": question, "choices": {"text": texts, "label": list(labels)}, "answerKey": answer}


ARC = [
    _arc("Which one is wet?", ["sand", "rain"], "AB", "B"),
    _arc("What falls?", ["a stone", "smoke", "fog"], "123", "1"),
    _arc("What sees?", ["an eye", "a nail"], "AB", "A"),
    _arc("What is cold?", ["fire", "ice", "steam", "lava"], "ABCD", "B"),
]
_STEM = {"stem": "Which one is wet?", "choices": [{"text": "sand", "label": "A"}, {"text": "rain", "label": "B"}]}
ARC_ARCHIVE = [{"id": "1", "question": _STEM, "answerKey": "B"}]
HELLASWAG = [
    {
        "ind": 3,
        "activity_label": "Baking",
        "ctx_a": "A baker kneads dough.",
        "ctx_b": "he",
        "ctx": "A baker kneads dough. he",
        "endings": ["[step] shapes a loaf.", "flies away.", "sings [title] Then stops.", "melts."],
        "label": 0,
    },
    {
        "ind": 4,
        "activity_label": "Rowing",
        "ctx_a": "A boat lies still.",
        "ctx_b": "a woman",
        "ctx": "",
        "endings": ["eats it.", "pulls the oars.", "is blue.", "was."],
        "label": "1",
    },
]
PIQA = [
    {"goal": "Dry a plate.", "sol1": "Use a towel.", "sol2": "Use a hammer."},
    {"goal": "Open a jar.", "sol1": "Whistle at it.", "sol2": "Twist the lid."},
]
SIQA = [
    {
        "context": "Ada lent Ben a pen.",
        "question": "What will Ben do?",
        "answerA": "write",
        "answerB": "sleep",
        "answerC": "row",
    },
]
WINOGRANDE = [
    {"sentence": "The cup did not fit the box as the _ was wide.", "option1": "cup", "option2": "box", "answer": "1"},
    {"sentence": "Lea thanked Mia because _ had helped.", "option1": "Lea", "option2": "Mia", "answer": "2"},
]
GSM8K = [
    {"question": "Tom has 3 pens and buys 4. How many has he?", "answer": "He has 3 + 4 = <<3+4=7>>7 pens.\n#### 7"},
    {"question": "A box holds 1,000 nails. How many hold 2?", "answer": "2 x 1000 = <<2*1000=2000>>2000.\n#### 2,000"},
    {"question": "What is 5 less than 2?", "answer": "2 - 5 = -3.\n#### -3"},
]
MATH = [
    {
        "problem": "Find $x$ if $2x = 1$.",
        "level": "Level 1",
        "type": "Algebra",
        "solution": "Divide: $x = \\boxed{\\frac{1}{2}}$.",
    },
    {"problem": "Solve $x^2 = 4$.", "level": "Level 2", "type": "Algebra", "solution": "So $x = \\boxed{\\{-2, 2\\}}$."},
]
HUMANEVAL = [
    {
        "task_id": "Own/0",
        "prompt": 'def double(x):\n    """Twice x."""\n',
        "entry_point": "double",
        "canonical_solution": "    return 2 * x\n",
        "test": "def check(candidate):\n    assert candidate(2) == 4\n",
    },
    {
        "task_id": "Own/1",
        "prompt": 'def first(items):\n    """The first item."""\n',
        "entry_point": "first",
        "canonical_solution": "    return items[0]\n",
        "test": "def check(candidate):\n    assert candidate([3, 1]) == 3\n",
    },
]


def _mbpp(number: int, text: str, code: str, *tests: str) -> dict[str, Any]:
    return {"task_id": number, "text": text, "code": code, "test_list": list(tests), "test_setup_code": ""}


MBPP = [
    _mbpp(2, "Write a function that adds one.", "def inc(x):\n    return x + 1", "assert inc(1) == 2"),
    _mbpp(
        12, "Write a function that halves.", "def half(x):\n    return x / 2", "assert half(4) == 2", "assert half(1) == 0.5"
    ),
    _mbpp(520, "Write a function that negates.", "def neg(x):\n    return -x", "assert neg(4) == -4"),
]


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    """JSON lines, compressed where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = "".join(json.dumps(r) + "\n" for r in records).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def write_parquet(path: Path, records: Sequence[Any]) -> Path:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(records)), path)
    return path


def write_all(folder: Path) -> dict[str, Path]:
    """Every format in its folder, laid out as it is published. Returns the folder of each."""
    write_lines(folder / "arc" / "ARC-Easy-Dev.jsonl", ARC)
    write_lines(folder / "arc" / "ARC-Easy-Train.jsonl", ARC[::-1])
    write_lines(folder / "arc" / "ARC-Easy-Test.jsonl", ARC[:2])
    write_lines(folder / "hellaswag" / "hellaswag_val.jsonl", HELLASWAG)
    for name, records, labels in (("piqa", PIQA, "0\n1\n"), ("siqa", SIQA, "1\n")):
        stem = "valid" if name == "piqa" else "dev"
        write_lines(folder / name / f"{stem}.jsonl", records)
        (folder / name / f"{stem}-labels.lst").write_text(labels)
    write_lines(folder / "winogrande" / "dev.jsonl", WINOGRANDE)
    write_lines(folder / "gsm8k" / "train.jsonl", GSM8K)
    write_lines(folder / "gsm8k" / "test.jsonl", GSM8K[::-1])
    for split in ("train", "test"):
        for number, record in enumerate(MATH):
            path = folder / "math" / split / "algebra" / f"{number}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record))
    write_lines(folder / "humaneval" / "HumanEval.jsonl.gz", HUMANEVAL)
    write_lines(folder / "mbpp" / "mbpp.jsonl", MBPP)
    return {path.name: path for path in folder.iterdir()}
