"""What this machine has, what each thing is used for, and what to do where it is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass

from megatron_demix.errors import ConfigError


@dataclass(frozen=True)
class Finding:
    """One line of `demix doctor`. ok is False where something is missing, wanted or not."""

    name: str
    found: str
    ok: bool
    purpose: str
    advice: str


# distribution, module to find, what for, what to do where it is missing
_PACKAGES = (
    ("torch", "torch", "everything that trains or evaluates", "pip install torch"),
    ("megatron-core", "megatron.core", "models, parallelism, checkpoints", "pip install megatron-core"),
    ("gigatoken", "gigatoken", "fast tokenizing", "pip install gigatoken"),
    ("lightgbm", "lightgbm", "the lightgbm surrogate", "pip install megatron-demix[search]"),
    ("sentencepiece", "sentencepiece", "SentencePiece tokenizers", "pip install megatron-demix[data]"),
    ("pyarrow", "pyarrow", "Parquet input", "pip install megatron-demix[data]"),
    (
        "transformer-engine",
        "transformer_engine",
        "faster layers and FP8 on GPUs",
        "on a GPU machine: pip install megatron-demix[te]",
    ),
    ("lm-eval", "lm_eval", "task suites", "pip install megatron-demix[eval]"),
)


def examine() -> list[Finding]:
    """All findings. Imports nothing heavy: the GPU and the import of Transformer Engine are tried in child processes."""
    findings = [Finding("python", f"{platform.python_version()} on {platform.machine()}", True, "", "")]
    findings += [_package(*row) for row in _PACKAGES]
    findings.append(_compiled_core())
    findings.append(
        _probe(
            "CUDA",
            "import torch; print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else '')",
            "training at scale; without it everything runs on the CPU with gloo",
            "install a CUDA build of torch and a driver, if this machine has a GPU",
        )
    )
    if importlib.util.find_spec("transformer_engine"):
        # Its wheel installs anywhere, and raises other things than ImportError where it cannot work.
        findings.append(
            _probe(
                "transformer-engine works",
                "import transformer_engine.pytorch as te; print('yes')",
                "the layer spec that `model.transformer_impl: auto` then takes",
                "the local layer spec is used instead",
            )
        )
    apex = importlib.util.find_spec("amp_C") is not None
    findings.append(
        Finding(
            "apex (NVIDIA's)",
            "yes" if apex else "no",
            apex,
            "fused Adam",
            "" if apex else "optional; build from NVIDIA's source",
        )
    )
    for program, purpose in (
        ("sbatch", "running on SLURM"),
        ("nvcc", "compiling the CUDA merge"),
    ):
        path = shutil.which(program)
        findings.append(Finding(program, path or "not found", bool(path), purpose, "" if path else "optional"))
    return findings


def _package(distribution: str, module: str, purpose: str, advice: str) -> Finding:
    try:
        version = importlib.metadata.version(distribution)
        return Finding(distribution, version, True, purpose, "")
    except importlib.metadata.PackageNotFoundError:
        return Finding(distribution, "not installed", False, purpose, advice)


def _compiled_core() -> Finding:
    try:
        from megatron_demix.native import default_threads, instruction_set
    except ConfigError as e:
        return Finding("compiled core", "does not load", False, "merging, blending", str(e))
    return Finding("compiled core", f"{instruction_set()}, {default_threads()} threads", True, "merging, blending", "")


def _probe(name: str, code: str, purpose: str, advice: str) -> Finding:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    found = result.stdout.strip().splitlines()[-1] if result.returncode == 0 and result.stdout.strip() else "no"
    return Finding(name, found, found != "no", purpose, "" if found != "no" else advice)
