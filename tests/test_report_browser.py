"""The report as a browser shows it: light, dark, on paper and on a phone, in headless Chromium."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import report_records as records
from matplotlib.image import imread
from report_browser import Browser, executable

from onnxslim.reports import write

pytestmark = pytest.mark.skipif(executable() is None, reason="no Chromium: apt-get install chromium")

# The contrast of each piece of visible text with the nearest ground that is not transparent.
CONTRAST = """
(() => {
  const rgb = text => { const p = text.match(/[\\d.]+/g).map(Number); return p.length < 4 ? [...p, 1] : p; };
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = c => { const [r, g, b] = c.map(v => linear(v / 255));
    return .2126 * r + .7152 * g + .0722 * b; };
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  while (walker.nextNode()) {
    const node = walker.currentNode, element = node.parentElement;
    if (!node.data.trim() || !element.checkVisibility() || element.closest('title, desc')) continue;
    seen += 1;
    const style = getComputedStyle(element), ink = rgb(element.closest('svg') ? style.fill : style.color);
    let ground = element, back = [255, 255, 255, 0];
    while (ground && back[3] === 0) {
      back = rgb(getComputedStyle(ground).backgroundColor);
      ground = ground.parentElement;
    }
    const [a, b] = [light(ink.slice(0, 3)), light(back.slice(0, 3))].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < 4.5) poor.push([node.data.trim().slice(0, 40), ratio.toFixed(2), style.color, back.join()]);
  }
  return {seen, poor: poor.slice(0, 10)};
})()
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write(records.goals_missed(), path)
    return path


def luminance(png: bytes) -> np.ndarray:
    return imread(io.BytesIO(png))[..., :3] @ np.array([0.2126, 0.7152, 0.0722])


def test_light_and_dark_are_two_pictures_of_one_page(browser: Browser, report: Path) -> None:
    pictures = {}
    for scheme in ("light", "dark"):
        browser.look(scheme=scheme)
        browser.open(report)
        pictures[scheme] = luminance(browser.picture())
    # The median pixel is ground; the spread shows that something stands on it.
    assert np.median(pictures["light"]) > 0.85 and np.median(pictures["dark"]) < 0.15
    assert all(picture.std() > 0.05 for picture in pictures.values())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_keeps_the_contrast_of_wcag_aa(browser: Browser, report: Path, scheme: str) -> None:
    browser.look(scheme=scheme)
    browser.open(report)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    found = browser.evaluate(CONTRAST)
    assert found["seen"] > 500 and found["poor"] == []


def test_no_request_no_error_even_with_hostile_names(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "hostile.html"
    write(records.hostile(), path)
    browser.look()
    browser.open(path)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    browser.picture(whole=True)
    requests = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in requests if not url.startswith("data:")] == [path.resolve().as_uri()]
    said = [
        e
        for e in browser.events
        if e["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
    ]
    assert said == []
    assert not [e for e in browser.events if e["method"] == "Page.javascriptDialogOpening"]
    assert browser.evaluate("document.images.length + document.scripts.length") == 0


@pytest.mark.parametrize("width", [380, 768, 1200])
@pytest.mark.parametrize("build", [records.goals_missed, records.hostile, records.nothing_measured])
def test_page_never_scrolls_sideways(browser: Browser, tmp_path: Path, build: object, width: int) -> None:
    path = tmp_path / "report.html"
    write(build(), path)  # type: ignore[operator]
    browser.look(width=width)
    browser.open(path)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.evaluate("document.documentElement.scrollWidth") == width


def test_goals_need_no_scrolling_on_a_phone(browser: Browser, report: Path) -> None:
    browser.look(width=380)
    browser.open(report)
    box = "document.querySelector('.verdict .scroll')"
    assert browser.evaluate(f"{box}.scrollWidth <= {box}.clientWidth")


def test_paper_shows_what_is_folded_and_is_light(browser: Browser, report: Path) -> None:
    folded = """(() => { const item = document.querySelector('#pass-3 li');
      return item.checkVisibility({contentVisibilityAuto: true}) && item.getBoundingClientRect().height })()"""
    browser.look(scheme="dark")
    browser.open(report)
    assert not browser.evaluate(folded)
    browser.look(scheme="dark", media="print", width=760)
    # Taking the picture waits for the frame in which the folds open.
    assert np.median(luminance(browser.picture(whole=True))) > 0.95
    assert browser.evaluate(folded) > 8
    screen = browser.evaluate("getComputedStyle(document.querySelector('nav')).display")
    assert screen == "none"
    assert browser.pdf().count(b"/Type /Page\n") >= 5


def test_boxes_that_scroll_can_be_reached_by_keyboard(browser: Browser, report: Path) -> None:
    browser.look(width=380)
    browser.open(report)
    unreachable = """[...document.querySelectorAll('*')].filter(e => e.scrollWidth > e.clientWidth && e.tabIndex < 0
      && ['auto', 'scroll'].includes(getComputedStyle(e).overflowX)).length"""
    assert browser.evaluate(unreachable) == 0
