"""The figure of a profile shows the file's numbers, and a file that is damaged or something else is one line."""

import json
import statistics
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.colors
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from refusals import assert_refused
from visibench.errors import DataError
from visibench.results.figures import style, timeplot
from visibench.results.store import profiles

EARLY = Path(__file__).with_name("early_profile.json")  # of version 0.1.0: AMD EPYC, one thread, bfloat16
PARTS = ("vision", "prefill", "decode")


def spread(times):
    iqr = float(np.subtract(*np.percentile(times, [75, 25])))
    return {"median": statistics.median(times), "iqr": iqr, "min": min(times), "times": list(times)}


def made(settings=((1, 576, 3),), methods=("fastv:keep=0.5",), **changes):
    """What a file holds: at each (batch, visual tokens, new tokens) the dense model and ``methods``, ever faster."""
    early = json.loads(EARLY.read_text())
    rows, rng = [], np.random.default_rng(0)
    for batch, visual, new in settings:
        dense = None
        for number, method in enumerate(("dense", *methods)):
            vision, rest, step = (size * batch / (number + 1) * (1 + rng.random(5) / 4) for size in (30, 200, 10))
            vision = vision if visual else 0 * vision
            times = {"vision": vision, "prefill": vision + rest, "decode": step}
            times["end_to_end"] = times["prefill"] + (new - 1) * step
            times = {key: value for key, value in times.items() if value.any()}
            if new == 1:
                del times["decode"]
            dense = dense or times
            rows.append(
                early["rows"][min(number, 1)]
                | {
                    "method": method,
                    "batch_size": batch,
                    "lengths": {"prompt": 64, "visual_tokens": visual, "new_tokens": new},
                    "ms": {key: spread(value.tolist()) for key, value in times.items()},
                    "overhead_ms": spread([9.0, 7.0, 8.0]) if number else None,
                    "speedup": {k: float(np.median(dense[k] / times[k])) for k in ("prefill", "end_to_end")},
                    "promised": 1 + 0.5 * number,
                }
            )
    return early | {"schema_version": 1, "left_out": [], "rows": rows, "repeats": 5} | changes


def written(path, content):
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def drawn(tmp_path):
    read = lambda content: profiles.read(written(tmp_path / "p.json", made(**content)))  # noqa: E731
    return lambda look=style.SCREEN, **content: timeplot.draw(read(content), look)


def bars(place):
    return {container.get_label(): container for container in place.containers}


# ---- numbers -------------------------------------------------------------------------------------------------------


def test_bars_end_at_the_medians_of_the_file():
    """Against the JSON as it stands, and its times."""
    rows = json.loads(EARLY.read_text())["rows"]
    (place,) = timeplot.draw(profiles.read(EARLY)).axes
    found = bars(place)
    for number, row in enumerate(rows):
        ends = [found[part][number].get_x() + found[part][number].get_width() for part in PARTS]
        expected = [statistics.median(row["ms"][phase]["times"]) for phase in ("vision", "prefill", "end_to_end")]
        assert ends == pytest.approx(expected)
        assert found["vision"][number].get_x() == 0
        assert found["overhead"][number].get_x() == 0
        overhead = row["overhead_ms"]["median"] if row["overhead_ms"] else 0
        assert found["overhead"][number].get_width() == pytest.approx(overhead)
        whisker = place.lines[number]
        assert list(whisker.get_xdata()) == pytest.approx(np.percentile(row["ms"]["end_to_end"]["times"], [25, 75]))
        assert list(whisker.get_ydata()) == [number, number]
    assert len(place.lines) == len(rows)


def test_rows_stand_in_the_files_order_with_the_overhead_below_each():
    rows = json.loads(EARLY.read_text())["rows"]
    (place,) = timeplot.draw(profiles.read(EARLY)).axes
    assert place.yaxis_inverted()
    labels = [label.get_text().replace("\n", " ").replace(", ", ",") for label in place.get_yticklabels()]
    assert labels == [row["method"] for row in rows]
    assert labels[0] == "dense"
    for bar, strip in zip(bars(place)["vision"], bars(place)["overhead"], strict=True):
        assert bar.get_y() + bar.get_height() < strip.get_y()


def test_totals_and_speed_ups_stand_beside_the_bars():
    rows = json.loads(EARLY.read_text())["rows"]
    (place,) = timeplot.draw(profiles.read(EARLY)).axes
    for number, row in enumerate(rows):
        texts = [t.get_text() for t in place.texts if t.xy[1] == number and t.get_va() == "center"]
        times = [f"{row['speedup']['prefill']:.2f}×", f"{row['promised']:.2f}×"]
        assert texts[:3] == [f"{row['ms']['end_to_end']['median']:.0f} ms", *times]
        assert texts[3:] == [f"{row['overhead_ms']['median']:.3g}" if row["overhead_ms"] else "–"]


