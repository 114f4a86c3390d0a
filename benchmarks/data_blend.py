#!/usr/bin/env python3
"""Blending: planning rate and memory of a view, and writing a blend out against cp and against Megatron's own builder.

view: simulated lengths (real .idx files; the .bin files are holes), 4 domains, one epoch of all documents; each size in a
fresh process. materialise: real bytes, page cache warm; cp copies the blend's own .bin. Best of --repeat, taking turns.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from megatron_demix import native
from megatron_demix.data import blend_data
from megatron_demix.data.blend import Pool, Source, plan_blend
from megatron_demix.data.pool import open_pool
from megatron_demix.indexed.format import bin_path, idx_path
from megatron_demix.indexed.writer import write_index
from megatron_demix.mixture import Mixture

DOMAINS = {"web": 0.5, "code": 0.25, "math": 0.15, "books": 0.1}


def make_pool(folder: Path, documents: int, *, mean_tokens: int, holes: bool) -> Pool:
    """Log-normal document lengths; every domain has its share of the documents."""
    pool = Pool()
    for number, (name, share) in enumerate(DOMAINS.items()):
        rng = np.random.default_rng(number)
        count = max(1, int(documents * share))
        lengths = np.empty(count, np.int32)
        for start in range(0, count, 1 << 22):
            some = rng.lognormal(np.log(mean_tokens) - 0.5, 1.0, min(1 << 22, count - start))
            lengths[start : start + len(some)] = np.clip(some, 1, 1 << 20)
        write_index(idx_path(folder / name), np.dtype("<u2"), lengths)
        size = 2 * int(lengths.sum(dtype=np.int64))
        with open(bin_path(folder / name), "wb") as out:
            if holes:
                out.truncate(size)
            else:
                while size:
                    size -= out.write(rng.integers(0, 256, min(size, 64 << 20), np.uint8).data)
        pool[name] = Source((folder / name,), 1.0)
    return pool


def anonymous_bytes() -> int:
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))


def measure_view(documents: int, threads: int, results: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "work").mkdir()
        pool = make_pool(folder, documents, mean_tokens=600, holes=True)
        before = peak = anonymous_bytes()
        running = True

        def watch() -> None:
            nonlocal peak
            while running:
                peak = max(peak, anonymous_bytes())
                time.sleep(0.01)

        watcher = threading.Thread(target=watch)
        watcher.start()
        started = time.perf_counter()
        opened = open_pool(pool)
        checked, cpu = time.perf_counter(), time.process_time()
        natural = Mixture.proportional({n: d.tokens for n, d in opened.domains.items()})
        total = sum(d.tokens for d in opened.domains.values())
        plan = plan_blend(opened, natural, int(total * 0.999), seed=1, threads=threads)
        blend_data.write_plan(plan, folder / "work", threads)
        seconds, cpu_s = time.perf_counter() - checked, time.process_time() - cpu
        running = False
        watcher.join()
        results.append(
            {
                "documents": plan.documents,
                "check_s": checked - started,
                "plan_s": seconds,
                "documents_per_s": plan.documents / seconds,
                "anonymous_memory_bytes": peak - before,
                "index_bytes": sum(file.stat().st_size for file in (folder / "work").iterdir()),
                "plan_cpu_s": cpu_s,
                "documents_per_cpu_s": plan.documents / cpu_s,
            }
        )


def measure_materialise(documents: int, threads: int, repeat: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pool = make_pool(folder, documents, mean_tokens=600, holes=False)
        opened = open_pool(pool)
        natural = Mixture.proportional({n: d.tokens for n, d in opened.domains.items()})
        plan = plan_blend(opened, natural, int(sum(d.tokens for d in opened.domains.values()) * 0.98), seed=1, threads=threads)
        best: dict[str, float] = {}

        def timed(what: str, run: Any) -> None:
            started = time.perf_counter()
            run()
            best[what] = min(best.get(what, float("inf")), time.perf_counter() - started)

        def durable(path: Path) -> None:
            with open(path, "rb+") as file:
                os.fsync(file.fileno())

        for _ in range(repeat):
            work = folder / "work"
            work.mkdir()
            blend_data.write_plan(plan, work, threads)

            def ours(work: Path = work) -> None:
                blend_data.write_shards(plan, work, "b", (0, 1), threads=threads, progress=False)
                blend_data.finish_materialised(plan, work, "b")
                durable(bin_path(work / "b"))

            def cp(work: Path = work) -> None:
                subprocess.run(["cp", "--reflink=never", bin_path(work / "b"), folder / "copy.bin"], check=True)
                durable(folder / "copy.bin")

            timed("materialise", ours)
            timed("cp", cp)
            (folder / "copy.bin").unlink()
            last = folder / "last"
            shutil.rmtree(last, ignore_errors=True)
            work.rename(last)
        builder_documents = min(plan.documents, 100_000)
        started = time.perf_counter()
        stock_builder(last / "b", builder_documents, folder / "stock")
        builder_s = time.perf_counter() - started
        size = bin_path(last / "b").stat().st_size
        share = builder_documents / plan.documents
        return {
            "documents": plan.documents,
            "bytes": size,
            "materialise_s": best["materialise"],
            "cp_s": best["cp"],
            "ratio_to_cp": best["cp"] / best["materialise"],
            "stock_builder_s_for_all": builder_s / share,
            "ratio_to_stock_builder": builder_s / share / best["materialise"],
        }


def stock_builder(source: Path, documents: int, target: Path) -> None:
    """Document by document from a stock IndexedDataset into a stock IndexedDatasetBuilder."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    dataset = IndexedDataset(str(source))
    builder = IndexedDatasetBuilder(str(bin_path(target)), dtype=np.uint16)
    for number in range(documents):
        document = dataset[number]
        builder.add_document(document, [len(document)])
    builder.finalize(str(idx_path(target)))


