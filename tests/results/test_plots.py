"""Figures: they show the table's numbers, the true Pareto set, and nothing cut off or covered."""

import itertools
import math
import random
import statistics
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from storing import config, frame, put
from visibench.errors import DataError, OptionError
from visibench.results.figures import plots, style
from visibench.results.figures.scores import ScorePoint, _look, front, panels_of
from visibench.results.figures.series import Series, series
from visibench.results.store.records import Compute, PrefillTime, ScoreRecord, VisualTokens
from visibench.results.store.store import Store
from visibench.results.tables.tables import build

IMAGES = [f"i{i // 3}" for i in range(60)]
COMPONENTS = {"vision_tower": 0.3, "projector": 0.01, "projections": 0.2, "ffn": 0.3, "attention": 0.1, "scoring": 0.09}


def answered(store, method, keep, right, task="gqa", seed=0, timed=True, **changes):
    """A cell with 60 questions about 20 images; compute, tokens and time follow from ``keep``."""
    rng = np.random.default_rng([seed, round(100 * keep), len(method), len(task)])
    samples = frame(IMAGES, rng.random(60) < right)
    options = {} if method == "none" else {"keep": keep, **({"seed": seed} if method == "random" else {})}
    changes = {"label": method if method == "none" else f"{method}:keep={keep}", "options": options} | changes
    score = ScoreRecord(key="exact_match", title="exact match", value=samples["score"].mean(), maximum=1)
    macs = {name: share * (1 + 3 * keep) * 1e12 for name, share in COMPONENTS.items()}
    times = [20 + 10 * keep + i for i in range(5)]
    outcome = {
        "scores": [score],
        "visual_tokens": VisualTokens(prompt=576, per_layer=[576.0, *[576 * keep] * 7]),
        "compute": Compute(macs=sum(macs.values()), macs_sd=0, components=macs),
        "prefill": PrefillTime(times_ms=times, warmup=1, batch_size=1, device="cpu") if timed else None,
    }
    return put(store, config(method, task, seed, **changes), samples=samples, size=60, total=750, **outcome)


def swept(store, methods=("fastv", "tome"), tasks=("gqa", "pope"), **changes):
    """Dense, random with three seeds and ``methods``, at two budgets."""
    for task in tasks:
        answered(store, "none", 1.0, 0.9, task, **changes)
        for keep, (index, method) in itertools.product((0.5, 0.25), enumerate(methods)):
            answered(store, method, keep, 0.5 + 0.3 * keep + 0.1 * (index % 3), task, **changes)
        for keep, seed in itertools.product((0.5, 0.25), range(3)):
            answered(store, "random", keep, 0.5, task, seed, **changes)
    return store


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "run")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return swept(Store(tmp_path_factory.mktemp("swept")))


@pytest.fixture(scope="module")
def table(stored):
    (table,) = build(stored.cells())
    return table


@pytest.fixture(scope="module")
def crowded(tmp_path_factory):
    """Twenty methods with long names."""
    long = [f"method{number}" for number in range(19)] + ["a_method_of_a_very_long_name_indeed"]
    (table,) = build(swept(Store(tmp_path_factory.mktemp("crowded")), long, tasks=("gqa",)).cells())
    return table


def lines(place):
    return {line.get_label(): line for line in place.get_lines()}


# ---- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "cost"), [("pareto", lambda row: row.macs * 1e-12), ("prefill", lambda row: row.prefill.median)]
)
def test_points_and_bars_are_the_tables_numbers(kind, cost, table):
    for place, task in zip(plots.draw(table, kind).axes, ("gqa", "pope", None), strict=True):
        bars = [tuple(map(tuple, segment)) for part in place.collections for segment in part.get_segments()]
        for method, label in (("none", "dense"), ("random", "random"), ("fastv", "fastv"), ("tome", "tome")):
            rows = sorted((row for row in table.rows if row.method == method), key=lambda row: row.macs)
            score = [row.scores[task]["exact_match"] if task else row.retained for row in rows]
            scale = 100 if task else 1
            expected = [(cost(row), scale * s.mean) for row, s in zip(rows, score, strict=True)]
            assert lines(place)[label].get_xydata() == pytest.approx(np.array(expected))
            for row in rows:
                estimate = row.evidence.scores[task]["exact_match"] if task else row.evidence.retained
                assert (estimate is None) == (task is None and label == "dense")
                if estimate:
                    bar = tuple((cost(row), 100 * end) for end in (estimate.low, estimate.high))
                    assert any(np.allclose(bar, other) for other in bars if other)


