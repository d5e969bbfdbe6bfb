"""A strict little HTML reader: a tree, or an assertion on the first tag that is not closed where it must be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
SVG = {"svg", "g", "path", "text", "use", "rect", "circle", "title", "desc", "defs", "clipPath".lower()}


@dataclass
class Element:
    tag: str
    attrs: dict[str, str | None]
    children: list[Element | str] = field(default_factory=list)

    def walk(self) -> Iterator[Element]:
        yield self
        for child in self.children:
            if isinstance(child, Element):
                yield from child.walk()

    def text(self) -> str:
        whole = "".join(child if isinstance(child, str) else child.text() + " " for child in self.children)
        return " ".join(whole.split())

    def all(self, tag: str, **attrs: str) -> list[Element]:
        wanted = {name.rstrip("_").replace("_", "-"): value for name, value in attrs.items()}
        return [
            element
            for element in self.walk()
            if element.tag == tag
            and all(value in (element.attrs.get(name) or "").split() for name, value in wanted.items())
        ]

    def by_id(self, name: str) -> Element:
        found = [element for element in self.walk() if element.attrs.get("id") == name]
        assert len(found) == 1, f"{len(found)} elements have the id {name}"
        return found[0]

    def table(self, caption: str) -> list[list[str]]:
        """The cells' texts of the one table whose caption starts so, head first."""
        found = [
            table for table in self.all("table") if any(c.text().startswith(caption) for c in table.all("caption"))
        ]
        assert len(found) == 1, f"{len(found)} tables are called {caption!r}"
        return [
            [cell.text() for cell in row.children if isinstance(cell, Element) and cell.tag in ("td", "th")]
            for row in found[0].all("tr")
        ]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("#root", {})
        self.open = [self.root]
        self.declarations: list[str] = []

    def handle_decl(self, decl: str) -> None:
        self.declarations.append(decl)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"<{tag}> repeats an attribute: {names}"
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in SVG or tag in VOID, f"<{tag}/> does not close itself in HTML"
        self.open[-1].children.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert tag not in VOID
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}> at {self.getpos()}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def read(html: str) -> Element:
    reader = _Reader()
    reader.feed(html)
    reader.close()
    assert reader.declarations == ["DOCTYPE html"]
    assert reader.open == [reader.root], f"never closed: {[element.tag for element in reader.open[1:]]}"
    return reader.root
