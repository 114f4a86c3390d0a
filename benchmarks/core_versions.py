#!/usr/bin/env python3
"""Which versions of megatron.core this project works with, and whether what different versions saved merges.

    python benchmarks/core_versions.py --work /scratch/cores --newer-python python3.12

For each version: the tests that use megatron.core, in processes that have it (merges of its checkpoints, the trainer, layouts
over ranks, Hugging Face conversion, indexed data); then it saves a model of values that depend on names alone. At last all
versions' checkpoints are merged with one another, with the oldest and with the newest one's keys, and the oldest and the newest
version load both results. Writes benchmarks/results/core_versions.json; ends with 1 if anything failed.

Given some versions, it renews their part of the record, and the merge of all whose checkpoints are still in --work.

Nothing is installed outside of --work. Versions that want a newer Python than this one run in --newer-python: as it is, if it
has torch and pytest; else in a virtual environment made of it, with this Python's version of torch (pip's own settings say from
where).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ["0.15.3", "0.16.1", "0.17.1", "0.18.2", "0.19.2"]
TESTS = [
    "tests/unit/merge/test_core_models.py",
    "tests/unit/train",
    "tests/unit/huggingface",
    "tests/unit/indexed/test_indexed_stock.py",
    "tests/distributed/test_merge_layouts.py",
    "tests/distributed/test_train_layouts.py",
]
# Beside what pyproject.toml lists: newer versions import triton, which a CPU build of torch does not bring along.
ALSO = ["pytest", "pytest-timeout", "hypothesis", "transformers", "safetensors", "pybind11", "setuptools<82", "triton"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", default=VERSIONS)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--newer-python", default="python3.12", help="for versions that this Python is too old for")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "core_versions.json")
    parser.add_argument("--inside", choices=("save", "load"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        print(json.dumps(save(arguments.folder) if arguments.inside == "save" else load(arguments.folder)))
        return 0
    work = arguments.work.resolve()
    source = work / "source"
    shutil.rmtree(source, ignore_errors=True)
    for part in ("megatron_demix", "csrc", "tests", "benchmarks", "tools", "examples"):
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("*.so", "__pycache__", "corpus", "runs"))
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    found: dict[str, Any] = json.loads(arguments.output.read_text())["versions"] if arguments.output.exists() else {}
    known = [version for version in found if (work / f"saved-{version}").exists()]
    versions = sorted({*known, *arguments.versions}, key=lambda version: tuple(map(int, version.split("."))))
    cores = {version: Core(version, work, source, arguments.newer_python) for version in versions}
    for version in arguments.versions:
        core = cores[version]
        shutil.rmtree(core.saved, ignore_errors=True)
        found[version] = core.inside("save", core.saved) | core.tests()
        print(version, json.dumps(found[version]), flush=True)
    together = merge_together(work, list(cores.values()))
    print("together", json.dumps(together), flush=True)
    arguments.output.write_text(
        json.dumps({"tests": TESTS, "versions": dict(sorted(found.items())), "together": together}, indent=1) + "\n"
    )
    sound = all(not facts["failed"] for facts in found.values()) and all(not merged["off"] for merged in together)
    return 0 if sound else 1


class Core:
    """One version of megatron.core, by itself in a folder, and the Python that runs it."""

    def __init__(self, version: str, work: Path, source: Path, newer_python: str) -> None:
        self.version, self.source = version, source
        self.saved = work / f"saved-{version}"
        self.python, self.path = sys.executable, self.install(sys.executable, work / f"core-{version}")
        metadata = next(self.path.glob("megatron_core-*.dist-info")) / "METADATA"
        wanted = re.search(r"^Requires-Python: >=3\.(\d+)", metadata.read_text(), re.MULTILINE)
        if wanted is not None and sys.version_info < (3, int(wanted[1])):
            # It has compiled parts, too: installed once more, by the Python that runs it.
            self.python = with_packages(newer_python, work)
            self.path = self.install(self.python, work / f"core-{version}-{Path(newer_python).name}")
        run([self.python, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=source, MEGATRON_DEMIX_CUDA="0")

    def install(self, python: str, folder: Path) -> Path:
        if not folder.exists():
            command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--ignore-requires-python"]
            run([*command, "--target", str(folder), f"megatron-core=={self.version}"])
        return folder

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": f"{self.path}:{self.source}", "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [self.python, *command], cwd=self.source, env=environment, capture_output=True, text=True, timeout=1500
        )

    def tests(self) -> dict[str, Any]:
        """How many passed, and the names of those that did not."""
        done = self.run(["-m", "pytest", "-p", "no:cacheprovider", "--tb=line", *TESTS])
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
        count = {word: int(n) for n, word in re.findall(r"(\d+) (passed|skipped|failed|error)", done.stdout[-2000:])}
        if done.returncode not in (0, 1) or (done.returncode and not failed):
            raise SystemExit(f"{self.version}: pytest ended with {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-2000:]}")
        assert count.get("passed"), done.stdout[-3000:]
        return {"passed": count["passed"], "skipped": count.get("skipped", 0), "failed": failed}

    def inside(self, what: str, folder: Path) -> dict[str, Any]:
        """save() or load() in a process with this version."""
        done = self.run(
            [f"{self.source}/benchmarks/core_versions.py", "--inside", what, "--folder", str(folder), "--work", "."]
        )
        if done.returncode:
            raise SystemExit(f"{self.version}: {what} {folder} failed\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
        return json.loads(done.stdout.splitlines()[-1])


def run(command: list[str], cwd: Path | None = None, **environment: str) -> None:
    subprocess.run(command, cwd=cwd, env=os.environ | environment, check=True)


def with_packages(python: str, work: Path) -> str:
    """This interpreter, or one of a virtual environment of it, with all that megatron.core and this project need."""
    if subprocess.run([python, "-c", "import torch, pytest, pybind11"], capture_output=True).returncode == 0:
        return python
    made = work / Path(python).name
    ready = made / "ready"
    if not ready.exists():
        import tomllib

        import torch

        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        needed = [package for package in project["dependencies"] if not package.startswith(("torch", "megatron-core"))]
        run([python, "-m", "venv", str(made)])
        torch_version = torch.__version__.partition("+")[0]
        run([str(made / "bin" / "pip"), "install", "--quiet", f"torch=={torch_version}", *needed, *ALSO])
        ready.touch()
    return str(made / "bin" / "python")


# --- in a process with one version of megatron.core -----------------------------------------------------------------------


def build() -> Any:
    """A small model of it, on one rank. Call inside cpu_compat()."""
    from megatron_demix.study.training import ModelSpec, ParallelSpec, TrainSpec
    from megatron_demix.train.model import build_model, initialize_parallel

    spec = ModelSpec(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        qk_layernorm=True,
        untie_embeddings_and_output_weights=True,
    )
    initialize_parallel(ParallelSpec(), seed=0, timeout_s=60)
    train = TrainSpec(seq_length=16, global_batch_size=2, precision="bf16")
    return build_model(spec, train, ParallelSpec(), 250)


def drawn(name: str, key: str, shape: Any) -> Any:
    """Values of a parameter that depend on names alone: few-bit fractions, whose weighted sums need no rounding in float32."""
    import torch

    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {key}".encode()))
    return (torch.randint(-64, 64, tuple(shape), generator=generator) / 16).bfloat16()


def save(folder: Path) -> dict[str, Any]:
    """A run's root at `folder`, and what is in it."""
    import platform
    import queue
    import warnings

    from megatron_demix.train.compat import cpu_compat

    warnings.simplefilter("ignore")
    with cpu_compat():
        import torch
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        from megatron_demix.checkpoint.reader import Checkpoint
        from megatron_demix.train.model import destroy_parallel

        model = build()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(drawn(folder.name, key, parameter.shape))
        (folder / "iter_0000010").mkdir(parents=True)
        if hasattr(filesystem_async, "_results_queue"):
            filesystem_async._results_queue = queue.Queue()
        arguments = argparse.Namespace(hidden_size=32, consumed_train_samples=640)
        state = {"model": model.sharded_state_dict(), "args": arguments, "iteration": 10, "checkpoint_version": 3.0}
        dist_checkpointing.save(state, str(folder / "iter_0000010"))
        (folder / "latest_checkpointed_iteration.txt").write_text("10")
        destroy_parallel()
    saved = Checkpoint(folder)
    inside = not (saved.location.path / "common.pt").exists()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tensors": len(saved.model_tensors),
        "common_state": "among the objects" if inside else "common.pt",
        "layers": "stacked" if any("layers.mlp" in key for key in saved.model_tensors) else "by themselves",
    }


