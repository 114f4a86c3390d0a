"""YAML as people write it: a key that stands twice in one mapping is refused, where PyYAML takes the last one silently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megatron_demix.errors import ConfigError


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here and not in construct_mapping: by then merge keys (<<) may have put into a mapping what its own keys replace.
        node = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            earlier = first.setdefault((key.tag, key.value), key)
            if earlier is not key:
                raise yaml.composer.ComposerError(
                    None,
                    None,
                    f"the key {key.value!r} is given twice, first in line {earlier.start_mark.line + 1}; keep one of them",
                    key.start_mark,
                )
        return node

    def construct_scalar(self, node: Any) -> Any:
        # JSON, as which a study is handed on, has two escapes for a character beyond U+FFFF. PyYAML reads them as two halves.
        value = super().construct_scalar(node)
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def load_yaml(text: str) -> Any:
    """Plain data of a YAML document. Raises yaml.YAMLError; for a key given twice as well, with its line."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError as e:
        raise yaml.YAMLError("it is nested too deeply") from e
    except ValueError as e:  # what looks like a date, or a number, and is none
        raise yaml.YAMLError(str(e)) from e


def read_yaml(path: Path, what: str) -> Any:
    """load_yaml of a file. Raises ConfigError, which calls it `what`."""
    try:
        return load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise ConfigError(f"{what}: cannot be read: {e}") from e
