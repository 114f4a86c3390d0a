"""Builds the compiled core (csrc/). Everything else is declared in pyproject.toml."""

from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

# Instruction sets are chosen at run time inside the sources, so no -march here: one build runs on any x86-64 or Arm machine.
core = Pybind11Extension(
    "megatron_demix._core",
    sorted(str(p) for p in Path("csrc").glob("*.cpp")),
    cxx_std=17,
    extra_compile_args=["-O3", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra"],
    extra_link_args=["-pthread"],
    depends=sorted(str(p) for p in Path("csrc").glob("*.hpp")),
)

setup(ext_modules=[core])
