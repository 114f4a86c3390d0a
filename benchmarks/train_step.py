#!/usr/bin/env python3
"""Speed of the trainer on a CPU: start-up, a step in both precisions, alone and beside a second run, a save.

python benchmarks/train_step.py [--steps 20] [--output benchmarks/results/train_step.json]

Every configuration runs in its own process with one thread. CPU time is the process's own; wall time is what a step took. The
data is Python's own sources as bytes. A step is one optimiser step on 16 sequences of 128 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

SEQ_LENGTH, BATCH = 128, 16
SHAPES = {"hidden 96, 3 layers": (96, 3), "hidden 128, 4 layers": (128, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "train_step.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(**json.loads(arguments.child))))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder))
        for shape, (hidden, layers) in SHAPES.items():
            for precision in ("fp32", "bf16"):
                for at_once in (1, 2):
                    settings = {"hidden": hidden, "layers": layers, "precision": precision, "steps": arguments.steps}
                    rows.append(
                        {"shape": shape, "precision": precision, "runs at once": at_once} | run(settings, folder, at_once)
                    )
                    print_row(rows[-1], header=len(rows) == 1)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    machine = {"cpus": os.cpu_count(), "load before": round(os.getloadavg()[0], 1)}
    arguments.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


def run(settings: dict, folder: str, at_once: int) -> dict[str, float]:
    """The mean over `at_once` processes that run side by side."""
    children = []
    for number in range(at_once):
        child = json.dumps(settings | {"folder": folder, "work": f"{folder}/work{number}"})
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--child", child]
        children.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True)
        )
    results = [json.loads(child.communicate(timeout=600)[0].splitlines()[-1]) for child in children]
    return {name: round(statistics.mean(r[name] for r in results), 4) for name in results[0]}


def measure(*, hidden: int, layers: int, precision: str, steps: int, folder: str, work: str) -> dict[str, float]:
    """Seconds: CPU time to import and to build, one step (median; CPU and wall), one save."""
    began = time.process_time()
    from megatron_demix.train.compat import cpu_compat
    from megatron_demix.train.job import TrainJob

    job = TrainJob.model_validate(
        {
            "name": "benchmark",
            "seed": 1,
            "model": {"num_layers": layers, "hidden_size": hidden, "num_attention_heads": 4},
            "train": {
                "seq_length": SEQ_LENGTH,
                "micro_batch_size": BATCH,
                "global_batch_size": BATCH,
                "precision": precision,
            },
            "train_iters": steps + 3,
            "vocab_size": 257,
            "eod_id": 256,
            "blend": [(f"{folder}/bytes", 1.0)],
            "work": work,
            "index_cache": f"{work}.index",
        }
    )
    with cpu_compat():
        import torch

        from megatron_demix.train.checkpointing import Checkpoints
        from megatron_demix.train.data import training_data
        from megatron_demix.train.model import build_model, destroy_parallel, initialize_parallel
        from megatron_demix.train.optimizer import build_optimizer, build_schedule
        from megatron_demix.train.step import Stepper, data_parallel
        from megatron_demix.train.stragglers import StepClock

        imported = time.process_time()
        torch.set_num_threads(1)
        initialize_parallel(job.parallel, seed=job.seed, timeout_s=600)
        data = training_data(job)
        model = build_model(job.model, job.train, job.parallel, job.vocab_size)
        clock = StepClock()
        wrapped = data_parallel(job, model, clock)
        optimizer = build_optimizer(job, wrapped)
        schedule = build_schedule(job, optimizer)
        stepper = Stepper(job, wrapped, optimizer, schedule, clock)
        built = time.process_time()
        cpu, wall = [], []
        for iteration in range(job.train_iters):
            before = time.process_time(), time.perf_counter()
            stepper.train(data, iteration, stop=False)
            cpu.append(time.process_time() - before[0])
            wall.append(time.perf_counter() - before[1])
        before_save = time.perf_counter()
        Checkpoints(job, model, optimizer, schedule).save(job.train_iters)
        saved = time.perf_counter() - before_save
        destroy_parallel()
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "import CPU s": imported - began,
        "build CPU s": built - imported,
        "step CPU s": statistics.median(cpu[3:]),
        "step wall s": statistics.median(wall[3:]),
        "tokens/s": BATCH * SEQ_LENGTH / statistics.median(wall[3:]),
        "save wall s": saved,
    }


def write_corpus(folder: Path) -> None:
    import numpy as np

    from megatron_demix.indexed.writer import IndexedWriter

    with IndexedWriter(folder / "bytes", np.dtype(np.uint16)) as writer:
        for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
            tokens = np.append(np.frombuffer(path.read_bytes()[:20_000], np.uint8).astype(np.uint16), 256)
            writer.add(tokens, np.array([len(tokens)]))


def print_row(row: dict, *, header: bool) -> None:
    if header:
        print(" | ".join(row))
    print(" | ".join(str(value) for value in row.values()), flush=True)


if __name__ == "__main__":
    main()