def plot(views: list[dict[str, Any]], path: Path) -> None:
    """Anonymous memory and rate by number of documents, and for comparison what arrays of all documents would take."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    documents = [row["documents"] for row in views]
    figure, (memory, rate) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    memory.loglog(documents, [row["index_bytes"] / 1e6 for row in views], "--", color="0.6", label="the view's .idx on disk")
    memory.loglog(documents, [row["anonymous_memory_bytes"] / 1e6 for row in views], "o-", label="memory beyond the page cache")
    memory.set(xlabel="documents", ylabel="MB")
    memory.legend(frameon=False)
    rate.semilogx(documents, [row["documents_per_s"] / 1e6 for row in views], "o-", label="per second")
    rate.semilogx(documents, [row["documents_per_cpu_s"] / 1e6 for row in views], "s--", label="per CPU second")
    rate.axhline(10, color="0.6", linewidth=1)
    rate.set(xlabel="documents", ylabel="million documents", ylim=(0, None))
    rate.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", type=float, nargs="+", default=[1e5, 1e6, 1e7], help="documents of the views (1e8: 5 GB of disk)"
    )
    parser.add_argument("--materialise-documents", type=float, default=5e5)
    parser.add_argument("--threads", type=int, default=native.default_threads())
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "data_blend.json")
    arguments = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with spawn.Manager() as manager:
        views = manager.list()
        for size in arguments.sizes:
            process = spawn.Process(target=measure_view, args=(int(size), arguments.threads, views))
            process.start()
            process.join()
            row = views[-1]
            print(
                f"view: {row['documents']:>11,} documents in {row['plan_s']:7.2f} s = {row['documents_per_s'] / 1e6:5.1f} M/s, "
                f"{row['documents_per_cpu_s'] / 1e6:5.1f} M per CPU second, "
                f"{row['anonymous_memory_bytes'] / 1e6:6.1f} MB of memory, sources checked in {row['check_s']:.2f} s",
                flush=True,
            )
        written = measure_materialise(int(arguments.materialise_documents), arguments.threads, arguments.repeat)
        print(
            f"materialise: {written['bytes'] / 1e6:,.0f} MB in {written['materialise_s']:.2f} s, cp {written['cp_s']:.2f} s: "
            f"{written['ratio_to_cp']:.2f} x cp; {written['ratio_to_stock_builder']:.0f} x the stock builder"
        )
        results = {
            "threads": arguments.threads,
            "load_average": os.getloadavg()[0],
            "command": " ".join(["python", *sys.argv]),
            "views": list(views),
            "materialise": written,
        }
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    plot(results["views"], arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
