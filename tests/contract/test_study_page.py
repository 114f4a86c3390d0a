"""docs/STUDY.md lists every key of a study with its true default."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from megatron_demix.study.study import Study

PAGE = Path(__file__).parents[2] / "docs" / "STUDY.md"
EXAMPLES = {"name", "domains.name", "domains.inputs", "base.tokens"}  # no default, or one that excludes the other choice


@pytest.fixture(scope="module")
def page() -> tuple[dict[str, Any], set[str]]:
    """The page's study, and its keys (without their sections) that are marked as required."""
    text = PAGE.read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    return yaml.safe_load(text), set(re.findall(r"^ *(?:- )?(\w+):[^#\n]*# required", text, re.MULTILINE))


def documented(written: Any, section: type[BaseModel], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """{dotted key: (value on the page, field)}, for every field of the section. A key that is absent fails."""
    found = {}
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        inner = field.annotation
        if getattr(inner, "__origin__", None) is list:
            inner = inner.__args__[0]  # type: ignore[union-attr]
            value = written[name][0] if isinstance(written[name], list) and written[name] else None
        else:
            assert name in written, f"docs/STUDY.md lacks {key}"
            value = written[name]
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found |= documented(value, inner, f"{key}.")
        else:
            found[key] = (written[name], field)
    return found


def test_the_page_is_a_valid_study(page):
    Study.model_validate(page[0])


def test_every_key_is_there_with_its_default(page):
    data, required = page
    for key, (value, field) in documented(data, Study).items():
        if field.is_required():
            assert key.split(".")[-1] in required, f"{key} is required"
        elif key not in EXAMPLES:
            default = field.get_default(call_default_factory=True)
            plain = list(default) if isinstance(default, tuple) else str(default) if isinstance(default, Path) else default
            assert value == plain, key
