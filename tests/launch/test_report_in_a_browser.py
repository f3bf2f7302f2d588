"""The page in a real browser: no request, no error, a narrow window, the keyboard, contrast, print, a saved CSV."""

from __future__ import annotations

import base64
import csv
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, browser, needs_browser
from example_runs import TRAP, whole_run

from megatron_lowbit.launch.page.build import write_page

pytestmark = [needs_browser, pytest.mark.xdist_group("browser")]
TAB, ENTER = "\ue004", "\ue007"  # of WebDriver
FOCUSED = """
const e = document.activeElement, s = getComputedStyle(e);
return [e.tagName, e.getAttribute("aria-label") || e.textContent.trim().slice(0, 60), s.outlineStyle, s.outlineWidth];
"""
FOCUSABLE = """
return [...document.querySelectorAll("a[href], summary, [tabindex='0']")]
    .filter(e => e.checkVisibility({contentVisibilityAuto: true, visibilityProperty: true}))
    .map(e => [e.tagName, e.getAttribute("aria-label") || e.textContent.trim().slice(0, 60)]);
"""
# WCAG 2: relative luminance, and the ratio of the text's to that of the first opaque background behind it.
CONTRAST = """
const rgb = c => (c.match(/[0-9.]+/g) || []).map(Number);
const light = c => c.slice(0, 3).map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = e => {
    for (; e; e = e.parentElement) {
        const c = rgb(getComputedStyle(e).backgroundColor);
        if (c.length == 3 || c[3] == 1) return c;
    }
    return [255, 255, 255];
};
const worst = [];
for (const e of document.querySelectorAll("body *")) {
    const text = [...e.childNodes].filter(n => n.nodeType == 3).map(n => n.textContent).join("").trim();
    if (!text || e.closest("style")) continue;
    const svg = e.namespaceURI.endsWith("svg"), s = getComputedStyle(e);
    const [a, b] = [light(rgb(svg ? s.fill : s.color)), light(behind(svg ? e.closest("div") : e))];
    worst.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), text.slice(0, 40)]);
}
return worst.sort((a, b) => a[0] - b[0]).slice(0, 3).concat([[worst.length, "texts"]]);
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("page")
    runs = [whole_run(folder / "one", layers=8), whole_run(folder / "two", layers=8)]  # more rows than a table shows
    write_page(runs, folder / "page.html")
    return folder / "page.html"


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as started:
        yield started


@pytest.fixture
def opened(window: Browser, page: Path) -> Browser:
    window.width(1000)
    window.media()
    window.requests(), window.console()
    window.open(page)
    return window


def test_it_asks_for_nothing_and_complains_of_nothing(opened: Browser, page: Path):
    asked = opened.requests()
    assert page.as_uri() in asked
    assert not [url for url in asked if url != page.as_uri() and not url.startswith("data:")]
    assert opened.console() == []
    assert opened.run("return document.querySelectorAll('svg').length") > 10
    assert opened.run("return document.querySelectorAll('script').length") == 0
    assert TRAP in opened.run("return document.body.textContent")


def test_ids_are_unique_and_links_lead_somewhere(opened: Browser):
    ids = opened.run("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids)) > 10
    hrefs = opened.run("return [...document.querySelectorAll('a[href^=\"#\"]')].map(e => e.getAttribute('href'))")
    assert {href[1:] for href in hrefs} <= set(ids)
    used = opened.run("return [...document.querySelectorAll('use')].map(e => e.href.baseVal.slice(1))")
    assert used and set(used) <= set(ids)


@pytest.mark.parametrize("width", [360, 1000])
def test_it_fits_the_window(opened: Browser, width: int):
    opened.width(width)
    for open_all in (False, True):
        if open_all:
            opened.run("document.querySelectorAll('details').forEach(e => { e.open = true })")
        assert opened.run("return document.documentElement.scrollWidth") <= width


def test_the_keyboard_reaches_everything_in_order_and_shows_where_it_is(opened: Browser):
    expected = opened.run(FOCUSABLE)
    assert len(expected) > 30 and expected[0] == ["A", "Skip to the content"]
    seen = []
    for _ in expected:
        opened.press(TAB)
        tag, label, style, width = opened.run(FOCUSED)
        assert style == "solid" and width == "3px", f"{label} has the focus, and does not show it"
        seen.append([tag, label])
    assert seen == expected


def test_enter_opens_a_table(opened: Browser):
    find = "const d = document.querySelector('.plot + details');"
    state = f"{find} return [d.open, d.querySelector('table').checkVisibility()]"
    assert opened.run(state)[0] is False
    opened.run("document.querySelector('.plot + details summary').focus()")
    opened.press(ENTER)
    assert opened.run(state) == [True, True]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(opened: Browser, scheme: str):
    opened.media(scheme=scheme)
    opened.run("document.querySelectorAll('details').forEach(e => { e.open = true })")
    *worst, (count, _) = opened.run(CONTRAST)
    assert count > 200 and worst[0][0] >= 4.5, worst
    paper = opened.run("return getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 24, 28)"}[scheme]


def test_print_has_the_closed_tables_too(opened: Browser):
    visible = "return document.querySelector('.plot + details table').checkVisibility()"
    assert not opened.run(visible)
    opened.media("print", "dark")
    assert opened.run(visible)
    assert opened.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    pdf = base64.b64decode(opened.devtools("Page.printToPDF", printBackground=True)["data"])
    assert pdf.startswith(b"%PDF") and len(pdf) > 20_000


def test_a_csv_is_saved(opened: Browser, tmp_path: Path):
    opened.devtools("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    name = opened.run("const a = document.querySelector('a[download]'); a.click(); return a.download")
    deadline = time.monotonic() + 30
    while not (tmp_path / name).exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    rows = list(csv.reader((tmp_path / name).read_text().splitlines()))
    assert rows[0][:3] == ["run", "name", "perplexity"]
    assert rows[1][:3] == ["one", "full precision", "10.0"] and rows[2][1] == f"{TRAP} 0"
