"""Figures as SVG inside a page: nothing in them clashes with the page, with each other, or with a strict policy."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from itertools import groupby
from xml.etree import ElementTree

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from ...results.figures.style import styled

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_KEEP = {"path", "g", "use", "clipPath", "rect", "defs", "pattern", "svg", "image"}


def inline(figure: Figure, prefix: str, title: str) -> str:
    """The figure as one ``<svg>`` element named ``title``; all its ids begin with ``prefix``.

    Style sheets, comments and metadata are gone, style attributes are presentation attributes: the element needs no
    permission of a Content-Security-Policy.
    """
    stream, canvas = io.BytesIO(), FigureCanvasSVG(figure)
    with styled():
        layout = figure.get_layout_engine()
        if layout is not None:  # once; print_figure would draw everything one time more for it
            layout.execute(figure)
            figure.set_layout_engine("none")
        canvas.print_svg(stream, metadata={"Date": None})
    root = ElementTree.fromstring(stream.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if _name(child) not in _KEEP:
                parent.remove(child)
    for element in root.iter():
        _rewrite(element, prefix)
    root.set("role", "img")
    root.set("aria-label", title)
    # What matplotlib's own style sheet says of everything.
    root.set("stroke-linejoin", "round")
    root.set("stroke-linecap", "butt")
    return ElementTree.tostring(root, encoding="unicode")


def _rewrite(element: ElementTree.Element, prefix: str) -> None:
    element.tag, element.text, element.tail = _name(element), None, None
    attributes = {}
    for key, value in element.attrib.items():
        key = key.removeprefix(f"{{{_XLINK}}}")
        if key == "style":
            for declaration in filter(None, map(str.strip, value.split(";"))):
                name, _, setting = declaration.partition(":")
                attributes[name.strip()] = setting.strip()
        elif key == "id":
            attributes[key] = prefix + value
        else:
            attributes[key] = f"#{prefix}{value[1:]}" if key == "href" and value.startswith("#") else value
    element.attrib.clear()
    for key, value in attributes.items():
        element.set(key, re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}\1)", value))
    if element.tag == "svg":
        element.set("xmlns", _SVG)


def _name(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def veil(kept: Sequence[bool], columns: int) -> str:
    """SVG path over a grid of rows of ``columns`` cells of size 1, row by row: the cells that are not kept."""
    path = []
    for y in range(len(kept) // columns):
        x = 0
        for stays, cells in groupby(kept[y * columns : (y + 1) * columns]):
            width = len(list(cells))
            if not stays:
                path.append(f"M{x} {y}h{width}v1h-{width}z")
            x += width
    return "".join(path)
