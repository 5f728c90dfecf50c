"""The report in a real browser, headless Chromium: it sorts, filters, fits a phone, asks the network for nothing."""

import base64
import json
import re
import shutil

import numpy as np
import pytest
from reported import HALF, HOSTILE, RIGHT, WRONG, N, cell, hostile_store
from visibench.reports.html.report import report
from visibench.reports.question_image import QuestionImage
from visibench.results.store.store import Store
from visibench.results.tables.tables import build

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver here: apt install them"),
]
PIXEL = (
    "data:image/png;base64,"
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--disable-dev-shm-usage",
)  # fmt: skip
INTERNAL = ("data:", "chrome:")  # the browser's own first page is of the second kind
EVENTS = ("requestWillBeSent", "loadingFailed")


class Browser:
    """A browser with one page; ``logged`` and ``requested``: what the page said and asked for since it was opened."""

    def __init__(self, profile):
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))

    def open(self, file, width=1280, script=True):
        self.driver.get_log("browser"), self.driver.get_log("performance")
        self.command("Emulation.setScriptExecutionDisabled", value=not script)
        self.command("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.driver.get(file.as_uri())

    def command(self, name, **options):
        return self.driver.execute_cdp_cmd(name, options)

    def __call__(self, code, *values):
        return self.driver.execute_script(code, *values)

    def find(self, selector):
        return self.driver.find_elements("css selector", selector)

    def column(self, place):
        """What the first line of each cell of the main table's column says, from top to bottom."""
        return self(
            "return [...document.querySelectorAll('#t1-grid tbody tr:not(.group)')]"
            ".map((row) => row.cells[arguments[0]].childNodes[0].textContent.trim())",
            place,
        )

    @property
    def logged(self):
        return [entry["message"] for entry in self.driver.get_log("browser")]

    @property
    def requested(self):
        """What the page tried to load, and why not where something stopped it."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        params = {name: [m["params"] for m in messages if m["method"] == f"Network.{name}"] for name in EVENTS}
        sent = {one["requestId"]: one["request"]["url"] for one in params["requestWillBeSent"]}
        stopped = {one["requestId"]: one.get("blockedReason") for one in params["loadingFailed"]}
        return {url: stopped.get(request) for request, url in sent.items() if not url.startswith(INTERNAL)}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report of two tasks with figures and overlays."""
    folder = tmp_path_factory.mktemp("report")
    store, some = Store(folder / "run"), np.arange(16) % 2 == 0
    for task in ("gqa", "pope"):
        dense = RIGHT if task == "gqa" else HALF
        cell(store, "none", dense, task=task, kept=np.ones(16))
        cell(store, "fastv", np.where(np.arange(N) < 10, 1 - dense, dense), 8, task=task, kept=some)
        cell(store, "dart", np.where(np.arange(N) < 30, 1 - dense, dense), 4, task=task, kept=some)
        cell(store, "random", WRONG, 12, task=task, kept=some, label="a " + "very long label " * 9)
    picture = QuestionImage(PIXEL, 144, 144, 4, "as the model saw it")
    text = report(build(store.cells()), "run", images=lambda config, prompts: {key: [picture] for key in prompts})
    file = folder / "report.html"
    file.write_text(text, encoding="utf-8")
    return file


def test_it_renders_without_a_word_in_the_console_or_a_request(page, browser):
    browser.open(page)
    assert browser.find("h1")[0].text == "run"
    assert len(browser.find(".paper svg")) == 4
    assert {svg.size["width"] > 300 for svg in browser.find(".paper svg")} == {True}
    assert browser("return getComputedStyle(document.querySelector('.veil')).fill") == "rgb(0, 0, 0)"
    assert browser("return new Set([...document.querySelectorAll('[id]')].map((e) => e.id)).size") == len(
        browser.find("[id]")
    )
    assert browser.logged == []
    assert browser.requested == {page.as_uri(): None}


def test_the_policy_stops_what_would_leave(page, browser):
    browser.open(page)
    browser(
        "const image = new Image(); image.src = 'https://example.invalid/x.png'; document.body.append(image);"
        "const script = document.createElement('script'); script.textContent = 'window.ran = 1';"
        "document.body.append(script); fetch('https://example.invalid/').catch(() => {});"
    )
    assert browser("return window.ran") is None
    assert browser.requested == {page.as_uri(): None, "https://example.invalid/x.png": "csp"}
    assert sum("Content Security Policy" in line for line in browser.logged) >= 3


def test_columns_sort_by_figures_and_by_words_and_go_back(page, browser):
    browser.open(page)
    groups = browser.column(0)
    heads = browser.find("#t1-grid thead th")
    gqa = next(place for place, head in enumerate(heads) if head.text.lower().startswith("gqa"))
    heads[gqa].find_element("tag name", "button").click()
    assert heads[gqa].get_attribute("aria-sort") == "descending"
    assert browser.column(gqa) == ["100.0", "75.0", "25.0", "0.0"]
    assert browser.find("#status")[0].text.endswith("descending.")
    heads[gqa].find_element("tag name", "button").send_keys("\ue007")  # Enter
    assert heads[gqa].get_attribute("aria-sort") == "ascending"
    assert browser.column(gqa) == ["0.0", "25.0", "75.0", "100.0"]
    heads[0].find_element("tag name", "button").click()
    assert heads[0].get_attribute("aria-sort") == "ascending"
    assert heads[gqa].get_attribute("aria-sort") is None
    assert [label[:6] for label in browser.column(0)] == ["a very", "DART", "Dense", "FastV"]
    browser.find("[data-restore]")[0].click()
    assert browser.column(0) == groups
    assert browser.find("[aria-sort]") == []


def test_questions_are_filtered_by_task_kind_and_method(page, browser):
    browser.open(page)
    shown = lambda: [card for card in browser.find(".question") if card.is_displayed()]  # noqa: E731
    everything = len(shown())
    assert everything == 24

    def choose(name, text):
        from selenium.webdriver.support.select import Select

        Select(browser.find(f'[data-filter="{name}"]')[0]).select_by_visible_text(text)
        assert browser.find("output")[0].text == f"{len(shown())} of {everything} questions"

    choose("task", "POPE")
    assert {card.get_attribute("data-task") for card in shown()} == {"pope"}
    choose("kind", "dense wrong, methods right")
    assert {card.get_attribute("data-kind") for card in shown()} == {"gained"}
    choose("methods", "FastV")
    assert 0 < len(shown()) < everything
    for card in shown():
        (row,) = card.find_elements("css selector", ".chosen")
        assert row.text.startswith("FastV")
        assert "right" in row.text
    choose("task", "GQA")
    assert shown() == []  # the dense model is always right there


@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_does_not_scroll_sideways_and_wide_tables_do(page, width, browser):
    browser.open(page, width)
    assert browser("return document.documentElement.scrollWidth") <= width
    boxes = browser(
        "return [...document.querySelectorAll('.box')].map((b) => [b.scrollWidth > b.clientWidth, b.tabIndex])"
    )
    assert {tab for _, tab in boxes} == {0}
    assert any(wide for wide, _ in boxes) or width > 400


def test_it_reads_without_script(page, browser):
    browser.open(page, script=False)
    assert [element.is_displayed() for element in browser.find(".paper svg")] == [True] * 4
    assert [element.is_displayed() for element in browser.find(".question")] == [True] * 24
    assert not any(element.is_displayed() for element in browser.find(".tools, .filters, th button"))
    assert browser.find("#t1-grid td")[0].is_displayed()


PRINTED = """
const style = (selector) => [...document.querySelectorAll(selector)].map((element) => getComputedStyle(element));
return {
  shown: style("nav, .filters, .tools, .skip").filter((one) => one.display !== "none").length,
  grounds: [...new Set(style("body, .card, .parts, .group th, .figures th").map((one) => one.backgroundColor))],
  closed: [...document.querySelectorAll("details:not(.aside) > :not(summary)")].filter((e) => !e.clientHeight).length,
  cards: style(".card").map((one) => one.breakInside),
  terms: style(".card dt, .card dd").map((one) => `${one.breakInside} ${one.breakAfter}`),
  heads: style("thead").map((one) => `${one.display} ${one.breakInside}`),
  buttons: style("th button").map((one) => one.display),
  wide: Math.max(...[...document.querySelectorAll("table, svg, pre")].map((e) => e.getBoundingClientRect().right)),
};
"""


def test_it_prints_whole_and_on_white(page, browser):
    browser.open(page, 703)  # what the margins leave of an A4 page, in CSS pixels
    assert browser("return [...document.querySelectorAll('details:not([open])')].length") > 0
    dark = {"name": "prefers-color-scheme", "value": "dark"}
    browser.command("Emulation.setEmulatedMedia", media="print", features=[dark])
    found = browser(PRINTED)
    browser.command("Emulation.setEmulatedMedia", media="", features=[])
    assert found["shown"] == found["closed"] == 0
    assert set(found["grounds"]) <= {"rgb(255, 255, 255)", "rgba(0, 0, 0, 0)"}
    assert found["wide"] <= 703
    # What it takes in Chromium that a card stays on a page and that each page of a table begins with its head: nothing
    # in the card that avoids breaks on its own account, and no box of a button in the head.
    assert set(found["cards"]) == {"avoid"}
    assert set(found["terms"]) == {"auto auto"}
    assert set(found["heads"]) == {"table-header-group avoid"}
    assert set(found["buttons"]) == {"contents"}
    made = base64.b64decode(browser.command("Page.printToPDF", preferCSSPageSize=True)["data"])
    sizes = [tuple(map(float, size)) for size in re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", made)]
    assert {(round(width), round(height)) for width, height in sizes} <= {(595, 842), (596, 842)}


def test_nothing_hostile_runs(tmp_path, browser):
    store = hostile_store(tmp_path / "run")
    text = report(build(store.cells()), HOSTILE[0], images=lambda config, prompts: dict.fromkeys(prompts, HOSTILE[1]))
    file = tmp_path / "report.html"
    # Without the policy, so that escaping alone must hold.
    file.write_text(text.replace('http-equiv="Content-Security-Policy"', 'name="none"'), encoding="utf-8")
    browser.open(file)
    from selenium.common.exceptions import NoAlertPresentException

    with pytest.raises(NoAlertPresentException):
        _ = browser.driver.switch_to.alert
    assert browser.find("img, [onerror], [onload]") == []
    assert len(browser.find("script")) == 1
    assert browser.find("h1")[0].text == HOSTILE[0]
    assert browser.logged == []
    assert browser.requested == {file.as_uri(): None}
    assert browser.find("#t1-grid tbody:last-child tr:last-child th")[0].text == "".join(HOSTILE[:2])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(page, scheme, browser):
    """WCAG AA: 4.5 between the colours of text and ground, for every pair that the style sheet uses."""
    browser.open(page)
    browser.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    names = ("ink", "soft", "link", "good", "bad", "page", "panel", "mark")
    colours = {
        name: browser(f"return getComputedStyle(document.documentElement).getPropertyValue('--{name}').trim()")
        for name in names
    }
    browser.command("Emulation.setEmulatedMedia", features=[])
    for ground in ("page", "panel", "mark"):
        for text in ("ink", "soft", "good", "bad", "link"):
            light, dark = sorted(map(_luminance, (colours[text], colours[ground])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (scheme, text, ground)


def _luminance(colour):
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
