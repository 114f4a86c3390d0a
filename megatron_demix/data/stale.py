"""Megatron caches its sample indexes by path, not by content: a new blend under an old path would be read with old indexes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path


def stale_indexes(prefix: Path, index_cache: Path | None = None) -> list[Path]:
    """Descriptions of cached GPTDataset indexes made for this path prefix, in Megatron's default place (`<prefix>/cache`) and
    in index_cache, the run's --data-cache-path."""
    names = {str(prefix), str(prefix.resolve())}
    found = []
    for folder in (prefix / "cache", index_cache):
        if folder is None or not folder.is_dir():
            continue
        for path in sorted(folder.rglob("*-description.txt")):
            try:
                described = json.loads(path.read_text()).get("dataset_path")
            except (OSError, ValueError, AttributeError):
                continue
            if described in names:
                found.append(path)
    return found


def warn_of_stale_indexes(prefix: Path, index_cache: Path | None) -> None:
    """Warn, naming the files to delete, before a new blend is published at a path Megatron has indexed."""
    from megatron_demix.data.blend_files import manifest_path

    if manifest_path(prefix).exists():
        return  # nothing new will appear there
    if found := stale_indexes(prefix, index_cache):
        warnings.warn(
            f"Megatron has cached indexes of other data under {prefix} ({found[0]}{' and more' if len(found) > 1 else ''}) and "
            "would read this blend with them. Delete them, or choose another output.",
            stacklevel=3,
        )