def test_random_is_the_mean_over_seeds_with_an_interval_around_it(table, stored):
    """From the stored scores themselves."""
    cells = [c for c in stored.cells() if (c.config.label, c.config.task) == ("random:keep=0.5", "gqa")]
    scores = [cell.metrics.scores[0].value for cell in cells]
    panel = panels_of(table, lambda row: row.macs)[0]
    (point,) = [p for p in panel.points if p.row.label == "random:keep=0.5"]
    assert len(set(scores)) > 1
    assert point.y == pytest.approx(100 * statistics.fmean(scores))
    assert point.low < point.y < point.high


def test_the_front_is_the_pareto_set():
    rng = random.Random(0)
    for _ in range(200):
        # Few values, so that costs and scores tie.
        points = [ScorePoint(None, rng.randrange(6), rng.randrange(6)) for _ in range(rng.randrange(1, 12))]
        beaten = {(p.x, p.y) for p in points for q in points if q.x <= p.x and q.y >= p.y and (q.x, q.y) != (p.x, p.y)}
        best = [(p.x, p.y) for p in front(points)]
        assert set(best) == {(p.x, p.y) for p in points} - beaten
        assert best == sorted(set(best))


def test_the_front_is_drawn_to_the_dearest_point(table):
    place = plots.draw(table, "pareto").axes[0]
    panel = panels_of(table, lambda row: row.macs * 1e-12)[0]
    best = [(p.x, p.y) for p in front(panel.points)]
    drawn = [tuple(point) for point in lines(place)["Pareto front"].get_xydata()]
    assert drawn == [*best, (max(p.x for p in panel.points), best[-1][1])]
    assert lines(place)["Pareto front"].get_drawstyle() == "steps-post"


def test_tokens_by_layer_are_the_tables(table):
    places = plots.draw(table, "tokens").axes
    assert [place.get_title() for place in places] == ["random", "fastv", "tome"]
    by_label = {row.label: row for row in table.rows}
    for place in places:
        own = {label: line for label, line in lines(place).items() if label != "dense"}
        assert len(own) == 2
        for label, line in own.items():
            assert list(line.get_ydata()) == pytest.approx(by_label[label].tokens.per_layer)
            assert list(line.get_xdata()) == list(range(8))
        assert set(lines(place)["dense"].get_ydata()) == {576.0}
        said = sorted(text.get_text() for text in place.texts)
        assert said == ["keep=0.25 (T 198.0)", "keep=0.5 (T 324.0)"]


def test_bars_add_up_to_compute_and_show_time(table):
    compute, time = plots.draw(table, "components").axes
    for number, row in enumerate(table.rows):
        parts = [bars[number] for bars in compute.containers]
        assert [bar.get_width() * 1e12 for bar in parts] == pytest.approx(list(row.components.values()))
        assert parts[-1].get_x() + parts[-1].get_width() == pytest.approx(row.macs * 1e-12)
        assert time.patches[number].get_width() == pytest.approx(row.prefill.median)
    quartiles = [part.get_segments()[0][:, 0].tolist() for part in time.collections]
    assert quartiles == [pytest.approx([row.prefill.lower, row.prefill.upper]) for row in table.rows]
    assert compute.yaxis_inverted()
    assert [label.get_text() for label in compute.get_yticklabels()][:2] == ["dense", "random:keep=0.5"]


