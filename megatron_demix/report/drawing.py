"""What every plot of the page shares: SVG text that takes its colours and fonts from the page's style, so that it follows light
and dark themes."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator

# matplotlib knows no CSS variables: these stand-ins are drawn, and replaced in the SVG.
INK, MUTED, RULE, ACCENT, WARM, OTHERS = "#010101", "#010102", "#010103", "#010104", "#010105", "#010106"
_VARIABLES = {INK: "--ink", MUTED: "--muted", RULE: "--rule", ACCENT: "--accent", WARM: "--warm", OTHERS: "--others"}
CELL, MEDIUM = (2.9, 2.4), (3.7, 2.6)
"""Width and height in inches; the page shows them slightly larger than that, whatever its width."""
SMALL = 8
NUM_COLOURS = 8
"""Of the categorical palette, --c0 ... in the style sheet."""
COLOURED = NUM_COLOURS - 1
"""Of many domains, those that have a colour of their own; the last of the palette is grey, as the others are."""
MOST_TIPS = 150
"""Points of a group that each have a text; more are drawn as one, without texts: 800 points in 50 panels took 40 MB."""
_LONGEST, _TITLE = 24, 34
"""Characters of a name beside a plot, and of a small panel's title."""
_WIDEST = 8.3
"""Inches, at which the page shows text as large as around the plots; wider plots scroll where the page is narrow."""
_SVG = "http://www.w3.org/2000/svg"
_USE = f"{{{_SVG}}}use"


def colour_variable(index: int | None) -> str:
    """CSS variable of the index-th domain's colour; of those that have none of their own for None."""
    return _VARIABLES[OTHERS] if index is None else f"--c{index % NUM_COLOURS}"


def categorical(index: int | None) -> str:
    return OTHERS if index is None else f"#0102{index % NUM_COLOURS:02x}"


def shortened(name: str, longest: int = _LONGEST) -> str:
    """With its middle left out where it is longer."""
    return name if len(name) <= longest else f"{name[: longest // 2 - 1]}…{name[-(longest // 2) :]}"


def titled(name: str, rest: str) -> str:
    """A title for a small panel, on two lines where one is too short."""
    return f"{name} · {rest}" if len(name) + len(rest) <= _TITLE else f"{shortened(name, _TITLE)}\n{rest}"


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


def by_square_root(axes: Axes, name: Literal["x", "y"]) -> None:
    """Scale shares so that those of many domains can be told apart beside that of a large one."""
    set_scale, axis = (axes.set_xscale, axes.xaxis) if name == "x" else (axes.set_yscale, axes.yaxis)
    set_scale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    axis.set_major_locator(FixedLocator([0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1]))
    axis.set_major_formatter(lambda value, _: f"{value:.0%}")


def render(figure: Figure, label: str, tips: Mapping[str, Iterable[str]] | None = None) -> str:
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
    _dotted(root)
    for element in root.iter():
        own = element.get("id", "")
        if own and not re.match(r"[mpC][0-9a-f]{6}|h[0-9a-f]{6}", own):
            del element.attrib["id"]  # "figure_1", "text_3": the same in every figure, and referred to by none.
    root.set("role", "img")
    root.set("aria-label", label)
    width = figure.get_figwidth()
    root.set("style", f"max-width:{width * 1.45:.1f}in" + (f";min-width:{75 * width:.0f}px" if width > _WIDEST else ""))
    del root.attrib["height"], root.attrib["width"]
    _shorten(root)
    return re.sub(r"#0[0-9a-f]{5}", _themed, ET.tostring(root, encoding="unicode"))


def _add_tips(root: ET.Element, tips: Mapping[str, Iterable[str]]) -> None:
    for group in root.iter(f"{{{_SVG}}}g"):
        texts = tips.get(group.get("id", ""))
        if not texts:
            continue
        marks = list(group.iter(_USE)) or [group]
        for mark, text in zip(marks, texts, strict=True):
            title = ET.Element(f"{{{_SVG}}}title")
            title.text = text
            mark.insert(0, title)


def points(
    axes: Axes,
    xs: Sequence[float] | np.ndarray,
    ys: Sequence[float] | np.ndarray,
    tips: Iterable[str],
    *,
    size: float,
    color: str,
    alpha: float,
    gid: str,
) -> dict[str, Iterable[str]]:
    """Draw round points of that area, in square points, and return their texts for render(). Where there are more than
    MOST_TIPS they have none, and are a line that _dotted() takes apart: 13 bytes a point instead of 200."""
    if len(xs) <= MOST_TIPS:
        axes.scatter(xs, ys, s=size, color=color, alpha=alpha, linewidths=0, gid=gid)
        return {gid: list(tips)}
    with matplotlib.rc_context({"path.simplify": False}):  # else points on one line are left out
        axes.plot(xs, ys, color=color, alpha=alpha, linewidth=size**0.5, gid=f"{_DOTS}{gid}")
    return {}


def _dotted(root: ET.Element) -> None:
    """Lines from point to point become the points alone: lines without length, with round ends. They are in several paths,
    since one does not become darker where its own points lie on one another."""
    for group in root.iter(f"{{{_SVG}}}g"):
        if not group.get("id", "").startswith(_DOTS):
            continue
        line = group[0]
        places = [f"M{float(x):.1f} {float(y):.1f}h0" for x, y in re.findall(r"[ML] (\S+) (\S+)", line.attrib["d"])]
        style = line.attrib["style"].replace("stroke-linecap: square", "stroke-linecap: round")
        group[:] = [
            ET.Element(f"{{{_SVG}}}path", {**line.attrib, "d": "".join(places[i::_LAYERS]), "style": style})
            for i in range(_LAYERS)
        ]


_DOTS, _LAYERS = "dots-", 8


def _shorten(root: ET.Element) -> None:
    """Hundredths of a point are enough, the page has the font, points that look alike need it said once, and nobody reads the
    indentation: half of a small panel's bytes."""
    for element in root.iter():
        for name in ("d", "x", "y"):
            if name in element.attrib:
                text = re.sub(r"(\.\d\d)\d+", r"\1", element.attrib[name])
                element.attrib[name] = re.sub(r"\s*\n\s*", "", text)
        if "style" in element.attrib:
            element.attrib["style"] = re.sub(r"font-family:[^;]*; ", "", element.attrib["style"])
        if len(element) > 1 and len({(child.tag, child.get("style")) for child in element}) == 1 and element[0].tag == _USE:
            element.set("style", element[0].get("style", ""))
            for child in element:
                child.attrib.pop("style", None)
        if element.text and not element.text.strip():
            element.text = None
        if element.tail and not element.tail.strip():
            element.tail = None


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
