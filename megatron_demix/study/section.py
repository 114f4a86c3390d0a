"""What every section of a study is made of: types with units, and a model that refuses unknown keys."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from megatron_demix.errors import DemixError
from megatron_demix.units import Cut, parse_bytes, parse_cut, parse_duration, parse_tokens


def _or_value_error(parse):
    """pydantic collects ValueErrors; our parsers raise ConfigError."""

    def validate(value: Any) -> Any:
        try:
            return parse(value)
        except DemixError as e:
            raise ValueError(str(e)) from e

    return BeforeValidator(validate)


Tokens = Annotated[int, Field(gt=0), _or_value_error(parse_tokens)]
Bytes = Annotated[int, Field(gt=0), _or_value_error(parse_bytes)]
Seconds = Annotated[int, Field(gt=0), _or_value_error(parse_duration)]
CutOff = Annotated[Cut, _or_value_error(lambda value: value if isinstance(value, Cut) else parse_cut(value))]
ExpandedPath = Annotated[Path, AfterValidator(lambda path: Path(os.path.expanduser(path)))]
ExpandedPattern = Annotated[str, AfterValidator(os.path.expanduser)]
"""Paths, and globs, that may begin with ~. A relative one starts at the study file's folder."""


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", text):
        raise ValueError(
            f"{text!r} becomes part of file names: expected ASCII letters, digits, '_', '.' or '-', a letter or digit first"
        )
    return text


Name = Annotated[str, AfterValidator(_name)]
Share = Annotated[float, Field(ge=0, lt=1)]
MixtureSpec = Literal["natural", "uniform"] | dict[str, float]


class Section(BaseModel):
    # JSON and the keys of artifacts know neither infinity nor NaN.
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


def nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else "."
