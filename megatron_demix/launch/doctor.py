"""What this machine has, what each thing is used for, whether it works (tried, not guessed), and what to do where it does not.

Which versions fit together is what the installed packages themselves say: this one's requirements and megatron-core's.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from megatron_demix.errors import ConfigError

State = Literal["works", "installed", "absent", "misfit", "broken"]
"""works: it was tried. installed: it was found, in a version that fits. misfit: in another. broken: it was tried, in vain."""
_LIMIT_S = 120


@dataclass(frozen=True)
class Finding:
    """One line of `demix doctor`. needed: without it nothing works; everything else is for what `purpose` says."""

    name: str
    state: State
    found: str
    purpose: str
    advice: str = ""
    needed: bool = False

    @property
    def is_problem(self) -> bool:
        """Whether something has to be done: a needed thing is missing, or a thing that is there does not work."""
        return self.state in ("misfit", "broken") or (self.needed and self.state == "absent")


@dataclass(frozen=True)
class _Package:
    distribution: str
    purpose: str
    extra: str | None = None
    """The extra of this package that brings it; None: it is always needed."""


_PACKAGES = (
    _Package("torch", "everything that trains, evaluates or exports"),
    _Package("megatron-core", "models, parallelism, checkpoints"),
    _Package("numpy", "everything"),
    _Package("gigatoken", "fast tokenizing"),
    _Package("tokenizers", "Hugging Face and trained tokenizers"),
    _Package("scikit-learn", "surrogates of the search"),
    _Package("lightgbm", "search.surrogate: lightgbm", "search"),
    _Package("datatrove", "cleaning", "data"),
    _Package("sentencepiece", "SentencePiece tokenizers", "data"),
    _Package("tiktoken", "tiktoken tokenizers", "data"),
    _Package("pyarrow", "Parquet input", "data"),
    _Package("zstandard", "text in .zst", "data"),
    _Package("camel-kenlm", "cleaning by perplexity", "data"),
    _Package("fasttext-numpy2-wheel", "cleaning by quality", "data"),
    _Package("nltk", "tools/preprocess_data.py --split-sentences", "data"),
    _Package("safetensors", "Hugging Face folders in and out", "hf"),
    _Package("transformers", "the judge of exported models, in the tests", "dev"),
    _Package("lm-eval", "tasks of lm-evaluation-harness", "eval"),
    _Package("math-verify", "tasks of format math", "eval"),
    _Package("transformer-engine", "fused layers and context parallelism, on GPUs", "te"),
)
_ALSO_FIT = {"megatron-core"}
"""Packages whose requirements, of all their extras, count beside ours."""


def examine() -> list[Finding]:
    """All findings. What might crash or is slow to import is tried in child processes."""
    return [
        Finding("python", "works", f"{platform.python_version()} on {platform.machine()}", "everything", needed=True),
        *(_package(package) for package in _PACKAGES),
        _compiled_core(),
        *_devices(),
        *_fused(),
        *_programs(),
    ]


def _package(package: _Package) -> Finding:
    name, purpose, needed = package.distribution, package.purpose, package.extra is None
    install = f"pip install 'megatron-demix{f'[{package.extra}]' if package.extra else ''}'"
    if name == "transformer-engine":
        install = f"optional, on a GPU machine: {install}"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "absent", "not installed", purpose, install, needed)
    for by, specifier in _required(name):
        if not specifier.contains(version, prereleases=True):
            wish = f"pip install '{name}{specifier}'"
            return Finding(name, "misfit", f"{version}, but {by} needs {specifier}", purpose, wish, needed)
    return Finding(name, "installed", version, purpose, needed=needed)


def _required(name: str) -> Iterator[tuple[str, Any]]:
    """(who, which versions) of every requirement on a package."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    for by in ("megatron-demix", *_ALSO_FIT):
        try:
            lines, version = importlib.metadata.requires(by) or [], importlib.metadata.version(by)
        except importlib.metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, lines):
            if canonicalize_name(requirement.name) == name and requirement.specifier:
                yield f"{by} {version}", requirement.specifier


def _compiled_core() -> Finding:
    """Loaded, and made to merge: two components at .25 and .75, in one step of the same code that merges checkpoints."""
    purpose = "merging, blending, tokenizing"
    try:
        import numpy as np

        from megatron_demix.native import MergePlan, default_threads, instruction_set

        plan = MergePlan(2)
        for value in (1.0, 2.0):
            plan.add_record(np.full(64, value, np.float32).view(np.uint8), 0)
        out = np.zeros(64, np.float32)
        target = plan.add_target([64], "float32", "float32")
        plan.add_region(target, [0], [64], [0, 1], [0, 0], [[1], [1]])
        plan.run(np.array([[[0.25, 0.75]]]), addresses_TM=np.array([[out.ctypes.data]]))
        found = f"{instruction_set()}, {default_threads()} threads"
    except (ConfigError, ValueError) as e:
        return Finding("compiled core", "broken", "does not load", purpose, str(e), needed=True)
    if not (out == 1.75).all():
        return Finding("compiled core", "broken", f"merges wrongly ({found})", purpose, "build it again: make", needed=True)
    return Finding("compiled core", "works", found, purpose, needed=True)


