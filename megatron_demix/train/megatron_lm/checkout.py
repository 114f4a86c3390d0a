"""A user's checkout of Megatron-LM: which version it is, read from its files and never run or changed."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_demix.errors import ConfigError

SUPPORTED = {
    (0, 15): "core_v0.15.3",
    (0, 16): "core_v0.16.1",
    (0, 17): "core_v0.17.1",
    (0, 18): "core_v0.18.2",
    (0, 19): "core_v0.19.0",
    (0, 20): "main (d98e8a64)",
}
"""By version: the tag, or branch and commit, that `benchmarks/megatron_lm.py` was run with; its results say how far."""
_KNOWS_NUMPY_2 = (0, 16)
_NEEDS_PYTHON_312 = (0, 18)
_PACKAGE_INFO = Path("megatron") / "core" / "package_info.py"


@dataclass(frozen=True)
class Checkout:
    path: Path
    """Absolute: it goes into a command that starts elsewhere."""
    version: tuple[int, int]
    """Major and minor of its megatron/core."""

    @classmethod
    def open(cls, path: Path) -> Checkout:
        """Raises ConfigError where there is no Megatron-LM, or one of another version."""
        path = Path(path).resolve()
        try:
            text = (path / _PACKAGE_INFO).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(
                f"trainer.checkout {path}: no Megatron-LM there ({_PACKAGE_INFO} cannot be read). Give the folder that holds "
                "pretrain_gpt.py."
            ) from e
        numbers = [re.search(rf"^{name}\s*=\s*(\d+)", text, re.MULTILINE) for name in ("MAJOR", "MINOR")]
        version = tuple(int(n[1]) for n in numbers if n)
        if version not in SUPPORTED:
            found = ".".join(map(str, version)) or "of an unknown version"
            raise ConfigError(
                f"trainer.checkout {path}: is Megatron-LM {found}; supported are {supported()}. Check out one of these in a "
                "folder of its own, or set trainer.backend: megatron_core."
            )
        if version >= _NEEDS_PYTHON_312 and sys.version_info < (3, 12):
            raise ConfigError(
                f"trainer.checkout {path}: Megatron-LM {version[0]}.{version[1]} needs Python 3.12, and this is "
                f"{platform.python_version()}. Run demix with a newer Python, or check out {SUPPORTED[0, 17]} or older."
            )
        if version < _KNOWS_NUMPY_2 and int((numpy := importlib.metadata.version("numpy")).split(".")[0]) > 1:
            raise ConfigError(
                f"trainer.checkout {path}: Megatron-LM {version[0]}.{version[1]} cannot save with NumPy {numpy}. Install "
                f"'numpy<2', or check out {SUPPORTED[_KNOWS_NUMPY_2]} or newer."
            )
        return cls(path, (version[0], version[1]))

    def script(self, script: Path) -> Path:
        """An entry script: of the checkout, or one's own. Raises ConfigError where there is none."""
        found = self.path / script
        if not found.is_file():
            raise ConfigError(f"trainer.script {script}: {found} does not exist; a relative path starts at the checkout.")
        return found


def supported() -> str:
    return ", ".join(f"{major}.{minor} ({tag})" for (major, minor), tag in SUPPORTED.items())
