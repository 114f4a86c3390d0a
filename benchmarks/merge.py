#!/usr/bin/env python3
"""Merging, measured against what the machine can do and against other ways of doing it. Ratios within one run are what count.

    python benchmarks/merge.py --work /scratch/merge --mergekit /path/to/venv/bin/mergekit-yaml

Every figure is the best of --repeat runs: wall seconds and processor seconds (user and system, of whole processes where another
program is compared). The components are in the page cache unless a row says cold. Writes merge.json and merge.png to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine_limits import drop_from_cache, multiply_adds_a_second, read_files, read_memory, write_files
from merge_inputs import model_shapes, write_component, write_llama

from megatron_demix import native
from megatron_demix.checkpoint.live import LiveTensor
from megatron_demix.checkpoint.reader import Checkpoint
from megatron_demix.merge.engine import merge_checkpoints
from megatron_demix.merge.proxies import ProxyMerger

HERE = Path(__file__).parent


class Bench:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.work, self.repeat, self.threads = arguments.work, arguments.repeat, arguments.threads
        self.rows: dict[str, dict[str, float]] = {}

    def inside(
        self,
        label: str,
        run: Callable[[], Any],
        gigabytes: float = 0,
        *,
        fresh: bool = False,
        cold: Sequence[Path] = (),
        repeat: int | None = None,
    ) -> dict[str, float]:
        """Best of `repeat` runs of a function in this process. fresh: empty the output folder before each run. cold: files
        that are to be read from the disk."""
        best = {"wall_s": float("inf"), "cpu_s": float("inf")}
        for _ in range(repeat or self.repeat):
            if fresh:
                shutil.rmtree(self.work / "out", ignore_errors=True)
            drop_from_cache(cold)
            before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
            run()
            wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            best = {"wall_s": min(best["wall_s"], wall), "cpu_s": min(best["cpu_s"], cpu)}
        return self._keep(label, best, gigabytes)

    def process(self, label: str, command: list[str], gigabytes: float = 0) -> dict[str, float]:
        """Best of `repeat` runs of a program, its start included."""
        # What pip installs is compiled; this checkout is at its first start, unless the environment forbids it.
        with_bytecode = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        best = {"wall_s": float("inf"), "cpu_s": float("inf"), "anonymous_gb": 0.0}
        for _ in range(self.repeat):
            shutil.rmtree(self.work / "out", ignore_errors=True)
            started = time.perf_counter()
            with tempfile.TemporaryFile() as log:
                child = subprocess.Popen(command, stdout=log, stderr=log, env=with_bytecode)
                done, status, usage, peak = 0, 0, None, 0
                while not done:
                    peak = max(peak, anonymous_bytes(child.pid))
                    time.sleep(0.01)
                    done, status, usage = os.wait4(child.pid, os.WNOHANG)
                log.seek(0)
                errors = log.read().decode(errors="replace")
            assert usage is not None
            child.returncode = os.waitstatus_to_exitcode(status)
            if child.returncode:
                raise SystemExit(f"{' '.join(command[:4])} ... ended with {child.returncode}:\n{errors[-2000:]}")
            best["wall_s"] = min(best["wall_s"], time.perf_counter() - started)
            best["cpu_s"] = min(best["cpu_s"], usage.ru_utime + usage.ru_stime)
            best["anonymous_gb"] = peak / 1e9
        return self._keep(label, best, gigabytes)

    def _keep(self, label: str, best: dict[str, float], gigabytes: float) -> dict[str, float]:
        if gigabytes:
            best["gb_per_s"] = gigabytes / best["wall_s"]
        self.rows[label] = best
        shown = "  ".join(f"{k} {v:.3g}" for k, v in best.items())
        print(f"  {label:52} {shown}", flush=True)
        return best


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that is not a mapped file, now."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def live_model(component: Path, copies: int = 1) -> list[list[LiveTensor]]:
    tensors = Checkpoint(component).model_tensors
    return [
        [
            LiveTensor(key, info.shape, (0,) * len(info.shape), torch.zeros(info.shape, dtype=getattr(torch, info.dtype)))
            for key, info in tensors.items()
        ]
        for _ in range(copies)
    ]


def eight_together(bench: Bench, merger: ProxyMerger, parts: dict[str, Path], names: list[str]) -> dict[str, float]:
    models = [[t.tensor for t in model] for model in live_model(parts["c0"], copies=8)]
    return bench.inside("eight proxies into eight live models", lambda: merger.merge_all(mixtures(8, names), models))


def in_memory(parts: dict[str, Path], weights_MK: np.ndarray, threads: int) -> Callable[[], Any]:
    """A merge of M mixtures from mapped components into M models in memory, ready to run."""
    models = live_model(next(iter(parts.values())), len(weights_MK))
    merger = ProxyMerger(parts, models[0], threads=threads)
    addresses_TM = np.array([[t.tensor.data_ptr() for t in column] for column in zip(*models, strict=True)], np.int64)
    plan = merger._plan.native
    run = lambda: (models, plan.run(weights_MK[None], addresses_TM=addresses_TM, threads=threads, tile_bytes=64 << 10))  # noqa: E731
    run()
    return run


def mixtures(num: int, names: list[str]) -> dict[str, dict[str, float]]:
    rows = np.random.default_rng(0).dirichlet(np.ones(len(names)), num)
    return {f"m{i}": dict(zip(names, row.tolist(), strict=True)) for i, row in enumerate(rows)}


def as_matrix(mixes: dict[str, dict[str, float]]) -> np.ndarray:
    return np.array([list(row.values()) for row in mixes.values()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=3.2e8)
    parser.add_argument("--components", type=int, default=7)
    parser.add_argument("--threads", type=int, default=native.default_threads())
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--work", type=Path, required=True, help="a folder for components and outputs; they are kept")
    parser.add_argument(
        "--mergekit", type=Path, help="mergekit-yaml of an environment with mergekit 0.1.5; left out: not compared"
    )
    parser.add_argument("--output", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    bench = Bench(arguments)

    parts = {f"c{k}": arguments.work / f"c{k}" for k in range(arguments.components)}
    shapes = model_shapes(arguments.parameters)
    for k, path in enumerate(parts.values()):
        if not (path / "common.pt").exists():
            shutil.rmtree(path, ignore_errors=True)
            write_component(path, shapes, k)
    one = sum(int(np.prod(shape)) for shape in shapes.values()) * 2
    gigabytes, names, threads = one * len(parts) / 1e9, list(parts), arguments.threads
    mix = mixtures(1, names)
    print(f"{len(parts)} components of {one / 2e6:.0f}M bf16 parameters, {threads} threads, best of {bench.repeat}")

    print("the machine")
    files = [file for path in parts.values() for file in sorted(path.glob("*.distcp"))]
    read_files(files, threads)
    read = bench.inside("read the components' files (warm)", lambda: read_files(files, threads), gigabytes)
    write = bench.inside(
        "write one output's bytes, synced", lambda: write_files(bench.work / "out", one, threads), one / 1e9, fresh=True
    )
    merger = ProxyMerger(parts, live_model(parts["c0"])[0], threads=threads)
    records = merger._plan.native.records
    read_memory(records, threads)
    scan = bench.inside("read the components' bytes in memory", lambda: read_memory(records, threads), gigabytes)

    rate = multiply_adds_a_second()
    print(f"  multiply-adds of one thread: {rate / 1e9:.3g} billion a second")

    print("in memory")
    alone = bench.inside("merge, 1 mixture", in_memory(parts, as_matrix(mix), threads), gigabytes)
    merger.merge(mix["m0"])
    in_place = bench.inside("one proxy into a live model", lambda: merger.merge(mix["m0"]), gigabytes)
    together = eight_together(bench, merger, parts, names)

    print("to disk, as programs")
    tool = [sys.executable, str(HERE.parent / "tools" / "merge_dist_ckpt.py")]
    inputs = [f"{path}:{mix['m0'][name]!r}" for name, path in parts.items()]
    out = str(bench.work / "out" / "merged")
    ours = bench.process(
        "tools/merge_dist_ckpt.py", [*tool, *inputs, "--output", out, "--quiet", "--threads", str(threads)], gigabytes
    )
    dcp = bench.process(
        "load with torch DCP, sum in torch, save", [sys.executable, str(HERE / "merge_with_dcp.py"), out, *inputs], gigabytes
    )
    kit = None
    if arguments.mergekit:
        config = write_llama(bench.work / "llama", shapes, names, mix["m0"])
        kit = bench.process(
            "mergekit-yaml, linear",
            [str(arguments.mergekit), str(config), out, "--lazy-unpickle", "--num-threads", str(threads)],
            gigabytes,
        )
    disk = bench.inside(
        "merge_checkpoints in this process, checks included",
        lambda: merge_checkpoints(parts, mix, bench.work / "out", threads=threads, progress=False),
        gigabytes,
        fresh=True,
    )
    eight = bench.inside(
        "merge_checkpoints, 8 mixtures",
        lambda: merge_checkpoints(parts, mixtures(8, names), bench.work / "out", threads=threads, progress=False),
        fresh=True,
    )
    merge_checkpoints(parts, mix, bench.work / "out", threads=threads, progress=False)
    import torch.distributed.checkpoint as dcp_api

    state = {t.key: t.tensor for t in live_model(parts["c0"])[0]}
    load = bench.inside(
        "load a merged checkpoint with torch DCP",
        lambda: dcp_api.load(state, checkpoint_id=bench.work / "out" / "m0" / "release", no_dist=True),
    )

    print("as it grows")
    growth = grow(arguments, bench)

    print("from the disk")
    # At last: what is mapped is not dropped, and what is read lies in smaller pieces in the page cache than what was written.
    merger = records = None  # and with them the maps
    gc.collect()
    cold = median_ratio_cold(bench, parts, files, mix, gigabytes)
    reread = bench.inside(
        "merge_checkpoints in this process, of files read before",
        lambda: merge_checkpoints(parts, mix, bench.work / "out", threads=threads, progress=False),
        gigabytes,
        fresh=True,
    )

    multiply_adds = 7 * sum(int(np.prod(shape)) for shape in model_shapes(1e7).values())  # of one of growth's mixtures
    ratios = {
        "1 to disk, wall / larger of read and write (target <= 1.25)": disk["wall_s"] / max(read["wall_s"], write["wall_s"]),
        "1 to disk, processor time / threads / larger of read and write: if no thread ever waited": disk["cpu_s"]
        / threads
        / max(read["wall_s"], write["wall_s"]),
        "1 to disk cold, wall / cold read, median of pairs (target <= 1.25)": cold,
        "1 to disk, wall / larger of read and write, largest model of the growth": list(growth["to_disk"].values())[-1],
        "1 to disk, of files that were read from the disk before": reread["wall_s"] / max(read["wall_s"], write["wall_s"]),
        "2 in memory, bytes read and written a second / read bandwidth (target >= 0.9)": scan["wall_s"]
        / alone["wall_s"]
        * (len(parts) + 1)
        / len(parts),
        "2 in memory, bytes read a second / read bandwidth": scan["wall_s"] / alone["wall_s"],
        "2 processor time a proxy, 1 mixture / 32 mixtures (target >= 5)": growth["mixtures"]["1"] / growth["mixtures"]["32"],
        "2 the same, if a proxy's multiply-adds at the rate of a large matrix product were all it took": growth["mixtures"]["1"]
        / (multiply_adds / rate),
        "2 multiply-adds a second, 256 mixtures / a large matrix product": multiply_adds / growth["mixtures"]["256"] / rate,
        "3 processor time, DCP and torch / ours (target >= 20)": dcp["cpu_s"] / ours["cpu_s"],
        "3 wall, DCP and torch / ours": dcp["wall_s"] / ours["wall_s"],
        "4 processor time, in-place proxy / write + load (target <= 1/8)": in_place["cpu_s"] / (disk["cpu_s"] + load["cpu_s"]),
        "4 wall, in-place proxy / write + load (target <= 1/8)": in_place["wall_s"] / (disk["wall_s"] + load["wall_s"]),
        "4 the same, if reading the components from memory were all it took": scan["wall_s"]
        / (disk["wall_s"] + load["wall_s"]),
        "4 wall, in-place proxy of eight made together / write + load": together["wall_s"]
        / 8
        / (disk["wall_s"] + load["wall_s"]),
        "3 anonymous GB of tools/merge_dist_ckpt.py (target <= 0.512 beyond the interpreter)": ours["anonymous_gb"],
        "processor time a proxy to disk, 1 mixture / 8 mixtures": disk["cpu_s"] / (eight["cpu_s"] / 8),
    }
    if kit:
        ratios["3 processor time, mergekit / ours (target >= 15)"] = kit["cpu_s"] / ours["cpu_s"]
        ratios["3 wall, mergekit / ours (target >= 15)"] = kit["wall_s"] / ours["wall_s"]
    print("ratios")
    for name, ratio in ratios.items():
        print(f"  {name:70} {ratio:.3g}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    facts = {
        "parameters": one // 2,
        "components": len(parts),
        "threads": threads,
        "isa": native.instruction_set(),
        "processor": platform.processor() or platform.machine(),
        "load_average": os.getloadavg(),
        "not_compared": [] if kit else ["mergekit"],
    }
    bench.rows["a large matrix product, one thread"] = {"multiply_adds_per_s": rate}
    result = {"setting": facts, "ratios": ratios, "measured": bench.rows, "growth": growth}
    (arguments.output / "merge.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(growth, arguments.output / "merge.png")


def median_ratio_cold(bench: Bench, parts: dict[str, Path], files: list[Path], mix: dict, gigabytes: float) -> float:
    """Wall seconds of a merge over those of reading the components' files, from the disk. In pairs: disks that several machines
    share are faster at one time than at another, and after a rest."""
    pairs = []
    for _ in range(bench.repeat):
        read = bench.inside(
            "read the components' files (cold)", lambda: read_files(files, bench.threads), gigabytes, cold=files, repeat=1
        )
        merge = bench.inside(
            "merge_checkpoints in this process (cold)",
            lambda: merge_checkpoints(parts, mix, bench.work / "out", threads=bench.threads, progress=False),
            gigabytes,
            fresh=True,
            cold=files,
            repeat=1,
        )
        pairs.append(merge["wall_s"] / read["wall_s"])
    return statistics.median(pairs)


def grow(arguments: argparse.Namespace, bench: Bench) -> dict[str, dict[str, float]]:
    """Processor seconds a proxy in memory: by model size, components, mixtures, and wall seconds by threads. And merging to
    disk, as wall seconds over those of reading or writing as many bytes, by model size."""
    growth: dict[str, dict[str, float]] = {
        "parameters": {},
        "components": {},
        "mixtures": {},
        "threads_wall": {},
        "to_disk": {},
    }

    def parts_of(size: float, num: int) -> dict[str, Path]:
        found = {}
        for k in range(num):
            path = arguments.work / f"size{size:.0e}" / f"c{k}"
            if not (path / "common.pt").exists():
                shutil.rmtree(path, ignore_errors=True)
                write_component(path, model_shapes(size), k)
            found[f"c{k}"] = path
        return found

    for size in (1e7, 4e7, 1.6e8):
        parts = parts_of(size, 4)
        run = in_memory(parts, as_matrix(mixtures(1, list(parts))), 1)
        growth["parameters"][f"{size:.0f}"] = bench.inside(f"4 components of {size / 1e6:.0f}M", run)["cpu_s"]
    for num in (2, 4, 8, 16):
        parts = parts_of(4e7, num)
        run = in_memory(parts, as_matrix(mixtures(1, list(parts))), 1)
        growth["components"][str(num)] = bench.inside(f"{num} components of 40M", run)["cpu_s"]
    parts = parts_of(1e7, 7)
    for num in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        run = in_memory(parts, as_matrix(mixtures(num, list(parts))), 1)
        growth["mixtures"][str(num)] = bench.inside(f"{num} mixtures of 7 x 10M", run)["cpu_s"] / num
    parts = parts_of(1.6e8, 4)
    for threads in sorted({1, 2, arguments.threads}):
        run = in_memory(parts, as_matrix(mixtures(1, list(parts))), threads)
        growth["threads_wall"][str(threads)] = bench.inside(f"4 x 160M, {threads} threads", run)["wall_s"]
    for size in (4e7, 1.6e8, 6.4e8):
        growth["to_disk"][f"{size:.0f}"] = over_bytes(arguments, bench, parts_of(size, 7), f"7 x {size / 1e6:.0f}M")
    return growth


def over_bytes(arguments: argparse.Namespace, bench: Bench, parts: dict[str, Path], label: str) -> float:
    """Wall seconds of a merge to disk over the larger of reading its components' and writing its output's bytes."""
    mix, files = mixtures(1, list(parts)), [file for path in parts.values() for file in sorted(path.glob("*.distcp"))]
    out, threads = bench.work / "out", arguments.threads
    num_bytes = sum(file.stat().st_size for file in parts["c0"].glob("*.distcp"))
    read_files(files, threads)
    read = bench.inside(f"{label}: read", lambda: read_files(files, threads))
    write = bench.inside(f"{label}: write", lambda: write_files(out, num_bytes, threads), fresh=True)
    merge = lambda: merge_checkpoints(parts, mix, out, threads=threads, progress=False)  # noqa: E731
    return bench.inside(f"{label}: merge to disk", merge, fresh=True)["wall_s"] / max(read["wall_s"], write["wall_s"])


def plot(growth: dict[str, dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = {
        "parameters": ("parameters of the model", "processor s, 4 components"),
        "components": ("components", "processor s, 40M parameters"),
        "mixtures": ("mixtures in one read", "processor s a mixture, 7 x 10M"),
        "threads_wall": ("threads", "wall s, 4 x 160M"),
        "to_disk": ("parameters of the model", "to disk, wall / larger of read and write"),
    }
    figure, axes = plt.subplots(1, len(labels), figsize=(18, 3.4), constrained_layout=True)
    for axis, (name, (x, y)) in zip(axes, labels.items(), strict=True):
        points = growth[name]
        axis.plot([float(k) for k in points], list(points.values()), "o-")
        axis.set(xlabel=x, ylabel=y, xscale="log", yscale="log")
        axis.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
