"""The report of a run: what it says, what it shows, and that nothing in it comes from elsewhere or runs."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from reported import HALF, HOSTILE, RIGHT, WRONG, N, cell, hostile_store
from storing import config
from typer.testing import CliRunner
from visibench.cli import app
from visibench.errors import DataError
from visibench.evals.tasks.tasks import load_tasks
from visibench.models import load_model
from visibench.reports.html.inline import inline, veil
from visibench.reports.html.questions import choose
from visibench.reports.html.report import report
from visibench.reports.image_loader import LONGEST, ImageLoader, seen, stored
from visibench.reports.question_image import QuestionImage
from visibench.results.figures import plots
from visibench.results.store.store import Store
from visibench.results.tables import method_facts, summary, titles
from visibench.results.tables.render import fitted
from visibench.results.tables.tables import build


@pytest.fixture(autouse=True)
def _pages_without_figures(monkeypatch):
    """Drawing them takes most of a page's time; the tests in a browser have them."""
    monkeypatch.setattr("visibench.reports.html.report.PLOTS", ())


@pytest.fixture
def table(tmp_path):
    """Makes the table of cells: ``table(none=scores, fastv=scores)``."""

    def make(**scores):
        store = Store(tmp_path / "run")
        for method, values in scores.items():
            cell(store, method, values, 16 if method == "none" else 8)
        return build(store.cells())[0]

    return make


# ---- what it says -------------------------------------------------------------------------------------------------


def test_summary_tells_shown_differences_from_those_not_shown(table):
    worse = table(none=RIGHT, fastv=HALF)
    assert "below dense on at least one task" in summary.lead(worse)[1]
    (_, said), *_ = summary.by_group(worse)
    assert "50.0 % of the dense scores" in said
    assert "T = 12.0" in said
    assert "shown below dense on GQA" in said
    assert "tied" not in said


def test_a_difference_too_small_to_be_shown_is_not_called_equal(table):
    almost = RIGHT.copy()
    almost[:2] = 0
    close = table(none=RIGHT, fastv=almost)
    assert "FastV, which keeps 95.0 % of the dense scores" in summary.lead(close)[1]
    assert "Not shown is not the same as equal" in summary.lead(close)[1]
    (_, said), *_ = summary.by_group(close)
    assert "No difference from dense is shown on GQA" in said
    assert "shown below" not in said
    assert summary.verdicts(close).endswith("0 show a lower score, 0 a higher one, and 1 no difference.")


def test_of_two_rows_that_tests_do_not_tell_apart_the_higher_is_not_called_best(table):
    one, other = RIGHT.copy(), RIGHT.copy()
    one[:1], other[-2:] = 0, 0
    (_, said), *_ = summary.by_group(table(none=RIGHT, fastv=one, dart=other))
    assert "FastV keeps 97.5 %" in said
    assert "No row is shown to be the best" in said
    (_, said), *_ = summary.by_group(table(none=RIGHT, fastv=one, dart=WRONG))
    assert "Shown best of all: FastV on GQA" in said


def test_rows_of_one_display_name_have_their_labels(monkeypatch):
    """A plug-in may take the name of a method that is here: only the labels tell them apart then."""
    known = method_facts.known()
    monkeypatch.setattr(method_facts, "known", lambda: known | {"mine": known["fastv"]})
    labels = ("none", "fastv:keep=0.5", "mine:keep=0.5", "fastv:keep=0.25", "control of fastv:keep=0.5")
    assert titles.row_titles(dict.fromkeys(labels, "")) == {
        "none": "Dense",
        "fastv:keep=0.5": "fastv:keep=0.5",
        "mine:keep=0.5": "mine:keep=0.5",
        "fastv:keep=0.25": "FastV (keep=0.25)",
        "control of fastv:keep=0.5": "control of FastV (keep=0.5)",
    }


