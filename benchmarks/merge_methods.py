#!/usr/bin/env python3
"""What every merge method costs, beside the linear one: proxies in place, from components in the page cache.

    python benchmarks/merge_methods.py --work /scratch/merge_methods

once: the first proxy, with checksums and what the method has to know of whole tensors beforehand. again: each later one. of 8:
each of eight that are made together. Best of --repeat runs, wall seconds; x: times the linear method's. One thread unless told
otherwise. Writes benchmarks/results/merge_methods.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from merge_inputs import model_shapes, write_component

from megatron_demix import native
from megatron_demix.checkpoint.live import LiveTensor
from megatron_demix.checkpoint.reader import Checkpoint
from megatron_demix.merge.logical_tensors import FusedLayout
from megatron_demix.merge.methods_by_name import OPTIONS, make_method
from megatron_demix.merge.proxies import ProxyMerger
from megatron_demix.merge.sparse import THINNINGS

RESULTS = Path(__file__).resolve().parent / "results" / "merge_methods.json"
TOGETHER = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--parameters", type=float, default=3e7)
    parser.add_argument("--components", type=int, default=4)
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    shapes = model_shapes(arguments.parameters)
    folders = {}
    for seed, name in enumerate(["base", *(f"c{k}" for k in range(arguments.components))]):
        folders[name] = arguments.work / name
        shutil.rmtree(folders[name], ignore_errors=True)
        size = write_component(folders[name], shapes, seed)
    base = folders.pop("base")
    tensors = {key: torch.empty(shape, dtype=torch.bfloat16) for key, shape in shapes.items()}
    live = [LiveTensor(key, shape, (0,) * len(shape), tensors[key]) for key, shape in shapes.items()]
    assert set(Checkpoint(base).model_tensors) == set(shapes)
    hidden = shapes["decoder.final_layernorm.weight"][0]
    layout = FusedLayout(num_query_groups=hidden // 128, kv_channels=64, swiglu=True)

    rows: dict[str, dict[str, float]] = {}
    print(f"{arguments.components} components of {size / 1e6:.0f} MB, bf16, {arguments.threads} threads: s, and x linear")
    print(f"{'method':20}{'once':>9}{'':>8}{'again':>9}{'':>8}{f'of {TOGETHER}':>9}{'':>8}")
    for name in OPTIONS:
        options = {"density": arguments.density} if "density" in OPTIONS[name] else {}
        method = make_method(name, base if name in THINNINGS else None, layout=layout, **options)
        rows[name] = costs(folders, live, method, arguments)
        cells = (f"{s:9.3f}{s / rows['linear'][what]:7.1f}x" for what, s in rows[name].items())
        print(f"{name:20}" + "".join(cells), flush=True)
    result = {
        "command": f"python benchmarks/merge_methods.py --work DIR --parameters {arguments.parameters:g} "
        f"--components {arguments.components} --density {arguments.density:g} --threads {arguments.threads}",
        "processor": platform.processor() or platform.machine(),
        "instruction_set": native.instruction_set(),
        "bytes_each": size,
        "seconds": rows,
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def costs(folders: dict[str, Path], live: list[LiveTensor], method: object, arguments: argparse.Namespace) -> dict[str, float]:
    even = {name: 1 / len(folders) for name in folders}
    shares = [{name: (k + 1 + m) / sum(range(1 + m, 1 + m + len(folders))) for k, name in enumerate(folders)} for m in range(8)]
    models = [[torch.empty_like(t.tensor) for t in live] for _ in range(TOGETHER)]
    once, again, together = [], [], []
    for _ in range(arguments.repeat):
        merger = ProxyMerger(folders, live, threads=arguments.threads, method=method)
        once.append(seconds(lambda m=merger: m.merge(even)))
        again.append(seconds(lambda m=merger: m.merge(shares[0])))
        together.append(seconds(lambda m=merger: m.merge_all({f"m{i}": s for i, s in enumerate(shares)}, models)) / TOGETHER)
    return {"once": min(once), "again": min(again), "together": min(together)}


def seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
