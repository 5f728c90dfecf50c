"""How a model fuses images, on one page: nine panels over its decoder layers, the stages found shaded behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..store.stage_records import ALL, Mean, StageRecord, StagesFound
from .style import COLOURS, LINES, SMALL, caption, styled, wrap

SHADES = ("#E8F1FA", "#FFF3DC", "#EDF5EA")
"""Of shallow, middle and deep layers."""
Span = Literal["single", "prefix", "suffix"]
Series = tuple[str, Sequence[float], Sequence[Mean]]


def draw(record: StageRecord, against: StageRecord | None = None) -> Figure:
    """The page of one analysis, or of two side by side, each panel to one scale."""
    records = [record] if against is None else [record, against]
    with styled():
        figure = Figure(figsize=(11 * len(records), 9.2), layout="constrained")
        parts = figure.subfigures(1, len(records), squeeze=False).ravel()
        pages = [_page(part, one) for part, one in zip(parts, records, strict=True)]
        for same in zip(*pages, strict=True):
            low, high = (limit(place.get_ylim()[end] for place in same) for end, limit in ((0, min), (1, max)))
            for place in same:
                place.set_ylim(low, high)
        caption(figure, [_about(one) for one in records])
    return figure


def _page(part: Any, record: StageRecord) -> list[Axes]:
    found = record.found()
    said = "" if found is None else f": {found.said(record.depth)}"
    part.suptitle(wrap(f"{record.model}{said}", 110), fontsize=11, fontweight="bold")
    places = list(part.subplots(3, 3).ravel())
    for place, (title, unit, series) in zip(places, PANELS, strict=True):
        _shade(place, found, record.depth)
        lines = [line for line in series(record) if line[2]]
        for number, line in enumerate(lines):
            _line(place, line, COLOURS[number % len(COLOURS)], LINES[number % len(LINES)])
        place.set(title=title, xlabel="decoder layer", ylabel=unit, xlim=(-0.5, record.depth + 0.5))
        place.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        if lines:
            place.legend(fontsize=7, loc="best")
        else:
            place.text(0.5, 0.5, "not measured", transform=place.transAxes, ha="center", **SMALL)
    return places


def _shade(place: Axes, found: StagesFound | None, depth: int) -> None:
    if found is None or found.none_because or found.begin is None or found.end is None:
        return
    edges = (-0.5, found.begin - 0.5, found.end - 0.5, depth + 0.5)
    for shade, low, high in zip(SHADES, edges, edges[1:], strict=False):
        place.axvspan(low, high, color=shade, zorder=0, linewidth=0)


def _line(place: Axes, line: Series, colour: str, style: Any) -> None:
    label, at, means = line
    place.plot(at, [mean.value for mean in means], color=colour, linestyle=style, label=label, linewidth=1.5)
    place.fill_between(
        at, [mean.low for mean in means], [mean.high for mean in means], color=colour, alpha=0.15, linewidth=0
    )


def _curves(**labels: str) -> Callable[[StageRecord], list[Series]]:
    """Lines of quantities by layer, ``quantity=label``."""

    def series(record: StageRecord) -> list[Series]:
        found = [(label, record.curve(quantity)) for quantity, label in labels.items()]
        return [(label, curve.layers, curve.means) for label, curve in found if curve is not None]

    return series


def _windows(effect: str, span: Span, **labels: str) -> Callable[[StageRecord], list[Series]]:
    """Lines of what windows do, ``kind=label``: a ``prefix`` by its end, all else by its first layer."""

    def series(record: StageRecord) -> list[Series]:
        lines: list[Series] = []
        for kind, label in labels.items():
            lie = [window for window in record.windows if window.kind == kind and window.lies(span, record.depth)]
            at = {window.end if span == "prefix" else window.first: window.effects[ALL][effect] for window in lie}
            lines.append((label, sorted(at), [at[place] for place in sorted(at)]))
        return lines

    return series


PANELS: tuple[tuple[str, str, Callable[[StageRecord], list[Series]]], ...] = (
    (
        "a) Attention on visual tokens",
        "share of attention",
        _curves(last_share="of the last prompt token", text_share="of all text behind the image"),
    ),
    (
        "a) How it is spread, and the strongest token",
        "share",
        _curves(
            last_entropy="last: entropy / even",
            text_entropy="text: entropy / even",
            last_strongest="last: strongest token",
            text_strongest="text: strongest token",
        ),
    ),
    (
        "b) Value vectors",
        "L1 norm, mean over heads",
        _curves(value_sink="text's strongest visual token", value_others="other visual tokens"),
    ),
    (
        "c) Text blind in one layer",
        "KL of the next token, nats",
        _windows("kl", "single", moved="mass moved, not renormalised", masked="masked before the softmax"),
    ),
    (
        "c) Text blind in the first n layers",
        "answers as dense",
        _windows("agreement", "prefix", moved="mass moved, not renormalised", masked="masked before the softmax"),
    ),
    (
        "c) No vision from layer l on",
        "answers as dense",
        _windows("agreement", "suffix", dropped="tokens dropped", moved="blind, mass moved", masked="blind, masked"),
    ),
    (
        "d) Contributions c_j to the last token's a",
        "least cos(a − c_j, a)",
        _curves(contribution_cosine="least cosine"),
    ),
    (
        "d) How many tokens contribute",
        "visual tokens",
        _curves(
            **{"contribution_carrying": "carry 90 % of Σ |c_j|", "contribution_above_0.2": "|c_j| > 0.2"},
        ),
    ),
    (
        "e) Logit lens of the last prompt token",
        "answer's first token ranks first, share",
        _curves(lens_hidden_first="hidden state behind the layer", lens_visual_first="visual part of its attention"),
    ),
)


def _about(record: StageRecord) -> str:
    """Where the numbers come from, in words."""
    tasks = ", ".join(f"{name} {of.asked} of {of.total} ({of.images} images)" for name, of in record.tasks.items())
    found = record.found()
    spread = ""
    if found is not None and found.begins is not None and found.ends is not None:
        spread = (
            f" Quartiles over the {found.needed} of {found.asked} questions that need their image: fusion begins "
            f"{_range(found.begins)}, ends {_range(found.ends)} (KL ≤ {record.tolerance_nats:g} nats)."
        )
    facts, versions = record.environment.model, record.environment.versions
    return (
        f"{record.model}: {tasks}; mean over questions, bands: 95 % intervals clustered by image, seed {record.seed}. "
        f"Shaded: shallow, middle, deep.{spread} {facts.get('dtype')}, {facts.get('hardware')}; "
        f"visibench {versions.get('visibench')}, transformers {versions.get('transformers')}."
    )


def _range(pair: tuple[float, float]) -> str:
    low, high = (f"{value:g}" for value in np.round(pair, 2))
    return f"at layer {low}" if low == high else f"at layers {low}–{high}"
