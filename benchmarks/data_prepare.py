#!/usr/bin/env python3
"""Text to .bin/.idx: ours against the designs of Megatron-LM's two tools and gigatoken alone, same text, tokenizer and cores.

Text: CPython's standard library as JSON Lines, as whole files ("long") and cut at blank lines ("short"). Every contender that
writes files writes the same bytes, which is checked. Best of --repeat runs; the contenders take turns.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import resource
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_demix import native
from megatron_demix.data.prepare import preprocess
from megatron_demix.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from megatron_demix.indexed.format import token_dtype
from megatron_demix.study.data import TokenizerSpec


def make_corpus(path: Path, *, short: bool) -> None:
    library = Path(sysconfig.get_paths()["stdlib"])
    with open(path, "w") as out:
        for source in sorted(library.rglob("*.py")):
            if "site-packages" in source.parts:
                continue
            try:
                text = source.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            for piece in text.split("\n\n") if short else [text]:
                if piece.strip():
                    out.write(json.dumps({"text": piece}) + "\n")


_worker: dict = {}


def _start(tokenizer_file: str) -> None:
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker["tokenizer"] = Tokenizer.from_file(tokenizer_file)
    _worker["eod"] = _worker["tokenizer"].get_vocab_size() - 1


def _encode(line: str) -> tuple[list[int], int]:
    ids = _worker["tokenizer"].encode(json.loads(line)["text"]).ids
    return [*ids, _worker["eod"]], len(line)


def pool_design(corpus: Path, tokenizer_file: Path, prefix: Path, workers: int) -> None:
    """preprocess_data.py: a pool of processes, one document at a time, then the builder, one document at a time."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(4096))
    with multiprocessing.get_context("fork").Pool(workers, _start, (str(tokenizer_file),)) as pool, open(corpus) as lines:
        for ids, _ in pool.imap(_encode, lines, 32):
            builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")


def cpu_seconds() -> float:
    """Of this process and its finished children: what a busy machine cannot blur."""
    usage = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in usage)


def load_gigatoken(tokenizer_file: Path) -> Any:
    import gigatoken

    return gigatoken.Tokenizer(str(tokenizer_file))


def fast_design(corpus: Path, tokenizer: Any, prefix: Path, workers: int) -> None:
    """preprocess_data_fast.py: gigatoken encodes the file, the builder takes one document at a time."""
    import gigatoken
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(4096))
    layout = tokenizer.encode_files(gigatoken.JsonlFileSource([str(corpus)], "text")).layout
    ids, offsets = np.asarray(layout.content.data), np.asarray(layout.offsets).tolist()
    eod = np.array([tokenizer.vocab_size - 1], np.uint32)
    for begin, end in itertools.pairwise(offsets):
        builder.add_document(np.concatenate([ids[begin:end], eod]), [end - begin + 1])
    builder.finalize(f"{prefix}.idx")


def gigatoken_alone(corpus: Path, tokenizer: Any, prefix: Path, workers: int) -> None:
    """encode_files: ids in memory, nothing written."""
    import gigatoken

    tokenizer.encode_files(gigatoken.JsonlFileSource([str(corpus)], "text"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=native.default_threads())
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--slow-repeat", type=int, default=1, help="runs of the pool design, which takes minutes (0: leave it out)"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "data_prepare.json")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "workers": arguments.workers}
    results |= {"load_average": os.getloadavg()[0], "corpora": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in ("long", "short"):
            make_corpus(folder / f"{kind}.jsonl", short=kind == "short")
        train_tokenizer(TokenizerSpec(train_vocab_size=4096), {"code": [folder / "long.jsonl"]}, folder / "tokenizer")
        file = folder / "tokenizer" / "tokenizer.json"
        tokenizer = load_tokenizer(folder / "tokenizer")
        for kind in ("long", "short"):
            results["corpora"][kind] = compare(folder, folder / f"{kind}.jsonl", file, tokenizer, arguments)
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    for kind, corpus in results["corpora"].items():
        print(f"\n{kind}: {corpus['documents']:,} documents, {corpus['megabytes']:.1f} MB, {arguments.workers} workers")
        for contender, row in corpus["contenders"].items():
            print(
                f"  {contender:18} {row['seconds']:8.2f} s {row['mb_per_s']:8.1f} MB/s   ours is {row['ours_is']:.2f}x as fast"
                f", by CPU time {row['ours_is_by_cpu']:.2f}x"
            )


def compare(folder: Path, corpus: Path, file: Path, tokenizer: Tokenizer, arguments: argparse.Namespace) -> dict:
    def ours(corpus: Path, tokenizer: Tokenizer, prefix: Path, workers: int) -> None:
        preprocess([corpus], tokenizer, prefix, workers=workers, progress=False)

    tokenizer.encode_batch(["the engine is loaded before the clock starts, as for the others"])
    gigatoken = load_gigatoken(file)
    contenders: dict[str, tuple[Callable, Any]] = {
        "ours": (ours, tokenizer),
        "gigatoken alone": (gigatoken_alone, gigatoken),
        "fast design": (fast_design, gigatoken),
        "pool design": (pool_design, file),
    }
    best, cpu = dict.fromkeys(contenders, float("inf")), dict.fromkeys(contenders, float("inf"))
    expected: tuple[bytes, bytes] = b"", b""
    for turn in range(max(arguments.repeat, arguments.slow_repeat)):
        for contender, (run, with_what) in contenders.items():
            if turn >= (arguments.slow_repeat if contender == "pool design" else arguments.repeat):
                continue
            prefix = folder / "out"
            started, cpu_started = time.perf_counter(), cpu_seconds()
            run(corpus, with_what, prefix, arguments.workers)
            best[contender] = min(best[contender], time.perf_counter() - started)
            cpu[contender] = min(cpu[contender], cpu_seconds() - cpu_started)
            if contender != "gigatoken alone":
                content = (prefix.with_suffix(".bin").read_bytes(), prefix.with_suffix(".idx").read_bytes())
                expected = expected if any(expected) else content
                assert content == expected, f"{contender} wrote other bytes than ours"
            for made in folder.glob("out.*"):
                made.unlink()
    size = corpus.stat().st_size / 1e6
    rows = {
        c: {
            "seconds": s,
            "mb_per_s": size / s,
            "ours_is": s / best["ours"],
            "cpu_s": cpu[c],
            "ours_is_by_cpu": cpu[c] / cpu["ours"],
        }
        for c, s in best.items()
        if s < float("inf")
    }
    documents = corpus.read_bytes().count(b"\n")
    return {"documents": documents, "megabytes": size, "dtype": str(token_dtype(tokenizer.vocab_size)), "contenders": rows}


if __name__ == "__main__":
    main()
