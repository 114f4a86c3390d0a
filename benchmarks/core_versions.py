#!/usr/bin/env python3
"""Which versions of megatron.core the merge works with: each saves two tiny models, and loads the merge of the two.

    python benchmarks/core_versions.py --work /scratch/cores 0.15.0 0.16.1

Every version is installed by itself under --work (pip, no dependencies; where it wants a newer Python than this one, it is
tried nevertheless) and runs in a process of its own, on the CPU. Writes benchmarks/results/core_versions.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import queue
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WEIGHTS = {"a": 0.375, "b": 0.625}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", default=["0.15.0", "0.16.1", "0.17.0", "0.18.0", "0.19.2"])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "core_versions.json")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        print(json.dumps(save_merge_load(arguments.work)))
        return
    found = {}
    for version in arguments.versions:
        found[version] = try_version(version, arguments.work.resolve())
        print(version, json.dumps(found[version]), flush=True)
    result = {"python": platform.python_version(), "weights": WEIGHTS, "versions": found}
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def try_version(version: str, work: Path) -> dict[str, Any]:
    """Facts of save_merge_load, or {"failed": the step, "error": its last line}."""
    target, folder = work / f"core-{version}", work / f"checkpoints-{version}"
    if not target.exists():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--ignore-requires-python"]
        done = subprocess.run([*install, "--target", str(target), f"megatron-core=={version}"], capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(target, ignore_errors=True)
            return {"failed": "install", "error": last_line(done.stderr)}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    environment = os.environ | {"PYTHONPATH": f"{target}:{HERE.parent}", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=1",
        str(Path(__file__).resolve()),
    ]
    done = subprocess.run(
        [*command, "--inside", "--work", str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "Error" in line and "ChildFailedError" not in line]
        return {"failed": "run", "error": errors[-1] if errors else last_line(done.stderr)}
    return json.loads(done.stdout.splitlines()[-1])


def last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def save_merge_load(root: Path) -> dict[str, Any]:
    """In a process with one version of megatron.core: what it saved, and whether what it loads is the merge of it."""
    import warnings

    from megatron_demix.study import ModelSpec, ParallelSpec, TrainSpec
    from megatron_demix.train.compat import cpu_compat

    warnings.simplefilter("ignore")
    model_spec = ModelSpec(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        qk_layernorm=True,
        untie_embeddings_and_output_weights=True,
    )
    train, parallel = TrainSpec(seq_length=16, global_batch_size=2, precision="bf16"), ParallelSpec()
    with cpu_compat():
        import megatron.core
        import torch
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        from megatron_demix.checkpoint.reader import Checkpoint
        from megatron_demix.merge.engine import merge_checkpoints
        from megatron_demix.train.model import build_model, destroy_parallel, initialize_parallel

        initialize_parallel(parallel, seed=0, timeout_s=60)
        model = build_model(model_spec, train, parallel, 250)
        components: dict[str, dict[str, torch.Tensor]] = {}
        for name in WEIGHTS:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_()
            components[name] = {key: p.detach().clone() for key, p in model.named_parameters()}
            folder = root / name / "iter_0000010"
            folder.mkdir(parents=True)
            filesystem_async._results_queue = queue.Queue()
            state = {"model": model.sharded_state_dict(), "iteration": 10, "checkpoint_version": 3.0}
            dist_checkpointing.save(state, str(folder))
            (root / name / "latest_checkpointed_iteration.txt").write_text("10")
        parts = {name: root / name for name in WEIGHTS}
        (merged,) = merge_checkpoints(parts, {"merged": WEIGHTS}, root / "out", progress=False, verify="full")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(merged / "release"))
        model.load_state_dict(loaded["model"], strict=False)
        off = [
            key
            for key, p in model.named_parameters()
            if not torch.equal(
                p,
                sum(w * components[name][key].double() for name, w in WEIGHTS.items()).to(p.dtype),  # type: ignore[union-attr]
            )
        ]
        destroy_parallel()
    saved = Checkpoint(root / "a")
    return {
        "core": megatron.core.__version__,
        "torch": torch.__version__,
        "tensors": len(saved.model_tensors),
        "common_state": "common.pt" if (saved.location.path / "common.pt").exists() else "among the objects",
        "layers": "stacked" if any("layers.mlp" in key for key in saved.model_tensors) else "by themselves",
        "parameters_loaded": len(components["a"]) - len(off),
        "parameters_off": off,
    }


if __name__ == "__main__":
    main()
