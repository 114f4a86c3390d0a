"""Reading a study: YAML and overrides, and errors that name the key, what was seen, and the nearest key there is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from megatron_demix.errors import ConfigError
from megatron_demix.study.data import CleanSpec
from megatron_demix.study.reason import reason
from megatron_demix.study.section import nearest
from megatron_demix.study.study import Study

_Checked = TypeVar("_Checked", bound=BaseModel)


def load_study(path: Path, overrides: list[str] | None = None) -> Study:
    """Read and check a study file. overrides: "a.b=value" as YAML, lists by index. Raises ConfigError, MixtureError."""
    from megatron_demix.yaml_file import read_yaml

    data = read_yaml(Path(path), f"study {path}")
    if not isinstance(data, dict):
        raise ConfigError(f"study {path}: expected a mapping with name, domains, model, ...; found {type(data).__name__}.")
    for override in overrides or []:
        _override(data, override)
    return checked(Study, data, f"study {path}")


def clean_spec(data: Mapping[str, Any]) -> CleanSpec:
    """What a study holds under prepare.clean, for use without a study. Raises ConfigError."""
    return checked(CleanSpec, data, "cleaning")


def checked(section: type[_Checked], data: Any, what: str) -> _Checked:
    """Raises ConfigError, which names `what` and says of every key that is wrong what was expected there."""
    try:
        return section.model_validate(data)
    except ValidationError as e:
        # A value that fits no form of a field gives one error a form: shown as one line a field.
        reasons: dict[str, list[str]] = {}
        for error in e.errors():
            reasons.setdefault(_place(error), []).append(_explain(error, section))
        lines = (f"  {where}: {', or '.join(found)}" if where else f"  {found[0]}" for where, found in reasons.items())
        raise ConfigError(f"{what}:\n" + "\n".join(lines)) from e


def _override(data: dict, text: str) -> None:
    import yaml

    from megatron_demix.yaml_file import load_yaml

    dotted, equals, value = text.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"--set {text!r}: expected key.subkey=value.")
    *parents, last = dotted.split(".")
    node: Any = data
    try:
        for part in parents:
            if isinstance(node, dict) and node.get(part) is None:
                node[part] = {}  # a section that is empty, or not there
            node = node[int(part) if isinstance(node, list) else part]
        node[int(last) if isinstance(node, list) else last] = load_yaml(value)
    except yaml.YAMLError as e:
        raise ConfigError(f"--set {text!r}: {value!r} is not YAML ({' '.join(str(e).split())}).") from e
    except (ValueError, IndexError, TypeError, AttributeError) as e:
        raise ConfigError(f"--set {text!r}: the study has no such place ({e}).") from e


def _place(error: ErrorDetails) -> str:
    """Dotted path of the offending key; pydantic's names for the forms of a union, as in "dict[str,float]", are left out."""
    *parents, last = error["loc"] or ("",)
    forms = {"int", "float", "str", "bool"} if parents else set()  # of a value, so that they come last
    return ".".join(str(part) for part in (*parents, *([] if last in forms else [last])) if "[" not in str(part))


def _explain(error: ErrorDetails, root: type[BaseModel]) -> str:
    if error["type"] not in ("extra_forbidden", "invalid_key"):
        return reason(error)
    section = _section_at(root, error["loc"][:-1])
    known = list(section.model_fields) if section else []
    return f"unknown key{nearest(str(error['loc'][-1]), known)}" + (f" Known here: {', '.join(known)}." if known else "")


def _section_at(root: type[BaseModel], location: tuple) -> type[BaseModel] | None:
    known: Any = root
    for part in location:
        if isinstance(known, type) and issubclass(known, BaseModel):
            field = known.model_fields.get(part)
            known = field and field.annotation
        elif get_origin(known) in (list, dict, tuple):  # the part is an index or a name
            known = get_args(known)[-1]
        else:
            return None
        if isinstance(known, UnionType) or get_origin(known) is Union:
            known = next((form for form in get_args(known) if form is not type(None)), None)
    return known if isinstance(known, type) and issubclass(known, BaseModel) else None
