"""Collect the quickstart's corpus: four real domains from what every installation of this project carries. No download.

    code     Python: the standard library's source files, without its tests
    english  technical English: the prose of docstrings (standard library, NumPy, SciPy, scikit-learn, PyTorch) and of Python's
             own help topics, with code, tables and markup taken out
    math     mathematics: SymPy's and mpmath's docstrings with their examples, and worked problems that are *generated*
             (GENERATED_SHARE of the domain's bytes; their "source" begins with "generated:")
    c        C and C++ headers: the system's, Python's, NumPy's and PyTorch's

One JSON object a line: {"text": ..., "source": ...}, in corpus/<domain>/documents.jsonl. Sources are parsed, never imported.
Long files are cut at blank lines into documents of at most DOCUMENT_CHARS, so two splits may hold parts of one file, but never
the same part; exact duplicates are dropped. The order is fixed:
the same machine gives the same bytes, another machine (other versions of the packages) gives other documents of the same kinds.
A domain that is already there is left as it is.
"""

from __future__ import annotations

import argparse
import ast
import gc
import hashlib
import importlib.util
import itertools
import json
import multiprocessing
import re
import sys
import sysconfig
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Set
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from worked_problems import worked_problems

from megatron_demix.artifact import Manifest, fingerprint, is_done, publish, remove_leftovers
from megatron_demix.errors import ConfigError, DemixError
from megatron_demix.progress import progress_bar

GENERATED_SHARE = 0.4
DOCUMENT_CHARS = 4000
SEED = 20260

STDLIB = Path(sysconfig.get_paths()["stdlib"])
LEFT_OUT = {"test", "tests", "testing", "idle_test", "site-packages", "dist-packages", "__pycache__"}
NOT_CODE = {"pydoc_data", "encodings"}  # the help topics and character tables, written as Python literals
NEAR_IDENTICAL = {"ops"}  # torch/include/ATen/ops: thousands of headers written by a program

Document = tuple[str, str]
"""Text, and where it is from."""


def code() -> Iterator[Document]:
    for path in _files(STDLIB, "*.py", LEFT_OUT | NOT_CODE):
        for piece in _cut(_read(path)):
            yield piece, f"stdlib:{path.relative_to(STDLIB).as_posix()}"


def english() -> Iterator[Document]:
    docstrings = [_docstrings("stdlib", STDLIB)]
    docstrings += [_docstrings(name, _package(name)) for name in ("numpy", "scipy", "sklearn", "torch")]
    for text, source in _in_turn(_help_topics(), *docstrings):
        for piece in _cut(_prose(text)):
            yield piece, source


def math() -> Iterator[Document]:
    generated, real = 0, 0
    problems = worked_problems(SEED)
    for text, source in _in_turn(_docstrings("sympy", _package("sympy")), _docstrings("mpmath", _package("mpmath"))):
        for piece in _cut(textwrap.dedent(text).strip() + "\n"):
            real += len(piece)
            yield piece, source
        while generated < GENERATED_SHARE / (1 - GENERATED_SHARE) * real:
            text, kind = next(problems)
            generated += len(text)
            yield text, f"generated:{kind}"


def c() -> Iterator[Document]:
    roots = {
        "system": Path("/usr/include"),
        "python": Path(sysconfig.get_paths()["include"]),
        "numpy": _package("numpy"),
        "torch": _package("torch") / "include",
    }
    yield from _in_turn(*(_headers(name, root) for name, root in roots.items()))


DOMAINS: dict[str, Callable[[], Iterator[Document]]] = {"english": english, "math": math, "code": code, "c": c}
"""The slowest first, so that two processes share the work well."""
SHARES = {"english": 5 / 18, "math": 3 / 18, "code": 4 / 18, "c": 6 / 18}
"""Of the text in all. They differ, as real corpora do: with equal sizes the natural mixture would be the uniform one."""


def _headers(name: str, root: Path) -> Iterator[Document]:
    for path in _files(root, "*.h", LEFT_OUT | NEAR_IDENTICAL):
        for piece in _cut(_read(path)):
            yield piece, f"{name}:{path.relative_to(root).as_posix()}"