def test_a_control_is_no_setting_to_choose(table, tmp_path):
    table(none=RIGHT, fastv=RIGHT)
    store = Store(tmp_path / "run")
    cell(store, "fastv", RIGHT, 8, label="control of fastv", control=True, macs=1e9)
    scope, cheapest = summary.lead(build(store.cells())[0])
    assert "1 setting of 1 method on" in scope
    assert "on no task is FastV, which keeps" in cheapest
    tables = build(store.cells())
    short, wide = (" ".join(fitted(tables, None, 90, wide=wide).split()) for wide in (False, True))
    assert "mean over 1 seeds. Near 0" in short
    assert "[95 % interval, clustered by image] and p of that one test, not adjusted. Near 0" in wide


def test_a_control_does_not_stand_for_its_budget(table, tmp_path):
    table(none=RIGHT, fastv=HALF)
    store = Store(tmp_path / "run")
    cell(store, "fastv", RIGHT, 8, label="control of fastv", control=True, macs=1e9)
    (_, said), *_ = summary.by_group(build(store.cells())[0])
    assert said.startswith("FastV keeps 50.0 % of the dense scores")


def test_without_the_dense_model_no_share_is_named(table):
    alone = table(fastv=HALF, dart=RIGHT)
    assert summary.by_group(alone) == []
    assert "the dense model was not run" in summary.lead(alone)[0]
    assert choose(alone, 9) == []


# ---- which questions ----------------------------------------------------------------------------------------------


def test_questions_are_those_on_which_dense_and_methods_part(table):
    dense, one, other = RIGHT.copy(), RIGHT.copy(), RIGHT.copy()
    dense[3], other[[5, 7]], one[7] = 0, 0, 0
    chosen = choose(table(none=dense, fastv=one, dart=other), 24)
    assert [(q.doc_id, q.kind, sorted(a.row.method for a in q.answers if a.parts)) for q in chosen] == [
        (5, "lost", ["dart"]),  # divides the methods; on 7 both are wrong
        (3, "gained", ["dart", "fastv"]),
        (7, "lost", ["dart", "fastv"]),
    ]
    assert [a.answers for a in chosen[0].answers] == [["none 5"], ["dart 5"], ["fastv 5"]]
    assert [a.right for a in chosen[0].answers] == [True, False, True]


def test_questions_are_spread_over_tasks_kinds_and_methods(tmp_path):
    store, dense = Store(tmp_path), HALF
    for task in ("gqa", "pope"):
        cell(store, "none", dense, task=task)
        cell(store, "fastv", np.where(np.arange(N) < 20, 1 - dense, dense), 8, task=task)
        cell(store, "dart", np.where(np.arange(N) >= 20, 1 - dense, dense), 8, task=task)
    chosen = choose(build(store.cells())[0], 8)
    counts = {(task, kind): 0 for task in ("gqa", "pope") for kind in ("lost", "gained")}
    parting = []
    for question in chosen:
        counts[question.config.task, question.kind] += 1
        parting += [a.row.method for a in question.answers if a.parts]
    assert set(counts.values()) == {2}
    assert (parting.count("fastv"), parting.count("dart")) == (4, 4)
    assert len({(q.config.task, q.image) for q in chosen}) == 8
    assert choose(build(store.cells())[0], 0) == []
    assert len(choose(build(store.cells())[0], 500)) == 2 * N


def test_a_method_is_wrong_only_if_it_is_with_every_seed(tmp_path):
    store = Store(tmp_path)
    cell(store, "none", RIGHT)
    both, first = RIGHT.copy(), RIGHT.copy()
    both[4], first[[4, 6]] = 0, 0
    cell(store, "random", first, 8, seed=0)
    cell(store, "random", both, 8, seed=1)
    (question,) = choose(build(store.cells())[0], 24)
    assert question.doc_id == 4
    assert question.answers[1].answers == ["random 4", "random 4"]


# ---- pictures -----------------------------------------------------------------------------------------------------