def load(folder: Path) -> dict[str, Any]:
    """How many parameters of a merged checkpoint are, bit for bit, the weighted sum of what was saved, and which are not."""
    import warnings

    from megatron_demix.train.compat import cpu_compat

    warnings.simplefilter("ignore")
    weights = json.loads(folder.with_suffix(".json").read_text())
    with cpu_compat():
        import torch
        from megatron.core import dist_checkpointing

        from megatron_demix.train.model import destroy_parallel

        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(folder / "release"))
        model.load_state_dict(loaded["model"], strict=True)
        off, parameters = [], dict(model.named_parameters())
        for key, parameter in parameters.items():
            exact = sum(w * drawn(name, key, parameter.shape).double() for name, w in weights.items())
            if not torch.equal(parameter, exact.to(parameter.dtype)):  # type: ignore[union-attr]
                off.append(key)
        destroy_parallel()
    return {"equal": len(parameters) - len(off), "off": off}


def merge_together(work: Path, cores: list[Core]) -> list[dict[str, Any]]:
    """Merge what all versions saved, in both orders; the oldest and the newest version load the results."""
    from megatron_demix.merge.engine import merge_checkpoints

    found = []
    for first, order in ((cores[0], cores), (cores[-1], cores[::-1])):
        out = work / f"merged-like-{first.version}"
        shutil.rmtree(out, ignore_errors=True)
        parts = {core.saved.name: core.saved for core in order}
        # Powers of two that sum to 1.
        shares = [2.0 ** -min(k + 1, len(order) - 1) for k in range(len(order))]
        weights = dict(zip(sorted(parts), shares, strict=True))
        merge_checkpoints(parts, {"all": weights}, out, into_output=True, progress=False, verify="full")
        out.with_suffix(".json").write_text(json.dumps(weights))
        for core in (cores[0], cores[-1]):
            found.append({"keys_of": first.version, "loaded_by": core.version} | core.inside("load", out))
    return found


if __name__ == "__main__":
    sys.exit(main())
