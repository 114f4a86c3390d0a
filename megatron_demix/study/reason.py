"""What pydantic found wrong with a value, in the words of a study's author instead of its own."""

from __future__ import annotations

from typing import Any

from pydantic_core import ErrorDetails

_EXPECTED = {
    "mapping": ("model_type", "model_attributes_type", "dict_type", "mapping_type"),
    "list": ("list_type", "tuple_type", "set_type", "frozen_set_type"),
    "whole number": ("int_type", "int_parsing", "int_parsing_size", "int_from_float"),
    "number": ("float_type", "float_parsing"),
    "finite number": ("finite_number",),
    "path": ("path_type",),
    "number above {gt}": ("greater_than",),
    "number of at least {ge}": ("greater_than_equal",),
    "number below {lt}": ("less_than",),
    "number of at most {le}": ("less_than_equal",),
}
_FORMS = {kind: f"expected a {form}" for form, kinds in _EXPECTED.items() for kind in kinds} | {
    "missing": "missing",
    "extra_forbidden": "unknown key",
    "invalid_key": "unknown key",
    "string_type": "expected text, in quotes where YAML takes it for something else",
    "bool_type": "expected true or false",
    "bool_parsing": "expected true or false",
    "literal_error": "expected {expected}",
    "too_short": "expected {min_length} or more entries, found {actual_length}",
    "too_long": "expected at most {max_length} entries, found {actual_length}",
}
"""By pydantic's type of error. Those of other types are in its words."""
_WHOLE = ("missing", "extra_forbidden", "invalid_key", "too_short", "too_long")
"""Said without the value that was found."""


def reason(error: ErrorDetails) -> str:
    """One error of a ValidationError, without its place."""
    kind, message = error["type"], error["msg"]
    if kind == "value_error":  # ours
        return message.removeprefix("Value error, ")
    limits = {name: f"{value:g}" if isinstance(value, float) else value for name, value in error.get("ctx", {}).items()}
    said = _FORMS[kind].format(**limits) if kind in _FORMS else message
    return said if kind in _WHOLE else f"{said}, found {_seen(error['input'])}"


def _seen(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (dict, list)):
        return f"a {'mapping' if isinstance(value, dict) else 'list'}"
    return f"{value!r:.80}"
