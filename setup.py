"""Builds the compiled core (csrc/), and the CUDA kernels (csrc/cuda/) where nvcc is found. The rest is in pyproject.toml.

MEGATRON_DEMIX_CUDA=auto|0|1 (1: fail where nvcc is missing), MEGATRON_DEMIX_CUDA_ARCHS="80;90".
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import setuptools
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

# With --no-build-isolation pip takes the one that is there, and what an older one says of pyproject.toml is hard to read.
if int(setuptools.__version__.partition(".")[0]) < 77:
    raise SystemExit(
        f"setuptools {setuptools.__version__} is too old to build megatron_demix, which needs 77 or newer: "
        "pip install 'setuptools>=77', or leave out --no-build-isolation."
    )

# Instruction sets are chosen at run time inside the sources, so no -march here: one build runs on any x86-64 or Arm machine.
core = Pybind11Extension(
    "megatron_demix._core",
    sorted(str(p) for p in Path("csrc").glob("*.cpp")),
    cxx_std=17,
    extra_compile_args=["-O3", "-fvisibility=hidden", "-ffp-contract=off", "-pthread", "-Wall", "-Wextra"],
    extra_link_args=["-pthread"],
    depends=sorted(str(p) for p in Path("csrc").glob("*.hpp")),
)


class BuildAll(build_ext):
    def run(self) -> None:
        super().run()
        wanted = os.environ.get("MEGATRON_DEMIX_CUDA", "auto")
        home = [f"{os.environ['CUDA_HOME']}/bin"] if os.environ.get("CUDA_HOME") else []
        places = [*home, os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
        nvcc = shutil.which("nvcc", path=os.pathsep.join(places))
        if wanted not in ("auto", "0", "1"):
            raise SystemExit(f"MEGATRON_DEMIX_CUDA is {wanted!r}, expected auto, 0 or 1.")
        if wanted == "1" and nvcc is None:
            raise SystemExit(
                "MEGATRON_DEMIX_CUDA is 1, but there is no nvcc in CUDA_HOME or PATH. Install the CUDA toolkit, or set it to 0."
            )
        if wanted != "0" and nvcc is not None:
            folder = Path("megatron_demix") if self.inplace else Path(self.build_lib) / "megatron_demix"
            self._compile_cuda(nvcc, folder / "libmerge_cuda.so", required=wanted == "1")

    def _compile_cuda(self, nvcc: str, target: Path, *, required: bool) -> None:
        """A library of its own with the run-time linked in, loaded with ctypes: the core never depends on CUDA."""
        source = Path("csrc/cuda/merge.cu")
        made_from = [source, *Path("csrc/cuda").glob("*.hpp"), Path("csrc/dtype.hpp")]
        archs = [arch.strip() for arch in os.environ.get("MEGATRON_DEMIX_CUDA_ARCHS", "80;90").split(";")]
        if not all(re.fullmatch("[0-9]+[a-z]?", arch) for arch in archs):
            raise SystemExit(f"MEGATRON_DEMIX_CUDA_ARCHS is {';'.join(archs)!r}, expected numbers such as 80;90.")
        lowest = min(archs, key=lambda arch: int(arch.rstrip("abcdefghijklmnopqrstuvwxyz")))
        codes = [flag for a in archs for flag in ("-gencode", f"arch=compute_{a},code=sm_{a}")]
        # For all that are newer than the lowest one and not listed: the driver translates it.
        codes += ["-gencode", f"arch=compute_{lowest},code=compute_{lowest}"]
        flags = ["-std=c++17", "-O3", "--threads", "0", "-cudart", "static", "--shared"]
        flags += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
        built = Path(self.build_temp) / "merge_cuda.built"
        wanted = " ".join([str(target), nvcc, *flags, *codes])
        new = target.exists() and target.stat().st_mtime >= max(file.stat().st_mtime for file in made_from)
        if new and built.is_file() and built.read_text() == wanted:
            return
        unfinished = target.with_suffix(f".{os.getpid()}.so")
        try:
            subprocess.run([nvcc, *flags, *codes, "-o", str(unfinished), str(source)], check=True)
            unfinished.rename(target)
            built.parent.mkdir(parents=True, exist_ok=True)
            built.write_text(wanted)
        except subprocess.CalledProcessError as e:
            if required:
                raise SystemExit(f"nvcc could not compile {source}; see above.") from e
            print(f"warning: nvcc could not compile {source}; merges on GPUs will go through the CPU.")
        finally:
            unfinished.unlink(missing_ok=True)


ParallelCompile().install()  # a file a core
setup(ext_modules=[core], cmdclass={"build_ext": BuildAll})
