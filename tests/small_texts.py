"""A few hundred distinct documents, for studies that are planned, or whose scores are given."""

from __future__ import annotations

from pathlib import Path


def write_texts(folder: Path, *names: str, num: int = 200) -> None:
    """folder/<name>.jsonl for each."""
    for name in names:
        (folder / f"{name}.jsonl").write_text("".join(f'{{"text": "{name} text {i}"}}\n' for i in range(num)))
