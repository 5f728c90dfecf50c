"""The figure of a profile: where the time of a generation goes, method by method beside the dense model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from ..store.profiles import Profile, ProfileRow
from ..tables.titles import row_titles
from . import style

# Title and look of each segment, in the order of time; told apart in grey too.
_SEGMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "vision": ("vision: tower and projector", {"facecolor": "#0072B2", "edgecolor": "white"}),
    "prefill": ("rest of prefill", {"facecolor": "#F0C75E", "edgecolor": "black"}),
    "decode": ("decoding", {"facecolor": "#009E73", "edgecolor": "white", "hatch": "/////"}),
}
_OVERHEAD = "overhead of the method, in prefill"
_WHISKER: dict[str, Any] = {"color": "black", "linewidth": 1.3}
_REFERENCES = {"dense": "Dense", "none": "No method"}  # the model by itself, and in the engine
_COLUMNS = ("prefill\nspeed-up", "promised\nspeed-up", "overhead\nms")
_COLUMN = 46  # points from one to the next
_BAR, _STRIP = 0.56, 0.1  # heights; rows are 1 apart


def draw(profile: Profile, look: style.Look = style.SCREEN) -> Figure:
    """A panel for each batch size and length, with a bar for each of its rows."""
    panels = profile.together()
    names = row_titles({row.method: "" for row in profile.rows}) | _REFERENCES if look.titled else {}
    spelled = [[names.get(row.method, row.method.replace(",", ", ")) for row in rows] for rows in panels]
    labels = [[style.wrap(name, 20 if look.narrow else 34) for name in texts] for texts in spelled]
    tall = [[1 + 0.45 * label.count("\n") for label in texts] for texts in labels]
    lines = max(len(each) * max(each) if look.narrow else sum(each) for each in tall)  # rows are equally high
    with style.styled(look):
        most = 1 if len(panels) < 4 or look.width else 2
        figure, places = style.grid(len(panels), most, (8.6, 1.1 + 0.34 * lines + 1.6 * look.narrow), look)
        for place, rows, texts in zip(places, panels, labels, strict=True):
            _panel(place, rows, texts, look)
        figure.legend(handles=_handles(profile), loc="outside upper center", ncols=1 if look.narrow else 3)
        style.caption(figure, _notes(profile), look)
    return figure


def segments(row: ProfileRow) -> dict[str, float]:
    """The parts of a bar in milliseconds: they add up to the median end to end."""
    vision = row.ms["vision"].median if "vision" in row.ms else 0.0
    prefill, whole = row.ms["prefill"].median, row.ms["end_to_end"].median
    return {"vision": vision, "prefill": prefill - vision, "decode": whole - prefill}


def _panel(place: Axes, rows: Sequence[ProfileRow], labels: Sequence[str], look: style.Look) -> None:
    columns = _COLUMNS[:1] if look.narrow else _COLUMNS
    heights, ends = range(len(rows)), [0.0] * len(rows)
    for part, (_, drawn) in _SEGMENTS.items():
        sizes = [segments(row)[part] for row in rows]
        place.barh(heights, sizes, left=ends, height=_BAR, linewidth=0.5, label=part, **drawn)
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    strips = [0.0 if row.overhead_ms is None else row.overhead_ms.median for row in rows]
    below = [height + (_BAR + _STRIP) / 2 + 0.03 for height in heights]
    place.barh(below, strips, height=_STRIP, label="overhead", color="black")
    reach = 0.0
    for height, row, end in zip(heights, rows, ends, strict=True):
        lower, upper = row.ms["end_to_end"].quartiles
        _whisker(place, lower, upper, height)
        place.annotate(f"{_short(end)} ms", (max(upper, end), height), **style.BESIDE, **style.SMALL)
        reach = max(reach, upper, end)
        for index, text in enumerate(_figures(row)[: len(columns)], start=1):
            _column(place, text, index, ("axes fraction", "data"), height, "center")
    for index, title in enumerate(columns, start=1):
        _column(place, title, index, "axes fraction", 1.0, "bottom")
    place.set(
        yticks=heights,
        yticklabels=labels,
        ylim=(len(rows) - 0.4, -0.6),
        xlim=(0, (1.4 if look.narrow else 1.12) * reach),
    )
    title = f"batch {rows[0].batch_size}: {rows[0].lengths.spelled()}"
    place.set(xlabel="median ms", title=style.wrap(title, 22) if look.narrow else title)
    place.grid(axis="y", visible=False)


def _whisker(place: Axes, lower: float, upper: float, height: float) -> None:
    """From quartile to quartile, with a white edge that sets it off from the bar."""
    ends: dict[str, Any] = {"marker": "|", "markersize": 6, "markeredgewidth": 1.3}
    edge = [withStroke(linewidth=2.8, foreground="white")]
    place.plot([lower, upper], [height] * 2, path_effects=edge, **ends, **_WHISKER)


def _column(place: Axes, text: str, index: int, system: Any, height: float, side: str) -> None:
    """A figure beside the axes, flush right in its column."""
    place.annotate(
        text, (1, height), xycoords=system, xytext=(_COLUMN * index, 0), textcoords="offset points", ha="right",
        va=side, **style.SMALL,
    )  # fmt: skip


def _figures(row: ProfileRow) -> tuple[str, str, str]:
    overhead = "–" if row.overhead_ms is None else _short(row.overhead_ms.median)
    return f"{row.speedup['prefill']:.2f}×", f"{row.promised:.2f}×", overhead


def _short(milliseconds: float) -> str:
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def _handles(profile: Profile) -> list[Any]:
    """What the legend shows: of segments and overhead, those that are drawn."""
    drawn = {part for row in profile.rows for part, size in segments(row).items() if size}
    handles: list[Any] = [Patch(label=title, **look) for part, (title, look) in _SEGMENTS.items() if part in drawn]
    if any(row.overhead_ms for row in profile.rows):
        handles.append(Line2D([], [], color="black", linewidth=2.5, label=_OVERHEAD))
    return [*handles, Line2D([], [], **_WHISKER, label="quartiles of the whole")]


def _notes(profile: Profile) -> list[str]:
    counts = sorted({len(row.overhead_ms.times) for row in profile.rows if row.overhead_ms})
    drawn = (
        f" Overhead: what of prefill goes into scoring, merging and carrying out cuts, median of "
        f"{' or '.join(map(str, counts))} prefills of their own. It lies in vision, in the rest or in both, so it "
        "stands under the bar, from 0, and adds nothing to it."
        if counts
        else ""
    )
    return [
        f"Bars: medians of {profile.repeats} rounds over all methods, after {profile.warmup} to warm up. Prefill ends "
        "with the first token and contains vision; its rest is the median of prefill less that of vision, decoding the "
        "median end to end less that of prefill." + drawn,
        "Speed-up: median over rounds of dense / method, on the same attention; dense is the model without the engine. "
        "Promised: executed multiply-adds of prefill, dense / method.",
        profile.origin(),
        f"Left out, since it does not fit in memory: {'; '.join(profile.left_out)}." if profile.left_out else "",
        *(f"Note: {note}." for note in profile.notes),
    ]
