"""Figures as inline SVG whose colours follow the page.

Figures are painted in the marker colours of :data:`INK` and its siblings; here each marker becomes a CSS variable, so
that one picture reads well in light, dark and print. What an inline picture must not bring along goes: metadata, XML
names, ids that could collide with those of another picture, and a style sheet that would apply to the whole page.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from markupsafe import Markup

from onnxslim.reports.units import clean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["AFTER", "BAD", "BEFORE", "GRID", "INK", "MUTED", "SURFACE", "Chart", "drawing", "inline"]

INK = "#0a0b01"
MUTED = "#0a0b02"
GRID = "#0a0b03"
BEFORE = "#0a0b04"
AFTER = "#0a0b05"
BAD = "#0a0b06"
SURFACE = "#0a0b07"

_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    BEFORE: "var(--before)",
    AFTER: "var(--after)",
    BAD: "var(--bad)",
    SURFACE: "var(--surface)",
}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "onnxslim",
    # A node name with dollar signs is a name, not a formula.
    "text.parse_math": False,
    "path.simplify": False,
    "font.size": 11.0,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.spines.bottom": False,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 1.0,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}
_NUMBER = re.compile(r"-?\d+\.\d+")


@dataclass(frozen=True)
class Chart:
    """One picture of the report.

    Attributes:
        title: what it shows; also its accessible name.
        svg: the inline ``<svg>`` element.
        note: what it leaves out, or an empty string.
    """

    title: str
    svg: Markup
    note: str = ""


@contextmanager
def drawing() -> Iterator[None]:
    """Paint and :func:`inline` figures within this: the style of the report, whatever the user's own is."""
    from matplotlib import style

    with style.context(["default", _STYLE]), warnings.catch_warnings():
        # Names may hold letters that the measuring font lacks; the browser picks a font that has them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        warnings.filterwarnings("ignore", message=".*does not support .*natively")
        yield


def inline(figure: Figure, key: str, title: str, description: str, tips: Mapping[str, str] | None = None) -> Markup:
    """Write a figure as an inline ``<svg>`` element.

    Args:
        figure: painted within :func:`drawing`, one unit of its size being 1/72 inch, shown as one CSS pixel.
        key: starts every id of the picture; unique on the page.
        title: the picture's accessible name.
        description: what a reader who does not see it should know.
        tips: artist gid -> text shown when the pointer rests on it.

    Returns:
        The same bytes for the same figure.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    source = buffer.getvalue()
    root = ElementTree.fromstring(source[source.index("<svg") :])
    _strip(root)
    _rename(root, key, tips or {})
    width, height = root.attrib["viewBox"].split()[2:]
    root.attrib.clear()
    root.attrib.update(
        {
            "viewBox": f"0 0 {width} {height}",
            "width": width,
            "height": height,
            "role": "img",
            "aria-labelledby": f"{key}-title {key}-desc",
        }
    )
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, {"id": f"{key}-{tag}"})
        element.text = clean(text)
        root.insert(place, element)
    # Matplotlib breaks path data over lines; names hold no line breaks any more.
    return Markup(ElementTree.tostring(root, encoding="unicode").replace("\n", " "))


def _strip(element: ElementTree.Element) -> None:
    """Drop namespaces, metadata, style sheets, layout whitespace and backgrounds that paint nothing."""
    for child in list(element):
        child.tag = child.tag.rpartition("}")[2]
        style = child.get("style", "")
        if child.tag in ("metadata", "style") or (child.tag == "path" and style.strip("; ") == "fill: none"):
            element.remove(child)
            continue
        _strip(child)
        if child.tag in ("g", "defs") and not len(child):
            element.remove(child)
    element.tag = element.tag.rpartition("}")[2]
    element.tail = None
    if element.tag != "text":
        element.text = None


def _rename(root: ElementTree.Element, key: str, tips: Mapping[str, str]) -> None:
    """Make ids the picture's own, colours the page's, numbers short, and hang the tips on their shapes."""
    used: dict[str, str] = {}
    for element in root.iter():
        for name, text in list(element.attrib.items()):
            for old in re.findall(r"url\(#(\w+)\)", text) + ([text[1:]] if name.endswith("href") else []):
                used.setdefault(old, f"{key}-{len(used)}")
    for element in root.iter():
        for name, text in list(element.attrib.items()):
            del element.attrib[name]
            plain = name.rpartition("}")[2]
            if plain == "id":
                if text in tips:
                    tip = ElementTree.Element("title")
                    tip.text = clean(tips[text])
                    element.insert(0, tip)
                if text not in used:
                    continue
                text = used[text]
            elif plain == "href":
                text = "#" + used[text[1:]]
            elif plain == "style":
                text = _style(text)
            elif plain == "transform" and text.startswith("rotate(-0"):
                continue
            else:
                text = re.sub(r"url\(#(\w+)\)", lambda match: f"url(#{used[match[1]]})", text)
                text = _NUMBER.sub(lambda match: f"{float(match[0]):.1f}", text)
                text = " ".join(text.split())
            element.set(plain, text)


def _style(text: str) -> str:
    text = re.sub(r"font-family: [^;]*;? ?", "", text)
    for marker, variable in _VARIABLES.items():
        text = text.replace(marker, variable)
    return text.replace(": ", ":").replace("; ", ";")
