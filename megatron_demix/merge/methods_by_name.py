"""The merge methods by name, with the options that each has."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

from megatron_demix.errors import ConfigError
from megatron_demix.merge.logical_tensors import UNKNOWN, FusedLayout
from megatron_demix.merge.methods import Linear, Method
from megatron_demix.merge.sparse import Sparse
from megatron_demix.merge.spherical import COEFFICIENTS, Spherical
from megatron_demix.study.choices import MERGE_OPTIONS

OPTIONS = {name: tuple(o for o in options if o != "from_base") for name, options in MERGE_OPTIONS.items()}
"""Beside the base."""


def make_method(name: str, base: Path | None = None, *, layout: FusedLayout = UNKNOWN, **options: Any) -> Method:
    """A method with its options; one that is None is not given. layout: what is known of fused projections.

    Raises ConfigError for an option that the method does not have, or one that it needs.
    """
    if name not in OPTIONS:
        raise ConfigError(f"method {name!r} is not one of {', '.join(OPTIONS)}.")
    given = {option: value for option, value in options.items() if value is not None}
    for option in given:
        if option not in OPTIONS[name]:
            has = f"its options are {', '.join(OPTIONS[name])}" if OPTIONS[name] else "it has no options"
            raise ConfigError(f"method {name} has no {option}: {has}.")
    if "density" in OPTIONS[name] and "density" not in given:
        raise ConfigError(f"method {name} needs a density: the share of each delta that stays, such as 0.5.")
    if name == "linear":
        return Linear(base, **given)
    if name in COEFFICIENTS:
        return Spherical(base, cast(Literal["multislerp", "karcher"], name), layout)
    return Sparse(base, name, layout=layout, **given)