def _package(name: str) -> Path:
    """An installed package's folder, wherever Python finds it: an environment may see another one's packages."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"package {name!r} is not installed, and its text is part of the corpus: pip install {name}.")
    return Path(next(iter(spec.submodule_search_locations)))


def _help_topics() -> Iterator[Document]:
    """The texts behind Python's help("assert"), help("LAMBDAS"), ...: one dictionary literal in pydoc_data/topics.py."""
    module = ast.parse(_read(STDLIB / "pydoc_data" / "topics.py"))
    for node in module.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for topic, text in sorted(ast.literal_eval(node.value).items()):
                yield text, f"pydoc:{topic}"


def _docstrings(name: str, root: Path) -> Iterator[Document]:
    """Docstrings of at least 200 characters under `root`, with indentation."""
    for path in _files(root, "*.py"):
        text = _read(path)
        if text.count('"""') * 4000 < len(text):  # Parsing is what takes the time; docstrings are a small part of such a file.
            continue
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        pending: list[ast.Module | ast.ClassDef | ast.FunctionDef] = [tree]
        for node in pending:  # Grows while it is read: a class brings its methods.
            docstring = ast.get_docstring(node, clean=True)
            if docstring and len(docstring) >= 200:
                inside = "" if isinstance(node, ast.Module) else f":{node.name}"
                yield docstring, f"{name}:{path.relative_to(root).as_posix()}{inside}"
            if not isinstance(node, ast.FunctionDef):
                pending += [child for child in node.body if isinstance(child, (ast.ClassDef, ast.FunctionDef))]


def _prose(text: str) -> str:
    """The paragraphs of a docstring that read as English, one line each: no code, headings, tables, directives or markup."""
    paragraphs = []
    for block in _blocks(text):
        joined = " ".join(line.strip() for line in block)
        joined = re.sub(r":[a-zA-Z:]+:`~?([^`<]+?)(?: <[^`]*>)?`", r"\1", joined)
        joined = re.sub(r"`+([^`]*)`+_*", r"\1", joined).removeprefix("* ").removeprefix("- ")
        symbols = len(re.sub(r"[A-Za-z ]+", "", joined))
        if len(joined.split()) >= 8 and symbols <= 0.15 * len(joined) and not joined.startswith((">>>", "..", "|", "$")):
            paragraphs.append(joined)
    return "\n\n".join(paragraphs) + "\n" if sum(map(len, paragraphs)) >= 160 else ""


def _blocks(text: str) -> Iterator[list[str]]:
    """Runs of lines of one indentation (or a sentence that hangs): a blank line ends a run, and so does a change of depth."""
    block: list[str] = []
    depth = 0
    for line in [*text.splitlines(), ""]:
        indent = len(line) - len(line.lstrip())
        hanging = indent > depth and len(block) == 1 and len(block[0].split()) >= 8
        if block and not hanging and (not line.strip() or indent != depth or line.lstrip().startswith(("* ", "- "))):
            yield block
            block = []
        if line.strip():
            block.append(line)
            depth = indent


def _cut(text: str) -> Iterator[str]:
    """Pieces of 160 to DOCUMENT_CHARS characters, cut at blank lines (before an unindented line where there is one)."""
    while len(text) > DOCUMENT_CHARS:
        window = text[:DOCUMENT_CHARS]
        at = max((m.end() for m in re.finditer(r"\n\n+(?=\S)", window)), default=0)
        if at < DOCUMENT_CHARS // 4:
            at = max(window.rfind("\n\n"), window.rfind("\n")) + 1 or len(window)
        if len(text[:at].rstrip()) >= 160:
            yield text[:at].rstrip() + "\n"
        text = text[at:]
    if len(text) >= 160:
        yield text.rstrip() + "\n"


def _in_turn(*sources: Iterable[Document]) -> Iterator[Document]:
    """One document from each source in turn until all are used up, so that no source crowds out the others."""
    missing = object()
    for row in itertools.zip_longest(*sources, fillvalue=missing):
        yield from (document for document in row if document is not missing)  # type: ignore[misc]