@pytest.mark.parametrize(("time", "text"), [(1234.5, "1234"), (99.96, "100"), (95.21, "95.2"), (0.2161, "0.216")])
def test_figures_have_three_digits_or_more(time, text):
    assert timeplot._short(time) == text


def test_each_batch_size_and_length_has_its_panel(drawn):
    figure = drawn(settings=[(1, 576, 3), (8, 576, 3), (8, 0, 3)], methods=["none", "vtw"])
    assert [place.get_title() for place in figure.axes] == [
        "batch 1: 64 text and 576 visual tokens, 3 new ones",
        "batch 8: 64 text and 576 visual tokens, 3 new ones",
        "batch 8: 64 text and 0 visual tokens, 3 new ones",
    ]
    assert all(len(bars(place)["prefill"]) == 3 for place in figure.axes)
    one, eight, _ = (sum(bars(place)[part][0].get_width() for part in PARTS) for place in figure.axes)
    assert one < 300 < eight, "each panel has the numbers of its own rows"


def test_a_setting_that_was_measured_twice_is_drawn_twice(drawn):
    assert len(drawn(settings=[(1, 576, 3)] * 2).axes) == 2


def test_phases_that_did_not_happen_are_neither_drawn_nor_in_the_legend(drawn):
    figure = drawn(settings=[(1, 0, 1)])
    row = made(settings=[(1, 0, 1)])["rows"][1]
    assert [bars(figure.axes[0])[part][1].get_width() for part in PARTS] == [0, row["ms"]["prefill"]["median"], 0]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["rest of prefill", "overhead of the method, in prefill", "quartiles of the whole"]
    full = [text.get_text() for text in drawn().legends[0].get_texts()]
    assert full == ["vision: tower and projector", "rest of prefill", "decoding", *legend[1:]]


def test_a_single_round_has_no_spread(tmp_path):
    content = made()
    for row in content["rows"]:
        row["ms"] = {phase: spread(one["times"][:1]) for phase, one in row["ms"].items()}
        row["speedup"] = {
            key: content["rows"][0]["ms"][key]["median"] / row["ms"][key]["median"] for key in row["speedup"]
        }
    (place,) = timeplot.draw(profiles.read(written(tmp_path / "p.json", content | {"repeats": 1}))).axes
    for row, whisker in zip(content["rows"], place.lines, strict=True):
        assert list(whisker.get_xdata()) == [row["ms"]["end_to_end"]["median"]] * 2


def test_segments_differ_without_colour():
    """Neighbours by a quarter of the way from black to white; the two that are alike by hatch."""
    looks = [look for _, look in timeplot._SEGMENTS.values()]
    light = [np.dot(matplotlib.colors.to_rgb(look["facecolor"]), (0.299, 0.587, 0.114)) for look in looks]
    assert abs(light[0] - light[1]) > 0.25
    assert abs(light[1] - light[2]) > 0.25
    assert len({look.get("hatch") for look in (looks[0], looks[2])}) == 2


def test_the_caption_says_how_and_where_it_was_measured():
    text = " ".join(timeplot.draw(profiles.read(EARLY)).get_supxlabel().split())
    commit = json.loads(EARLY.read_text())["environment"]["code"]["commit"][:9]
    for part in (
        "medians of 20 rounds over all methods, after 1 to warm up",
        "median of 3 prefills of their own",
        "Model llava-cpu: random weights, 0.42 GiB bfloat16, sdpa attention, cpu (AMD EPYC, 1 thread, cpu 2596 MHz)",
        f"visibench 0.1.0 (commit {commit}), transformers 5.23.0, torch 2.13.0+cpu, Python 3.11.7.",
        "Note: random prompts, images and weights.",
        "forced=True: where it cuts and how much was forced, not found by its rule.",
    ):
        assert part in text
    assert "Left out" not in text


def test_the_caption_says_what_did_not_fit(drawn):
    text = drawn(left_out=["batch 64 with 64 text"]).get_supxlabel()
    assert "Left out, since it does not fit in memory: batch 64 with 64 text." in text


# ---- layout --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "width"), [(1, None), (5, None), (1, 3.0), (1, 6.3)])
def test_nothing_is_cut_off_or_covered(count, width, drawn):
    long = ["a_method_of_a_very_long_name:with=options,and=more,of=them,in=all", *(f"method{i}" for i in range(12))]
    figure = drawn(style.Look(width), settings=[(batch, 576, 3) for batch in range(1, count + 1)], methods=long)
    FigureCanvasAgg(figure).draw()
    whole = figure.bbox.padded(1)
    for place in figure.axes:
        beside = [text.get_window_extent() for text in place.texts]
        assert not any(a.overlaps(b) for i, a in enumerate(beside) for b in beside[:i])
        labels = [label.get_window_extent() for label in place.get_yticklabels()]
        assert not any(a.overlaps(b) for a, b in pairwise(labels))
        assert not any(label.overlaps(place.get_window_extent()) for label in labels)
        title = place.title.get_window_extent()
        assert not any(box.overlaps(title) for box in beside)
        for box in (*beside, *labels, title):
            assert whole.contains(box.x0, box.y0)
            assert whole.contains(box.x1, box.y1)
            assert not box.overlaps(figure.legends[0].get_window_extent())
            assert not box.overlaps(figure._supxlabel.get_window_extent())


