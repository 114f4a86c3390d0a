"""The compiled core itself, or an error that says how to build it. The only importer of megatron_demix._core."""

from __future__ import annotations

from megatron_demix.errors import ConfigError

try:
    from megatron_demix import _core as core  # type: ignore[attr-defined]
except ImportError as e:
    raise ConfigError(
        f"the compiled core of megatron_demix cannot be loaded ({e}). Build it with `pip install .`, or in a checkout with "
        "`python setup.py build_ext --inplace`, where a C++17 compiler is installed."
    ) from e

__all__ = ["core"]
