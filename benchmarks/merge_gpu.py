#!/usr/bin/env python3
"""The CUDA merge on this machine's GPU: tested, sanitised and measured by one command.

    python benchmarks/merge_gpu.py

Runs the merge's tests marked gpu; runs a small case under compute-sanitizer (memcheck, initcheck); measures the
kernel against the device's own copies and against torch (a matrix product in bfloat16, which is what einsum makes of
stacked tensors; multiply and add in float32), streaming against the bus, and proxies in place. Writes
benchmarks/results/merge_gpu_<card>.json and .png. Ends with 2 where there is no GPU or no kernels, with 1 where a test
or a sanitizer finds something. --dry-run goes through every step with tiny sizes on the CPU, to try the plumbing: its
times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from merge_inputs import model_shapes, write_component

from megatron_demix.checkpoint.live import LiveTensor
from megatron_demix.checkpoint.reader import Checkpoint
from megatron_demix.errors import ConfigError
from megatron_demix.merge import cuda
from megatron_demix.merge.components import Components
from megatron_demix.merge.proxies import ProxyMerger
from megatron_demix.merge.streamed import StreamedComponents
from megatron_demix.native import MergePlan

HERE = Path(__file__).parent
SANITIZERS = ("memcheck", "initcheck")  # racecheck looks at shared memory, of which the kernels have none
SANITIZER_S = 150
FOUND = 86  # compute-sanitizer's exit code where it finds something


class Bench:
    """Measures on one device; on "cpu" (a dry run) everything is tiny and CPU code stands in for the kernels."""

    def __init__(self, device: str, repeat: int) -> None:
        self.device, self.repeat, self.dry = torch.device(device), repeat, device == "cpu"

    def weighted_sum(self, sources: Sequence[torch.Tensor], outs: Sequence[torch.Tensor], weights_MK: np.ndarray) -> None:
        (sum_on_cpu if self.dry else cuda.weighted_sum)(sources, outs, weights_MK)

    def seconds(self, run: Callable[[], Any], *, queued: bool = False) -> float:
        """Median of `repeat` runs, after two that do not count. On the device's own clock where there is one.

        queued: the device is kept busy while the launch is made, so that only what it does counts."""
        times = []
        for _ in range(self.repeat + 2):
            if self.dry:
                started = time.perf_counter()
                run()
                times.append(time.perf_counter() - started)
                continue
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            if queued:
                torch.cuda._sleep(1_000_000)  # cycles
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return statistics.median(times[2:])

    def elements(self, num_buffers: int, rows: int = 1) -> int:
        """Elements of each of so many bfloat16 buffers: far more than caches hold, well within the device's memory.

        rows: buffers that cuBLAS gets as one matrix, which has to have fewer than 2^31 elements."""
        if self.dry:
            return 4096
        free, _ = torch.cuda.mem_get_info()
        return min(1 << 28, ((1 << 31) - 1) // rows, int(free * 0.6) // (2 * num_buffers)) // 4096 * 4096


def sum_on_cpu(sources: Sequence[torch.Tensor], outs: Sequence[torch.Tensor], weights_MK: np.ndarray) -> None:
    """The same sums by the CPU's kernels, on tensors in host memory."""
    plan, n = MergePlan(len(sources)), sources[0].numel()
    records = [plan.add_record(source.view(torch.uint8).numpy().reshape(-1), 0) for source in sources]
    plan.add_target([n], str(sources[0].dtype).removeprefix("torch."), str(outs[0].dtype).removeprefix("torch."))
    plan.add_region(0, [0], [n], records, [0] * len(sources), [[1]] * len(sources))
    plan.run(np.array(weights_MK)[None], addresses_TM=np.array([[out.data_ptr() for out in outs]]))


def drawn_weights(num_mixtures: int, num_components: int) -> np.ndarray:
    return np.random.default_rng(0).dirichlet(np.ones(num_components), num_mixtures)