def rastered(path, side):
    """The cells that a path of rectangles covers."""
    covered = np.zeros((side, side), bool)
    for x, y, width, back in re.findall(r"M(\d+) (\d+)h(\d+)v1h-(\d+)z", path):
        assert width == back
        assert not covered[int(y), int(x) : int(x) + int(width)].any()
        covered[int(y), int(x) : int(x) + int(width)] = True
    return covered


@pytest.mark.parametrize("side", [1, 4, 12, 24])
def test_the_veil_covers_what_is_gone(side):
    kept = np.random.default_rng(side).random(side * side) < 0.4
    np.testing.assert_array_equal(rastered(veil(kept.tolist(), side), side), ~kept.reshape(side, side))
    assert veil([True] * side**2, side) == ""


@pytest.mark.parametrize("size", [(144, 144), (200, 90), (77, 301)])
def test_images_are_shown_as_tiny_sees_them(size):
    tiny = load_model("tiny")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
    pixels = tiny.encoded(["What?"], [[image]])["pixel_values"][0]
    processor = tiny.processor.image_processor
    mean, std = (torch.tensor(getattr(processor, f"image_{of}"))[:, None, None] for of in ("mean", "std"))
    expected = ((pixels * std + mean) * 255).round().byte().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(seen(tiny.processor, image), expected)


def test_images_are_shown_as_a_centre_crop_sees_them(checkpoint):
    processor = load_model(str(checkpoint)).processor
    size = processor.image_processor.crop_size["height"]
    assert processor.image_processor.do_center_crop
    wide = Image.new("RGB", (3 * size, size), "red")
    wide.paste("blue", (size, 0, 2 * size, size))
    assert {tuple(pixel) for pixel in seen(processor, wide).reshape(-1, 3)} == {(0, 0, 255)}


def test_pictures_are_bounded_and_come_with_the_reason_where_there_is_none(tmp_path, disk_data):
    noise = np.random.default_rng(0).integers(0, 256, (900, 2000, 3), np.uint8)
    large = stored(Image.fromarray(noise), "")
    assert (large.width, large.height) == (LONGEST, 151)
    assert large.uri.startswith("data:image/jpeg")
    assert len(large.uri) < 80_000
    gone = ImageLoader()(config(origin=str(tmp_path / "gone")), {0: "is it?"})
    assert "gone" in gone[0]
    (gqa,) = load_tasks(["gqa"], str(disk_data))
    prompt = gqa.question(0)[0]
    asked = ImageLoader()(config(origin=str(disk_data)), {0: prompt, 1: "another question", 999: prompt})
    assert isinstance(asked[0][0], QuestionImage)
    assert asked[0][0].grid == 12
    assert "data have changed" in asked[1]
    assert "no question 999" in asked[999]


def test_figures_side_by_side_share_no_id_and_hold_no_style(table):
    page = table(none=RIGHT, fastv=HALF)
    svgs = [inline(plots.draw(page, kind), f"{kind}-", kind) for kind in ("tokens", "components")]
    ids = [each for svg in svgs for each in re.findall(r'\bid="([^"]+)"', svg)]
    assert len(ids) == len(set(ids)) > 30
    for svg in svgs:
        assert "style" not in svg
        assert "<!--" not in svg
        used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg)
        assert used
        assert {one or other for one, other in used} <= set(ids)
        assert not re.search(r'="https?:(?!//www\.w3\.org/2000/svg")', svg)


# ---- the page -----------------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """What a page is made of."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_hostile_strings_are_text(tmp_path):
    tables = build(hostile_store(tmp_path).cells())
    page = Elements(report(tables, HOSTILE[0], images=lambda config, prompts: dict.fromkeys(prompts, HOSTILE[1])))
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on") or name == "style"]
    for each in HOSTILE:
        assert each in page.text