def _files(root: Path, pattern: str, left_out: Set[str] = LEFT_OUT) -> list[Path]:
    """Files under `root` with no folder of `left_out` above them, in an order that is fixed and spreads over all folders."""
    found = (p.relative_to(root) for p in root.rglob(pattern) if left_out.isdisjoint(p.relative_to(root).parts[:-1]))
    return [root / p for p in sorted(found, key=lambda p: hashlib.blake2b(p.as_posix().encode(), digest_size=8).digest())]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def collected(domain: str, output: Path, num_bytes: int) -> dict | None:
    """What output/<domain> holds, or None if it is not there. Raises OutputExists if it was collected at another size."""
    done = is_done(output / domain, fingerprint({"domain": domain, "bytes": num_bytes}))
    manifest = Manifest.read(output / domain) if done else None
    return manifest.settings if manifest else None


def collect(domain: str, output: Path, num_bytes: int) -> dict:
    """Write output/<domain>/documents.jsonl with about num_bytes of text. Returns what it holds."""
    settings = {"domain": domain, "bytes": num_bytes}
    gc.disable()  # Syntax trees are large and free of cycles: the collector would only walk them again and again.
    total, seen, origins = 0, set(), Counter[str]()
    lines = []
    for text, source in DOMAINS[domain]():
        if total >= num_bytes:
            break
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if digest in seen:
            continue
        seen.add(digest)
        size = len(text.encode())
        total += size
        origins[source.partition(":")[0]] += size
        lines.append(json.dumps({"text": text, "source": source}, ensure_ascii=False))
    facts = settings | {"documents": len(lines), "text_bytes": total, "origins": dict(origins)}
    output.mkdir(parents=True, exist_ok=True)
    with publish(output / domain, fingerprint(settings), "quickstart-corpus", facts) as temporary:
        (temporary / "documents.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return facts


def _collect_all(sizes: dict[str, int], output: Path) -> dict[str, dict]:
    """What each domain of `sizes` (bytes) holds, collected side by side."""
    # Fresh interpreters: the start method does not change what is collected, and fork is unsafe beside threads.
    with (
        ProcessPoolExecutor(max_workers=2, mp_context=multiprocessing.get_context("spawn")) as pool,
        progress_bar("collecting", len(sizes), unit="domains") as advance,
    ):
        tasks = {pool.submit(collect, domain, output, size): domain for domain, size in sizes.items()}
        rows = {}
        for task in as_completed(tasks):
            rows[tasks[task]] = task.result()
            advance()
        return rows


def _show(rows: dict[str, dict], new: Collection[str]) -> None:
    print(f"{'domain':<9}{'documents':>10}{'MB':>7}   where from (share of the bytes)")
    for domain, facts in rows.items():
        origins = sorted(facts["origins"].items(), key=lambda item: -item[1])
        where = ", ".join(f"{name} {size / facts['text_bytes']:.0%}" for name, size in origins)
        done = "" if domain in new else "   (already there)"
        print(f"{domain:<9}{facts['documents']:>10}{facts['text_bytes'] / 1e6:>7.2f}   {where}{done}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "corpus", help="folder (default: corpus/ here)")
    parser.add_argument("--megabytes", type=float, default=15.0, help="text in all (default: %(default)s)")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        if options.megabytes <= 0:
            raise ConfigError(f"--megabytes {options.megabytes:g}: expected a positive number.")
        remove_leftovers(options.output)
        sizes = {domain: round(options.megabytes * 1e6 * SHARES[domain]) for domain in DOMAINS}
        there = {domain: facts for domain, size in sizes.items() if (facts := collected(domain, options.output, size))}
        missing = {domain: size for domain, size in sizes.items() if domain not in there}
        made = _collect_all(missing, options.output) if missing else {}
        rows = {domain: (there | made)[domain] for domain in DOMAINS}
    except DemixError as e:
        print(f"collect: {e}", file=sys.stderr)
        return e.exit_code
    _show(rows, new=made)
    for domain, facts in rows.items():
        if facts["text_bytes"] < facts["bytes"]:
            print(f"{domain}: this machine has no more text of this kind ({facts['bytes'] / 1e6:.2f} MB were asked for).")
    print(f"{options.output} ({time.monotonic() - started:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
