"""What is packed for an installation is all that it needs, and an installation holds all of the package."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_BUILT = {"__pycache__", "egg-info", ".so"}


def files_of(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and not any(part.endswith(tuple(_BUILT)) for part in path.parts)
    }


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, made from a copy of the tree without anything that was built there."""
    tree, made = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("made")
    for name in ("megatron_demix", "csrc", "tools"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    subprocess.run([sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", made], cwd=tree, check=True)
    (archive,) = made.iterdir()
    with tarfile.open(archive) as packed:
        packed.extractall(made, filter="data")
    return made / archive.name.removesuffix(".tar.gz")


@pytest.mark.parametrize("folder", ["megatron_demix", "csrc", "tools"])
def test_a_source_distribution_has_every_source(unpacked, folder):
    assert files_of(unpacked / folder) == files_of(ROOT / folder)


def test_an_installation_has_the_whole_package(unpacked, tmp_path):
    subprocess.run([sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", tmp_path], cwd=unpacked, check=True)
    assert files_of(tmp_path / "megatron_demix") == files_of(ROOT / "megatron_demix")


def test_a_setuptools_that_is_too_old_is_named(unpacked, tmp_path):
    """As with pip's --no-build-isolation, in an environment that holds an older one."""
    (tmp_path / "sitecustomize.py").write_text("import setuptools\nsetuptools.__version__ = '65.5.0'\n")
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=unpacked,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("setuptools 65.5.0 is too old to build megatron_demix, which needs 77 or newer: pip install")