@pytest.mark.parametrize("label", ["$x_{", "_hidden", "<b>&amp;\\frac", "100 % sure"])
def test_labels_are_shown_as_they_are(label, drawn, tmp_path):
    figure = drawn(methods=[label])
    assert figure.axes[0].get_yticklabels()[1].get_text() == label
    style.save(figure, tmp_path / "p.svg")
    ElementTree.parse(tmp_path / "p.svg")


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_measured_can_be_drawn(cli, tmp_path):
    """From one command to the other; the file says its schema, and reads back as it was."""
    methods = ["--methods", "fastv:layer=1,keep=0.5", "--methods", "divprune:tokens=9", "--methods", "none"]
    model = ["--model", "tiny", "--weights", "random", "--layers", "4", "--device", "cpu", "--repeats", "3"]
    code, out, err = cli("profile", *model, *methods, "--lengths", "10/144/3,9/0/1", "--out", "a.json", "--json")
    assert code == 0, err
    assert json.loads(out)["schema_version"] == 1
    found = profiles.read(tmp_path / "a.json")
    assert json.loads(found.model_dump_json()) == json.loads(out)
    assert [len(rows) for rows in found.together()] == [4, 4]
    assert cli("plot", "a.json") == (0, "a.png\n", "")


def test_a_file_of_an_early_version_is_read_in_full(tmp_path):
    """It has no schema version and lacks what could be left out, which then was nothing."""
    content = json.loads(EARLY.read_text())
    early = {key: value for key, value in content.items() if key not in ("schema_version", "left_out")}
    found = profiles.read(written(tmp_path / "p.json", early))
    early["rows"] = [row | {"plain_ms": None} for row in early["rows"]]
    assert json.loads(found.model_dump_json()) == early | {"schema_version": 1, "left_out": []}
    content = early | {"schema_version": 1}
    with pytest.raises(DataError, match="left_out: Field required"):
        profiles.read(written(tmp_path / "p.json", content))