def test_lines_join_the_budgets_of_one_method(store):
    for layer, keep in itertools.product((2, 3), (0.5, 0.25)):
        answered(
            store, "fastv", keep, 0.8, label=f"fastv:layer={layer},keep={keep}", options={"layer": layer, "keep": keep}
        )
    answered(store, "fastv", 0.3, 0.8, label="ours keep=0.3", options={"layer": 2, "keep": 0.3})
    for shallow in (2, 5):
        options = {"shallow_layers": shallow}
        answered(store, "visipruner", shallow / 10, 0.8, label=f"visipruner:shallow_layers={shallow}", options=options)
    found = {one.label: one.names for one in series(build(store.cells())[0].rows)}
    assert found == {
        "fastv layer=2": ["keep=0.25", "keep=0.5"],
        "fastv layer=3": ["keep=0.25", "keep=0.5"],
        "ours": [""],
        "visipruner": ["shallow_layers=2", "shallow_layers=5"],
    }


def test_methods_differ_in_shape_as_well_as_colour():
    """As many as there are shapes, then hollow ones: all differ without colour, and no two look alike at all."""
    groups = [Series(str(number), str(number), [], []) for number in range(66)]
    looks = [_look(groups, number) for number in range(66)]
    assert len({(look["color"], look["marker"]) for look in looks}) == 66
    hollow = [(look["marker"], look["markerfacecolor"] == "white") for look in looks[:22]]
    assert len(set(hollow)) == 22


def test_captions_say_what_was_asked_and_what_bars_are(table):
    text = " ".join(plots.draw(table, "pareto").get_supxlabel().split())
    assert "gqa 60 of 750 (embedded), pope 60 of 750 (embedded). SUBSET" in text
    assert "95 % interval clustered by image (gqa 20, pope 20 images)" in text
    assert "Points: mean over 3 seeds where there are several" in text
    assert "No bar" not in text


# ---- layout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", plots.KINDS)
@pytest.mark.parametrize("width", [3.0, 6.3])
def test_a_figure_for_a_paper_holds_all_it_says(kind, width, table):
    assert_nothing_is_cut_off_or_covered(plots.draw(table, kind, style.Look(width, titled=True)))


@pytest.mark.parametrize("kind", plots.KINDS)
def test_nothing_is_cut_off_or_covered(kind, crowded):
    assert_nothing_is_cut_off_or_covered(plots.draw(crowded, kind))


def assert_nothing_is_cut_off_or_covered(figure):
    """All text lies inside the figure, and the legend beside the axes."""
    FigureCanvasAgg(figure).draw()
    whole = figure.bbox.padded(1)
    texts = [
        text for place in figure.axes for text in (*place.texts, place.title, place.xaxis.label, place.yaxis.label)
    ]
    for place in figure.axes:
        low, high = sorted(place.get_ylim())
        texts += [
            label for at, label in zip(place.get_yticks(), place.get_yticklabels(), strict=False) if low <= at <= high
        ]
    legends = figure.legends
    texts += [figure._supxlabel, *(text for legend in legends for text in legend.get_texts())]
    for text in texts:
        if text.get_text():
            box = text.get_window_extent()
            assert whole.contains(box.x0, box.y0), text.get_text()
            assert whole.contains(box.x1, box.y1), text.get_text()
            assert text.get_fontsize() >= 7
    for legend in legends:
        box = legend.get_window_extent()
        assert not any(box.overlaps(place.get_window_extent()) for place in figure.axes)
        assert not box.overlaps(figure._supxlabel.get_window_extent())


@pytest.mark.parametrize("kind", plots.KINDS)
def test_files_are_valid_and_the_same_each_time(kind, table, tmp_path):
    for suffix in style.FORMATS:
        files = [tmp_path / f"{number}.{suffix}" for number in (1, 2)]
        for file in files:
            style.save(plots.draw(table, kind), file)
        assert files[0].read_bytes() == files[1].read_bytes()
    assert ElementTree.parse(tmp_path / "1.svg").getroot().tag.endswith("svg")
    with Image.open(tmp_path / "1.png") as image:
        image.load()
        assert image.width > 1000