# --- tests and sanitizers -------------------------------------------------------------------------------------------


def run_tests() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/unit/merge"]
        command += [f"--junitxml={report}", "-p", "no:cacheprovider"]
        code = subprocess.run(command, cwd=HERE.parent).returncode
        root = ElementTree.parse(report).getroot() if report.exists() else None
        suite = None if root is None else root.find("testsuite")
        counts = {} if suite is None else {k: int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped")}
    # Skipped tests are no evidence: on a machine with a GPU some must run.
    ran = counts.get("tests", 0) - counts.get("skipped", 0)
    return {"exit_code": code, **counts, "passed": code == 0 and ran > 0}


def small_case(bench: Bench) -> None:
    """What a sanitizer watches: every kind of launch once. Raises SystemExit where bits are not the CPU's."""
    generator = torch.Generator().manual_seed(0)
    for num_components, num_mixtures, n, shift in ((1, 1, 5, 0), (2, 3, 10_003, 0), (7, 45, 4099, 0), (20, 13, 2051, 1)):
        weights = drawn_weights(num_mixtures, num_components) * (np.arange(num_mixtures)[:, np.newaxis] % 5 != 3)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            host = [torch.randn(n + shift, generator=generator).to(dtype) for _ in range(num_components)]
            expected = [torch.empty(n, dtype=dtype) for _ in range(num_mixtures)]
            sum_on_cpu([source[shift:].clone() for source in host], expected, weights)
            sources = [source.to(bench.device)[shift:] for source in host]
            outs = [torch.empty(n + shift, dtype=dtype, device=bench.device)[shift:] for _ in range(num_mixtures)]
            bench.weighted_sum([s.clone() for s in sources] if bench.dry else sources, outs, weights)
            for got, want in zip(outs, expected, strict=True):
                if not torch.equal(got.cpu().clone().view(torch.uint8), want.view(torch.uint8)):
                    raise SystemExit(f"K={num_components} M={num_mixtures} {dtype}: the device's bits are not the CPU's")


def run_sanitizers() -> dict[str, Any]:
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None:
        return {"passed": False, "why": "compute-sanitizer is not installed (it comes with the CUDA toolkit)"}
    results: dict[str, Any] = {}
    for tool in SANITIZERS:
        command = [program, "--tool", tool, "--error-exitcode", str(FOUND)]
        if tool == "memcheck":  # a launch that fails raises by itself, and libraries ask for what a driver lacks
            command += ["--report-api-errors", "no"]
        # Every tensor an allocation of its own: within one of torch's blocks an overrun is not seen.
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        try:
            done = subprocess.run(
                [*command, sys.executable, __file__, "--small-case"],
                env=environment, timeout=SANITIZER_S, capture_output=True, text=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            results[tool] = {"exit_code": -1, "summary": f"not done after {SANITIZER_S} s"}
            continue
        last = re.findall(r"ERROR SUMMARY.*", done.stdout)
        results[tool] = {"exit_code": done.returncode, "summary": last[-1] if last else (done.stdout + done.stderr)[-500:]}
    return results | {"passed": all(results[tool]["exit_code"] == 0 for tool in SANITIZERS)}


# --- measurements ---------------------------------------------------------------------------------------------------


def measure_copy(bench: Bench) -> float:
    """GB/s of a copy within the device, read and written bytes together."""
    n = bench.elements(2)
    source = torch.ones(n, dtype=torch.bfloat16, device=bench.device)
    target = torch.empty_like(source)
    return 4 * n / bench.seconds(lambda: target.copy_(source), queued=True) / 1e9


def measure_kernel(bench: Bench, num_components: int, num_mixtures: int, copy: float) -> dict[str, Any]:
    """The kernel beside torch's own ways, on the same buffers. GB/s counts every source and result once."""
    n = bench.elements(num_components + num_mixtures + 4, max(num_components, num_mixtures))
    stacked = torch.empty(num_components, n, dtype=torch.bfloat16, device=bench.device).normal_()
    made = torch.empty(num_mixtures, n, dtype=torch.bfloat16, device=bench.device)
    sources, outs = list(stacked), list(made)
    weights = drawn_weights(num_mixtures, num_components)
    on_device = torch.tensor(weights, dtype=torch.bfloat16, device=bench.device)

    def multiply_and_add() -> None:
        for m, out in enumerate(outs):
            total = sources[0].float().mul_(float(weights[m, 0]))
            for k in range(1, num_components):
                total.add_(sources[k], alpha=float(weights[m, k]))
            out.copy_(total)

    moved = 2 * n * (num_components + num_mixtures)
    ours = bench.seconds(lambda: bench.weighted_sum(sources, outs, weights), queued=True)
    matmul = bench.seconds(lambda: torch.mm(on_device, stacked, out=made), queued=True)
    added = bench.seconds(multiply_and_add, queued=True)
    return {
        "components": num_components,
        "mixtures": num_mixtures,
        "elements": n,
        "ours_gb_s": moved / ours / 1e9,
        "share_of_copy": moved / ours / 1e9 / copy,
        "fused_multiply_adds_per_s": n * num_components * num_mixtures / ours,
        "torch_matmul_time_over_ours": matmul / ours,
        "torch_mul_and_add_time_over_ours": added / ours,
    }


def measure_bus(bench: Bench) -> dict[str, float]:
    """GB/s of copies between pinned host memory and the device."""
    size = 1 << 12 if bench.dry else 1 << 30
    host = torch.empty(size, dtype=torch.uint8, pin_memory=not bench.dry)
    device = torch.empty(size, dtype=torch.uint8, device=bench.device)
    to_device = bench.seconds(lambda: device.copy_(host, non_blocking=True))
    to_host = bench.seconds(lambda: host.copy_(device, non_blocking=True))
    return {"to_device_gb_s": size / to_device / 1e9, "to_host_gb_s": size / to_host / 1e9}


def measure_proxies(bench: Bench, work: Path, parameters: float, num_components: int, bus: dict[str, float]) -> dict[str, Any]:
    """One proxy in place from resident, streamed and mapped components (the CPU's merge, then one copy over the bus)."""
    parts = {f"c{k}": work / f"c{k}" for k in range(num_components)}
    for k, path in enumerate(parts.values()):
        if not (path / "common.pt").exists():
            shutil.rmtree(path, ignore_errors=True)
            write_component(path, model_shapes(parameters), k)
    live = [
        LiveTensor(key, i.shape, (0,) * len(i.shape), torch.zeros(i.shape, dtype=getattr(torch, i.dtype), device=bench.device))
        for key, i in Checkpoint(parts["c0"]).model_tensors.items()
    ]
    tensors = [[t.tensor for t in live]]
    weights = dict(zip(parts, drawn_weights(1, num_components)[0].tolist(), strict=True))
    matrix = np.array([list(weights.values())])
    one = sum(t.numel() * t.element_size() for t in tensors[0])
    timed: dict[str, float] = {}
    for name, mode in (("cpu_merge_and_copy", "0"), ("in_place", "0" if bench.dry else "auto")):
        os.environ["MEGATRON_DEMIX_CUDA"] = mode
        merger = ProxyMerger(parts, live)
        timed[name] = bench.seconds(lambda merger=merger: merger.merge(weights))
        kept = merger._device and merger._device._method
    del merger
    streamed = StreamedComponents(Components(parts), live, None, bench.device, weighted_sum=bench.weighted_sum)
    timed["streamed"] = bench.seconds(lambda: streamed.merge(matrix, tensors))
    return {
        "parameters": sum(t.numel() for t in tensors[0]),
        "components": num_components,
        "seconds": timed,
        "in_place_by": type(kept).__name__ if kept else "the CPU",
        "streamed_gb_s_over_bus": num_components * one / timed["streamed"] / 1e9 / bus["to_device_gb_s"],
        "in_place_gb_s": (num_components + 1) * one / timed["in_place"] / 1e9,
    }


def plot(rows: list[dict[str, Any]], card: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 3.6), constrained_layout=True)
    for num_mixtures in sorted({row["mixtures"] for row in rows}):
        points = [row for row in rows if row["mixtures"] == num_mixtures]
        axis.plot(
            [r["components"] for r in points], [r["share_of_copy"] for r in points], "o-", label=f"{num_mixtures} mixtures"
        )
    axis.axhline(0.9, color="gray", linestyle="--", linewidth=1)
    axis.set(xlabel="components", ylabel="share of copy bandwidth", title=card, ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=3.2e8, help="of the models of the proxies (default: 3.2e8)")
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--work", type=Path, help="a folder for components, kept (default: a temporary one)")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--dry-run", action="store_true", help="every step, tiny, on the CPU; writes only where --output says")
    parser.add_argument("--small-case", action="store_true", help="only what the sanitizers watch")
    arguments = parser.parse_args(argv)
    if not arguments.dry_run:
        os.environ["MEGATRON_DEMIX_CUDA"] = "1"  # an error, where the kernels cannot run
        try:
            if not torch.cuda.is_available():
                raise ConfigError("no CUDA device is visible to torch.")
            cuda.available()
            cuda.runs_on(torch.device("cuda"))
        except ConfigError as e:
            print(f"error: {e} Nothing was measured. --dry-run tries the plumbing.", file=sys.stderr)
            return e.exit_code
    bench = Bench("cpu" if arguments.dry_run else "cuda", 1 if arguments.dry_run else arguments.repeat)
    if arguments.small_case:
        small_case(bench)
        return 0

    card = "dry run on the CPU: not a measurement" if bench.dry else torch.cuda.get_device_name()
    result: dict[str, Any] = {"card": card, "torch": torch.__version__, "cuda": torch.version.cuda}
    name = "merge_gpu_" + ("dry_run" if bench.dry else re.sub(r"[^a-z0-9]+", "_", card.lower()).strip("_"))
    writes = not bench.dry or arguments.output != HERE / "results"

    def keep(**found: Any) -> None:
        """Written after every step: what comes later may fail, and a GPU is not always at hand."""
        result.update(found)
        if writes:
            arguments.output.mkdir(parents=True, exist_ok=True)
            (arguments.output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")

    print(card)
    small_case(bench)
    if not bench.dry:
        keep(tests=run_tests())
        keep(sanitizers=run_sanitizers())
        print(json.dumps({k: result[k] for k in ("tests", "sanitizers")}, indent=1))
    copy = measure_copy(bench)
    print(f"copy within the device: {copy:.0f} GB/s")
    rows: list[dict[str, Any]] = []
    for num_components in (2, 4, 7, 16):
        for num_mixtures in (1, 8, 32):
            rows.append(measure_kernel(bench, num_components, num_mixtures, copy))
            print("  ".join(f"{k} {v:.4g}" for k, v in rows[-1].items()), flush=True)
            keep(copy_gb_s=copy, kernel=rows)
            if not bench.dry:
                torch.cuda.empty_cache()
    bus = measure_bus(bench)
    with tempfile.TemporaryDirectory() as folder:
        parameters = 1e5 if bench.dry else arguments.parameters
        proxies = measure_proxies(bench, arguments.work or Path(folder), parameters, 3 if bench.dry else 7, bus)
    print(json.dumps({"bus": bus, "proxies": proxies}, indent=1))
    keep(bus=bus, proxies=proxies)
    if writes:
        plot(rows, card, arguments.output / f"{name}.png")
    sound = bench.dry or (result["tests"]["passed"] and result["sanitizers"]["passed"])
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