def keys(value, at=()):
    """Where each key of an object stands, down to its parts."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*at, key)
            yield from keys(inner, (*at, key))
    elif isinstance(value, list) and value:
        yield from keys(value[-1], (*at, -1))


MAY_LACK = {"host", "code", "architecture", "parameters", "image_processor", "image_backend", "system"}
MAY_LACK |= {"torchvision", "lmms-eval", "datasets", "pillow", "numpy"}


def test_no_key_can_be_lost_unsaid(tmp_path):
    """What the figure needs, with or without a version, is there or the file is refused."""
    for version in ({}, {"schema_version": 1}):
        content = {key: value for key, value in made().items() if key != "schema_version"} | version
        lost = [path for path in keys(content) if not {*path} & {*MAY_LACK, "options", "clocks_mhz", "schema_version"}]
        assert len(lost) > 50
        for path in [*lost, ("rows", -1, "options"), ("rows", -1, "clocks_mhz")]:
            if path == ("left_out",) and not version:
                continue
            damaged = json.loads(json.dumps(content))
            place = damaged
            for step in path[:-1]:
                place = place[step]
            del place[path[-1]]
            with pytest.raises(DataError, match=r"p\.json") as caught:
                profiles.read(written(tmp_path / "p.json", damaged))
            assert "\n" not in str(caught.value)


def changed(change):
    def damage(file):
        content = json.loads(file.read_text())
        change(content, content["rows"][1])
        file.write_text(json.dumps(content))

    return damage


def put(path, value):
    """Set what stands at this path of the second row."""

    def change(content, row):
        for step in path[:-1]:
            row = row[step]
        row[path[-1]] = value

    return changed(change)


def halved(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def replaced(content):
    return lambda file: file.write_bytes(content)


DAMAGES = {
    "missing": (lambda file: file.unlink(), "cannot read p.json"),
    "empty": (replaced(b""), "p.json is damaged, or no profile (no whole JSON file)"),
    "cut in half": (halved, "no whole JSON file"),
    "no text": (replaced(b"\xff\xfe\x00"), "no whole JSON file"),
    "nested without end": (replaced(b"[" * 100_000), "no whole JSON file"),
    "a list": (replaced(b"[]"), "p.json is no profile: give the file that `visibench profile --out` wrote"),
    "another object": (replaced(b'{"schema_version": 1, "cells": []}'), "p.json is no profile"),
    "of a newer schema": (changed(lambda content, _: content.update(schema_version=2)), "version 2, this visibench"),
    "of no schema": (changed(lambda content, _: content.update(schema_version=None)), "version None"),
    "no rows": (changed(lambda content, _: content.update(rows=[])), "rows: "),
    "an unknown key": (put(["colour"], "red"), "rows.1.colour: Extra inputs"),
    "a word for a number": (put(["promised"], "much"), "rows.1.promised: Input should be a valid number"),
    "without the dense model": (changed(lambda content, _: content["rows"].pop(0)), "no row of the dense model"),
    "of another batch size": (put(["batch_size"], 2), "no row of the dense model at its batch size"),
    "a median that nobody measured": (put(["ms", "prefill", "median"], 1.0), "of prefill are not those of its times"),
    "a range that nobody measured": (put(["ms", "decode", "iqr"], 99.0), "of decode are not those of its times"),
    "another overhead": (put(["overhead_ms", "median"], 1.0), "of overhead are not those of its times"),
    "no overhead": (put(["overhead_ms"], None), "a method without overhead"),
    "a better speed-up": (put(["speedup", "prefill"], 9.0), "the speed-up of prefill is not that of its times"),
    "a promise of nothing": (put(["promised"], 0.0), "promised speed-up is no positive number"),
    "an endless promise": (put(["promised"], "Infinity"), "promised speed-up is no positive number"),
    "a round lost": (changed(lambda _, row: row["ms"]["vision"]["times"].pop()), "4 times of vision in 5 rounds"),
    "no time at all": (put(["ms", "decode", "times", 0], 0.0), "a time of decode is no positive number"),
    "an unknown phase": (changed(lambda _, row: row["ms"].update(loading=row["ms"]["decode"])), "loading"),
    "a part above the whole": (
        changed(lambda _, row: row["ms"].update(vision=spread([1e4] * 5))),
        "longer than the one that contains it",
    ),
    "a nameless model": (
        changed(lambda content, _: content["environment"]["model"].pop("name")),
        "environment.model has no 'name'",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_no_whole_profile_is_one_line(damage, cli, tmp_path):
    spoil, says = DAMAGES[damage]
    file = written(tmp_path / "p.json", made())
    spoil(file)
    result = cli("plot", "p.json")
    assert_refused(result, says)
    assert "p.json" in result[2]
    assert [path.name for path in tmp_path.iterdir() if path != file] == []


# ---- command -------------------------------------------------------------------------------------------------------


def test_command_draws_beside_the_file_or_where_it_is_told(cli, tmp_path):
    (tmp_path / "in").mkdir()
    written(tmp_path / "in" / "cpu_torch2.13.json", made())
    written(tmp_path / "plain", made())
    assert cli("plot", "in/cpu_torch2.13.json") == (0, "in/cpu_torch2.13.png\n", "")
    code, out, err = cli("plot", "in/cpu_torch2.13.json", "--out", "figures", "--format", "png,svg")
    assert (code, out.split(), err) == (0, ["figures/cpu_torch2.13.png", "figures/cpu_torch2.13.svg"], "")
    assert cli("plot", "in/cpu_torch2.13.json", "--out", "one.svg") == (0, "one.svg\n", "")
    assert cli("plot", "plain", "--format", "svg") == (0, "plain.svg\n", "")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "figures" / "cpu_torch2.13.svg").read_bytes()
    assert ElementTree.parse(tmp_path / "one.svg").getroot().tag.endswith("svg")
    with Image.open(tmp_path / "in" / "cpu_torch2.13.png") as image:
        image.load()
        assert image.width > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kind", "stages"], "--kind is for the folder of a run, while a profile has one figure: leave it out"),
        (["--task", "gqa"], "--task is for the folder of a run, while a profile has one figure: leave it out"),
        (["--format", "gif"], "Known: pdf, png, svg"),
        (["--out", "a.gif"], "must end in .png, .svg or .pdf"),
        (["--out", "a.png", "--format", "svg"], "both say the format"),
        (["--out", "p.json"], "would take the place of p.json itself"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(arguments, message, cli, tmp_path):
    file = written(tmp_path / "p.json", made())
    before = file.read_bytes()
    assert_refused(cli("plot", "p.json", *arguments), message)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"p.json": before}


def test_a_profile_named_like_a_picture_is_not_overwritten(cli, tmp_path):
    written(tmp_path / "p.png", made())
    assert_refused(cli("plot", "p.png"), "would take the place of p.png itself")
    assert json.loads((tmp_path / "p.png").read_text())["rows"]
    assert cli("plot", "p.png", "--format", "svg")[:2] == (0, "p.svg\n")