@pytest.mark.parametrize("label", ["$x_{", "_hidden", "<b>&amp; \\frac", "100 % sure"])
def test_labels_are_shown_as_they_are(label, store, tmp_path):
    (cell,) = [answered(store, "fastv", 0.5, 0.8, label=label)]
    (table,) = build([cell])
    for kind in plots.KINDS:
        style.save(plots.draw(table, kind), tmp_path / f"{kind}.svg")
        ElementTree.parse(tmp_path / f"{kind}.svg")
    shown = [text.get_text().strip() for text in plots.draw(table, "pareto").legends[0].get_texts()]
    assert shown == [label, "Pareto front"]


def test_scores_that_are_missing_are_left_out(store):
    swept(store, tasks=("gqa",))
    score = ScoreRecord(key="exact_match", title="exact match", value=math.nan, maximum=1)
    put(store, config("vtw", label="vtw"), samples=frame(IMAGES, [0.0] * 60), scores=[score], size=60, total=750)
    (table,) = build(store.cells())
    (panel,) = panels_of(table, lambda row: row.macs)
    assert {point.row.label for point in panel.points} == {row.label for row in table.rows} - {"vtw"}
    (table,) = build([cell for cell in store.cells() if cell.config.method == "vtw"])
    with pytest.raises(DataError, match="nothing to plot"):
        plots.draw(table, "pareto")


# ---- command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def plot(cli):
    """Run ``visibench plot``; returns (exit code, the files that it names, standard error)."""

    def call(*arguments):
        code, out, err = cli("plot", *arguments)
        return code, out.split(), err

    return call


def test_command_writes_all_that_was_measured(plot, store):
    swept(store, ["fastv"])
    code, out, err = plot("run", "--format", "png,svg")
    assert (code, err) == (0, "")
    assert out == [f"run/plots/{kind}.{suffix}" for kind in plots.KINDS for suffix in ("png", "svg")]
    assert sorted(map(str, (store.root / "plots").iterdir())) == sorted(str(store.root.parent / name) for name in out)


def test_command_draws_one_task_to_a_file(plot, store, tmp_path):
    swept(store, ["fastv"])
    assert plot("run", "--kind", "pareto", "--task", "pope", "--out", "fig.svg") == (0, ["fig.svg"], "")
    assert plot("run", "--kind", "tokens", "--task", "pope") == (0, ["run/plots/tokens-pope.png"], "")
    assert {"fig.svg", "run"} == {path.name for path in tmp_path.iterdir()}


def test_results_that_cannot_be_compared_are_drawn_apart(plot, store):
    swept(store, ["fastv"], tasks=("gqa",))
    answered(store, "fastv", 0.5, 0.8, model="other")
    assert plot("run", "--kind", "components") == (0, ["run/plots/components-1.png", "run/plots/components-2.png"], "")
    code, _, err = plot("run", "--kind", "components", "--out", "a.png")
    assert (code, "2 tables" in err) == (2, True)


def test_one_cell_without_times(plot, store):
    answered(store, "fastv", 0.5, 0.8, timed=False, timing=None)
    code, out, err = plot("run")
    assert (code, len(out)) == (0, 3)
    assert err.startswith("No plot of prefill: nothing was timed")
    code, _, err = plot("run", "--kind", "prefill")
    assert (code, err.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kind", "paretto"], "did you mean 'pareto'"),
        (["--task", "gpa"], "did you mean 'gqa'"),
        (["--format", "gif"], "Known: pdf, png, svg"),
        (["--kind", "pareto", "--out", "a.gif"], "must end in .png, .svg or .pdf"),
        (["--out", "a.png"], "choose one with --kind"),
        (["--kind", "pareto", "--out", "a.png", "--format", "svg"], "both say the format"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(arguments, message, plot, store, tmp_path):
    answered(store, "fastv", 0.5, 0.8)
    code, out, err = plot("run", *arguments)
    assert (code, out, err.count("\n")) == (2, [], 1)
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_empty_folder_is_one_line(plot, tmp_path):
    (tmp_path / "run").mkdir()
    code, _, err = plot("run")
    assert (code, err.count("\n")) == (2, 1)
    assert "no finished results" in err


def test_an_unknown_kind_is_named(table):
    with pytest.raises(OptionError, match="did you mean 'pareto'"):
        plots.draw(table, "paretto")