_TRY_DEVICES = """
import json, torch
facts = {"cuda": torch.version.cuda, "devices": []}
if torch.cuda.is_available():
    facts["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    ones = torch.ones(256, 256, dtype=torch.bfloat16, device="cuda")
    facts["multiplies"] = bool(((ones @ ones) == 256).all())
    import numpy
    from megatron_demix.merge import cuda
    facts["merge"] = "absent"
    if cuda.available() and cuda.runs_on(ones.device):
        out = torch.zeros(64, device="cuda")
        cuda.weighted_sum([ones[0, :64].float(), 2 * ones[0, :64].float()], [out], numpy.array([[.25, .75]], numpy.float32))
        facts["merge"] = "works" if bool((out == 1.75).all()) else "broken"
    else:
        facts["why"] = cuda.why_not() or "switched off by MEGATRON_DEMIX_CUDA, or not built for this GPU"
print(json.dumps(facts))
"""


def _devices() -> Iterator[Finding]:
    """CUDA, NCCL and the CUDA merge library, each made to compute something."""
    training = "training at scale; without it everything runs on CPUs, with gloo"
    tried = _try(_TRY_DEVICES)
    try:
        facts = json.loads(tried.found) if tried.ok else None
    except ValueError:
        facts = None
    if facts is None:
        yield Finding("CUDA", "broken", tried.found, training, "see the error of: python -c 'import torch; torch.cuda.init()'")
        return
    if not facts["devices"]:
        build = f"torch is built for CUDA {facts['cuda']}" if facts["cuda"] else "torch is built for CPUs"
        advice = "if this machine has a GPU: " + ("install its driver" if facts["cuda"] else "install a CUDA build of torch")
        yield Finding("CUDA", "absent", f"no device; {build}", training, advice)
    else:
        state: State = "works" if facts["multiplies"] else "broken"
        yield Finding("CUDA", state, f"{facts['cuda']}: {_counted(facts['devices'])}", training)
        yield Finding("NCCL", "installed", facts["nccl"], "collectives between GPUs")
    purpose = "merging proxies in GPU memory; without it the CPU does"
    if facts["devices"] and facts["merge"] != "absent":
        advice = "" if facts["merge"] == "works" else "build it again: pip install . where nvcc is"
        yield Finding("CUDA merge", facts["merge"], "libmerge_cuda.so", purpose, advice)
        return
    from megatron_demix.merge.cuda import LIBRARY

    built = LIBRARY.is_file()
    found = "built; " + (facts.get("why") or "no device to try it on") if built else "not built"
    yield Finding("CUDA merge", "installed" if built else "absent", found, purpose, "" if built else "build where nvcc is")


def _counted(names: list[str]) -> str:
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def _fused() -> Iterator[Finding]:
    """Transformer Engine and apex: their packages install where they cannot work, so they are imported."""
    if importlib.util.find_spec("transformer_engine"):
        tried = _try("import transformer_engine.pytorch as te; te.RMSNorm(16); print('imports')")
        purpose = "the layers that model.transformer_impl: auto takes; without it megatron.core's local ones"
        advice = "" if tried.ok else "it needs a GPU, and to be built for this torch and CUDA; without it nothing fails"
        # On a machine without a GPU that is as it should be: not a problem.
        yield Finding("Transformer Engine", "works" if tried.ok else "absent", tried.found, purpose, advice)
    purpose = "fused Adam; without it, and without Transformer Engine's, torch's AdamW"
    # The package that registries call apex is another one.
    if not importlib.util.find_spec("amp_C"):
        yield Finding("apex (NVIDIA's)", "absent", "not installed", purpose, "optional; build from NVIDIA's source")
        return
    tried = _try("from apex.optimizers import FusedAdam; print('imports')")
    advice = "" if tried.ok else "build it for this torch and CUDA, from NVIDIA's source"
    yield Finding("apex (NVIDIA's)", "works" if tried.ok else "broken", tried.found, purpose, advice)


def _programs() -> Iterator[Finding]:
    missing = [name for name in ("sbatch", "srun", "squeue", "scancel", "scontrol") if not shutil.which(name)]
    purpose = "launch.backend: slurm"
    if missing:
        yield Finding("SLURM", "absent", f"no {', '.join(missing)}", purpose, "submit from a machine of the cluster")
    else:
        yield _controller(purpose)
    home = [f"{os.environ['CUDA_HOME']}/bin"] if os.environ.get("CUDA_HOME") else []
    places = [*home, os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]  # as setup.py
    nvcc = shutil.which("nvcc", path=os.pathsep.join(places))
    advice = "" if nvcc else "optional; the CUDA toolkit"
    yield Finding("nvcc", "installed" if nvcc else "absent", nvcc or "not found", "compiling the CUDA merge", advice)


def _controller(purpose: str) -> Finding:
    def said(*command: str) -> tuple[int, str]:
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S)
        except (OSError, subprocess.TimeoutExpired) as e:
            return 1, str(e)
        return result.returncode, " ".join((result.stdout or result.stderr).split())

    code, answer = said("sbatch", "--version")
    version = answer if code == 0 else shutil.which("sbatch")
    code, answer = said("scontrol", "ping")
    if code == 0 and "UP" in answer:
        return Finding("SLURM", "works", f"{version}: its controller answers", purpose)
    advice = "submit from a machine of the cluster; `demix submit --dry-run` needs none"
    return Finding("SLURM", "installed", f"{version}: no controller answers", purpose, advice)


@dataclass(frozen=True)
class _Tried:
    ok: bool
    found: str
    """The last line it printed, or of its error."""


def _try(code: str) -> _Tried:
    try:
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=_LIMIT_S)
    except subprocess.TimeoutExpired:
        return _Tried(False, f"did not end within {_LIMIT_S} s")
    lines = (result.stdout if result.returncode == 0 else result.stderr).strip().splitlines()
    said = lines[-1].strip() if lines else f"ended with exit code {result.returncode}"
    return _Tried(result.returncode == 0, said if len(said) <= 2000 else f"{said[:2000]}...")
