"""What every plot of the page shares: SVG text that takes its colours and fonts from the page's style, so that it follows light
and dark themes."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

# matplotlib knows no CSS variables: these stand-ins are drawn, and replaced in the SVG.
INK, MUTED, RULE, ACCENT, WARM = "#010101", "#010102", "#010103", "#010104", "#010105"
_VARIABLES = {INK: "--ink", MUTED: "--muted", RULE: "--rule", ACCENT: "--accent", WARM: "--warm"}
CELL, MEDIUM = (2.9, 2.4), (3.7, 2.6)
"""Width and height in inches; the page shows them slightly larger than that, whatever its width."""
SMALL = 8
NUM_COLOURS = 8
"""Of the categorical palette, --c0 ... in the style sheet."""
_SVG = "http://www.w3.org/2000/svg"


def colour_variable(index: int) -> str:
    """CSS variable of the index-th domain's colour."""
    return f"--c{index % NUM_COLOURS}"


def categorical(index: int) -> str:
    return f"#0102{index % NUM_COLOURS:02x}"


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(RULE)
    axes.grid(color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def legend(axes: Axes, **options: Any) -> None:
    axes.legend(frameon=False, fontsize=SMALL, labelcolor=INK, **options)


def render(figure: Figure, label: str, tips: Mapping[str, Sequence[str]] | None = None) -> str:
    """SVG text. tips: what to show when the pointer rests on the points (or the line) drawn with that gid."""
    for axes in figure.axes:
        axes.tick_params(colors=MUTED, labelsize=SMALL, length=0)
        for text in (axes.xaxis.label, axes.yaxis.label):
            text.set(color=MUTED, fontsize=SMALL)
        axes.title.set(color=INK, fontsize=9)
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # names of domains and scores may have dollars
    stream = io.StringIO()
    # The salt decides the ids of clip paths and markers: figures on one page must not share them, and runs must not differ.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ET.fromstring(stream.getvalue())
    _add_tips(root, tips or {})
    for element in root.iter():
        own = element.get("id", "")
        if own and not re.match(r"[mpC][0-9a-f]{6}|h[0-9a-f]{6}", own):
            del element.attrib["id"]  # "figure_1", "text_3": the same in every figure, and referred to by none.
    root.set("role", "img")
    root.set("aria-label", label)
    root.set("style", f"max-width:{figure.get_figwidth() * 1.45:.1f}in")
    del root.attrib["height"], root.attrib["width"]
    return re.sub(r"#0[0-9a-f]{5}", _themed, ET.tostring(root, encoding="unicode"))


def _add_tips(root: ET.Element, tips: Mapping[str, Sequence[str]]) -> None:
    for group in root.iter(f"{{{_SVG}}}g"):
        texts = tips.get(group.get("id", ""))
        if not texts:
            continue
        marks = list(group.iter(f"{{{_SVG}}}use")) or [group]
        for mark, text in zip(marks, texts, strict=True):
            title = ET.Element(f"{{{_SVG}}}title")
            title.text = text
            mark.insert(0, title)


def _themed(match: re.Match[str]) -> str:
    colour = match[0]
    if colour.startswith("#0102"):
        return f"var({colour_variable(int(colour[-2:], 16))})"
    return f"var({_VARIABLES[colour]})" if colour in _VARIABLES else colour


def shares_text(shares: Mapping[str, float]) -> str:
    """Of many domains the largest alone: every point of every figure has such a text."""
    shown = (
        shares if len(shares) <= _MOST_SHARES else dict(sorted(shares.items(), key=lambda item: -item[1])[: _MOST_SHARES - 1])
    )
    text = ", ".join(f"{name} {share:.1%}" for name, share in shown.items())
    return text if len(shown) == len(shares) else f"{text}, {len(shares) - len(shown)} more"


_MOST_SHARES = 8