def test_the_policy_admits_what_the_page_holds_and_nothing_else(table):
    page = report([table(none=RIGHT, fastv=HALF)], "run")
    policy = next(a["content"] for tag, a in Elements(page).tags if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
    assert f"one file of {len(page.encode()) / 1e6:.1f} MB" in page


def test_page_shows_every_row_with_full_precision_to_sort_by(table):
    rows = table(none=RIGHT, fastv=HALF, dart=WRONG)
    page = Elements(report([rows], "run"))
    sorts = [attributes["data-sort"] for tag, attributes in page.tags if "data-sort" in attributes]
    for row in rows.rows:
        assert row.label in sorts
        assert repr(row.scores["gqa"]["exact_match"].mean) in sorts
        assert repr(row.tokens.mean) in sorts


def test_overlays_show_where_recorded_and_old_runs_say_so(tmp_path):
    picture = QuestionImage("data:image/png;base64,", 144, 144, 4, "as seen")
    show = lambda config, prompts: {key: [picture] for key in prompts}  # noqa: E731
    kept = np.arange(16) % 3 == 0
    new, old = Store(tmp_path / "new"), Store(tmp_path / "old")
    for store, bits in ((new, kept), (old, None)):
        cell(store, "none", RIGHT, kept=None if bits is None else np.ones(16))
        cell(store, "fastv", HALF, 6, kept=bits)
    page = Elements(report(build(new.cells()), "new", questions=1, images=show))
    veils = [attributes["d"] for tag, attributes in page.tags if attributes.get("class") == "veil"]
    np.testing.assert_array_equal(rastered(veils[1], 4), ~kept.reshape(4, 4))
    assert veils[0] == ""
    assert "6 of 16 visual tokens left under FastV" in str(page.tags)
    before = report(build(old.cells()), "old", questions=1, images=show)
    assert 'class="veil"' not in before
    assert "this run did not record which tokens stayed" in before


def test_a_grid_that_is_not_the_prompts_draws_no_overlay(tmp_path):
    store = Store(tmp_path)
    cell(store, "none", RIGHT, kept=np.ones(16))
    cell(store, "fastv", HALF, 6, kept=np.ones(16))
    picture = QuestionImage("data:image/png;base64,", 144, 144, 12, "as seen")
    page = report(build(store.cells()), "x", images=lambda config, prompts: {key: [picture] for key in prompts})
    assert 'class="veil"' not in page
    assert "the place of each token in the image is not known here" in page


def test_cards_tell_of_every_method_even_one_that_is_not_installed(table):
    page = report([table(none=RIGHT, fastv=HALF, elsewhere=WRONG)], "run", about=method_facts.known())
    assert 'href="https://arxiv.org/abs/2403.06764"' in page
    assert 'href="https://github.com/pkunlp-icler/FastV/tree/d165972"' in page
    assert "not installed where the report was made" in page


def test_command_writes_the_page_and_says_its_size(tmp_path):
    store = Store(tmp_path / "run")
    cell(store, "none", RIGHT)
    cell(store, "fastv", HALF, 8)
    result = CliRunner().invoke(app, ["report", str(store.root), "--no-images", "--questions", "3"])
    page = (store.root / "report.html").read_text(encoding="utf-8")
    assert result.exit_code == 0, result.output
    assert result.output.split() == [
        str(store.root / "report.html"),
        *re.findall(r"\S+", f"({len(page.encode()) / 1e6:.1f} MB)"),
    ]
    assert page.count('<article class="question"') == 3
    with pytest.raises(DataError, match="no folder"):
        CliRunner().invoke(app, ["report", str(tmp_path / "none")], catch_exceptions=False)
    with pytest.raises(DataError, match="cannot write"):
        CliRunner().invoke(app, ["report", str(store.root), "-o", str(tmp_path)], catch_exceptions=False)
    with pytest.raises(DataError, match="cannot write"):
        CliRunner().invoke(
            app, ["report", str(store.root), "-o", str(tmp_path / "a" / "b.html")], catch_exceptions=False
        )
