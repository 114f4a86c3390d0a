#!/usr/bin/env python3
"""The three-stage recipe of the DeMix Corpora as a plan: tokens and epochs of each of its 36 sources, repeats flagged.

    python examples/paper/recipe.py                     # the plan as a table
    python examples/paper/recipe.py --write DIR         # pool.yaml and mixture.json for tools/build_blend.py

The pool expects each source as DIR/data/<source>_text_document.bin and .idx.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_demix.artifact import json_text, write_new
from megatron_demix.exits import exit_code

CORPORA = Path(__file__).with_name("corpora.yaml")
DEMIX_224 = {
    "general": 0.218,
    "math_1": 0.403,
    "math_2": 0.002,
    "math_3": 0.063,
    "code_1": 0.044,
    "code_2": 0.176,
    "code_3": 0.094,
}
"""Merge weights of the mixture that the paper's 224 proxies found."""
ANCHOR_SHARE = 0.5
"""Of general data in every component: DEMIX_224 stands for half general data and half itself."""


@dataclass(frozen=True)
class Source:
    """tokens: what there is; stages: what each stage takes; in billions. candidate: the set of the search it belongs to."""

    name: str
    title: str
    candidate: str
    tokens: int
    stages: tuple[int, ...]

    def epochs(self, stage: int) -> float:
        return self.stages[stage] / self.tokens

    @property
    def all_epochs(self) -> float:
        return sum(self.stages) / self.tokens


def read_sources() -> list[Source]:
    sources = yaml.safe_load(CORPORA.read_text(encoding="utf-8"))["sources"]
    return [Source(name, s["title"], _candidate(s), s["tokens"], tuple(s["stages"])) for name, s in sources.items()]


def _candidate(source: dict[str, Any]) -> str:
    """The search knows one general set, whatever the language and grade, and three grades of code and mathematics."""
    general = source["category"] in ("general", "multilingual")
    return "general" if general else f"{source['category']}_{source['grade']}"


def actual_shares() -> dict[str, float]:
    """The data that DEMIX_224 stands for."""
    return {name: ANCHOR_SHARE * (weight + (name == "general")) for name, weight in DEMIX_224.items()}


def curriculum(sources: list[Source]) -> dict[str, Any]:
    """mixture.json of tools/build_blend.py: the shares and the budget of each stage."""
    totals = [sum(s.stages[n] for s in sources) for n in range(3)]
    return {
        "stages": [
            {"weights": {s.name: s.stages[n] / total for s in sources}, "tokens": f"{total}B"} for n, total in enumerate(totals)
        ]
    }


def pool(sources: list[Source]) -> dict[str, Any]:
    """pool.yaml of tools/build_blend.py. max_epochs: what the recipe takes over all stages, and a hundredth for rounding."""
    return {
        "domains": {
            s.name: {"prefixes": [f"data/{s.name}_text_document"], "max_epochs": math.ceil(100 * s.all_epochs + 1) / 100}
            for s in sources
        }
    }


def table(sources: list[Source]) -> str:
    lines = [f"{'source':22} {'set':8} {'tokens':>7}  {'stage 1':>14} {'stage 2':>14} {'stage 3':>14}  {'all':>6}"]
    for s in sources:
        cells = (f"{s.stages[n]:6}B x{s.epochs(n):5.2f}" if s.stages[n] else "-" for n in range(3))
        flag = "repeated more than 4 times" if s.all_epochs > 4 else "repeated" if s.all_epochs > 1 else ""
        lines.append(
            f"{s.title:22} {s.candidate:8} {s.tokens:6}B  "
            + " ".join(f"{c:>14}" for c in cells)
            + f"  x{s.all_epochs:5.2f} {flag}".rstrip()
        )
    totals = [sum(s.stages[n] for s in sources) for n in range(3)]
    lines.append(
        f"{'all':22} {'':8} {sum(s.tokens for s in sources):6}B  "
        + " ".join(f"{t:6}B       " for t in totals)
        + f" {sum(totals):6}B"
    )
    return "\n".join(lines)


def main() -> int:
    return exit_code(run)


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="DIR")
    folder = parser.parse_args().write
    sources = read_sources()
    if folder is None:
        print(table(sources))
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    described, mixture = folder / "pool.yaml", folder / "mixture.json"
    write_new({described: yaml.safe_dump(pool(sources), sort_keys=False), mixture: json_text(curriculum(sources))})
    print(f"wrote {described} and {mixture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
