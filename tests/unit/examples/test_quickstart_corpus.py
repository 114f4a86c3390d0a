"""The quickstart's corpus: four domains, real text where it says so, the same bytes every time."""

import importlib
import json
import math
import re
import subprocess
import sys
from fractions import Fraction
from itertools import islice
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[3] / "examples" / "quickstart"
sys.path.insert(0, str(EXAMPLE))
collect = importlib.import_module("collect")
worked_problems = importlib.import_module("worked_problems").worked_problems


def run(output: Path, megabytes: float) -> subprocess.CompletedProcess:
    command = [sys.executable, str(EXAMPLE / "collect.py"), "--output", str(output), "--megabytes", str(megabytes)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def documents(folder: Path, domain: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / domain / "documents.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    result = run(folder, 0.3)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


@pytest.mark.parametrize("domain", collect.DOMAINS)
def test_documents_are_of_the_promised_size_and_kind(corpus, domain):
    folder, _ = corpus
    rows = documents(folder, domain)
    texts = [row["text"] for row in rows]
    wanted = 300_000 * collect.SHARES[domain]
    assert wanted <= sum(len(t.encode()) for t in texts) < wanted + 4 * collect.DOCUMENT_CHARS
    assert len(set(texts)) == len(texts), "an exact duplicate"
    assert all(set(row) == {"text", "source"} and ":" in row["source"] for row in rows)
    # Generated documents are a few problems each, and short.
    assert all(len(t) <= collect.DOCUMENT_CHARS + 1 for t in texts)
    assert all(len(row["text"]) >= 160 or row["source"].startswith("generated:") for row in rows)
    assert not any("/tests/" in row["source"] for row in rows)


def test_the_generated_part_is_labelled_and_as_large_as_stated(corpus):
    folder, _ = corpus
    rows = documents(folder, "math")
    size = {True: 0, False: 0}
    for row in rows:
        size[row["source"].startswith("generated:")] += len(row["text"])
    assert size[True] / sum(size.values()) == pytest.approx(collect.GENERATED_SHARE, abs=0.05)
    assert not any(row["source"].startswith("generated:") for d in ("code", "english", "c") for row in documents(folder, d))


def test_the_table_says_where_the_text_is_from(corpus):
    _, shown = corpus
    assert re.search(r"^math .*generated (3[6-9]|4[0-4])%", shown, re.MULTILINE)
    assert re.search(r"^code .*stdlib 100%", shown, re.MULTILINE)


def test_a_second_run_changes_nothing_and_says_so(corpus):
    folder, _ = corpus
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}
    result = run(folder, 0.3)
    assert result.returncode == 0
    assert result.stdout.count("(already there)") == len(collect.DOMAINS)
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()} == before


def test_another_size_is_refused_and_nothing_is_overwritten(corpus):
    result = run(corpus[0], 0.2)
    assert result.returncode == 6
    assert "it was made from other inputs or settings" in result.stderr


def test_a_size_that_is_none(tmp_path):
    result = run(tmp_path / "x", 0)
    assert result.returncode == 2
    assert "--megabytes 0: expected a positive number" in result.stderr
    assert not (tmp_path / "x").exists()


def test_the_same_machine_gives_the_same_bytes(corpus, tmp_path):
    for domain in ("code", "c"):
        collect.collect(domain, tmp_path, round(300_000 * collect.SHARES[domain]))
        assert documents(tmp_path, domain) == documents(corpus[0], domain)


def test_prose_leaves_out_code_and_markup():
    docstring = """Compute the ``n``-th discrete difference along the given :ref:`axis <axes>` of the array.

Parameters
----------
a : array_like
    Input array whose differences are to be computed along the axis.

Examples
--------
>>> x = np.array([1, 2, 4, 7, 0])
>>> np.diff(x)
array([ 1,  2,  3, -7])

* The first difference is given by the formula, and higher ones by calling it again.
"""
    assert collect._prose(docstring) == (
        "Compute the n-th discrete difference along the given axis of the array.\n\n"
        "Input array whose differences are to be computed along the axis.\n\n"
        "The first difference is given by the formula, and higher ones by calling it again.\n"
    )
    assert collect._prose("Short.") == ""


def test_cutting_loses_nothing_but_short_ends():
    text = "\n\n".join(f"def f{i}():\n    return {'x' * (37 * i % 400)!r}" for i in range(80)) + "\n"
    pieces = list(collect._cut(text))
    assert len(pieces) > 3
    assert all(160 <= len(p) <= collect.DOCUMENT_CHARS for p in pieces)
    assert all(p.startswith("def ") for p in pieces)
    assert "".join(pieces).split() == text.split()


def test_worked_problems_are_right_and_repeatable():
    """Every equation of numbers holds, and every solution solves its equation."""
    kinds = set()
    for text, kind in islice(worked_problems(7), 300):
        kinds.add(kind)
        for sides in re.findall(r"(?<![\d/])(\d+(?: [-+x] \d+)+) = (-?\d+)(?![\dx/])", text):
            assert eval(sides[0].replace("x", "*")) == int(sides[1]), (kind, sides)
        for number, divisor, quotient, rest in re.findall(r"(\d+) = (\d+) x (\d+) \+ (\d+)", text):
            assert int(number) == int(divisor) * int(quotient) + int(rest), text
        for a, b, x in re.findall(r"Solve (-?\d+)x \+ (\d+) = .*\n.*\n.*x = (-?\d+)\.", text):
            assert f"Solve {a}x + {b} = {int(a) * int(x) + int(b)}." in text
        for s, p, root1, root2 in re.findall(r"sum is (-?\d+) and whose product is (-?\d+): (-?\d+) and (-?\d+)\.", text):
            assert (int(root1) + int(root2), int(root1) * int(root2)) == (int(s), int(p))
        for a, b, result in re.findall(r"Compute (\S+) \+ (\S+)\.\n.*\n.* = (\S+)\.", text):
            assert Fraction(a) + Fraction(b) == Fraction(result), text
        for a, b, result in re.findall(r"gcd\((\d+), (\d+)\) = (\d+)", text):
            assert math.gcd(int(a), int(b)) == int(result), text
        for number, first, step, total in re.findall(r"first (\d+) terms of (\d+), (\d+), (?s:.*?)/ 2 = (\d+)\.", text):
            n, a, d = int(number), int(first), int(step) - int(first)
            assert n * (2 * a + (n - 1) * d) // 2 == int(total), text
    assert len(kinds) == 10
    assert list(islice(worked_problems(7), 5)) == list(islice(worked_problems(7), 5))
    assert list(islice(worked_problems(7), 5)) != list(islice(worked_problems(8), 5))
