"""The page in headless Chromium: silent, offline, readable on a phone, in the dark and on paper."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from headrace.reporting.facts import Comparison, PipelineStep, PrecisionStudy, ReportFacts
from headrace.reporting.page import render, with_comparisons, write_report
from reporting.invented_data import mixed_data

CHROMIUM = next((path for path in ("/usr/bin/chromium", shutil.which("chromium"), shutil.which("chromium-browser"),
                                   shutil.which("google-chrome")) if path and Path(path).exists()), None)  # fmt: skip
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no Chromium: the report is not opened in a browser (apt-get install chromium)"
    ),
]

CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return canvas.getImageData(0, 0, 1, 1).data;
  };
  const linear = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = c => 0.2126 * linear(c[0] / 255) + 0.7152 * linear(c[1] / 255) + 0.0722 * linear(c[2] / 255);
  const behind = node => {
    const layers = [];
    for (; node; node = node.parentElement) layers.push(rgba(getComputedStyle(node).backgroundColor));
    return layers.reverse().reduce((c, l) => c.map((v, i) => v + (l[i] - v) * l[3] / 255), [255, 255, 255]);
  };
  const worst = [];
  const words = 'p, td, th, dt, dd, li, span, a, code, pre, bdi, summary, caption, figcaption, h1, h2, svg text';
  for (const node of document.querySelectorAll(words)) {
    if (!node.textContent.trim() || !node.getClientRects().length) continue;
    const style = getComputedStyle(node), ink = rgba(node.closest('svg') ? style.fill : style.color);
    const [a, b] = [light(ink), light(behind(node))].sort((x, y) => y - x);
    worst.push([(a + 0.05) / (b + 0.05), node.textContent.trim().slice(0, 30)]);
  }
  return worst.sort((x, y) => x[0] - y[0])[0];
}"""

SIZES = """[...document.querySelectorAll('figure')].map(figure => [...figure.querySelectorAll('svg')]
  .map(svg => svg.getBoundingClientRect()).filter(box => box.width > 0).map(box => [box.width, box.height]))"""

CUT_OFF = """[...document.querySelectorAll('svg text')].filter(words => {
  if (!words.getClientRects().length) return false;
  const a = words.getBoundingClientRect(), b = words.ownerSVGElement.getBoundingClientRect();
  return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1;
}).map(words => words.textContent)"""

COLLIDING = """[...document.querySelectorAll('svg')].filter(svg => svg.getClientRects().length).flatMap(svg => {
  const boxes = [...svg.querySelectorAll('text')].map(t => [t.getBoundingClientRect(), t.textContent]);
  return boxes.flatMap(([a, one], i) => boxes.slice(i + 1).filter(([b]) => a.left < b.right - 1 && b.left < a.right - 1
    && a.top < b.bottom - 4 && b.top < a.bottom - 4).map(([_, other]) => one + ' / ' + other));
})"""

SMALLEST = """Math.min(...[...document.querySelectorAll('svg')].filter(svg => svg.getBoundingClientRect().width)
  .map(svg => 12 * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width))"""


PAPER = 688
"""Pixels across an A4 sheet between margins of 14 mm."""

BEYOND = """width => [...document.querySelectorAll('table, svg, pre, p')].filter(node => node.getClientRects().length)
  .map(node => [node.getBoundingClientRect().right, (node.caption || node).textContent.trim().slice(0, 40)])
  .filter(([right]) => right > width + 1)"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def address(
    demo_facts: ReportFacts,
    demo_study: PrecisionStudy,
    demo_step: PipelineStep,
    demo_comparison: Comparison,
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    assert demo_facts.training is not None
    training = replace(demo_facts.training, pipeline_step=demo_step)
    page = render(replace(demo_facts, study=demo_study, training=training))
    path.write_text(with_comparisons(page, (demo_comparison,)), encoding="utf-8")
    return path.as_uri()


def opened(browser: Any, address: str, width: int, scheme: str = "light") -> tuple[Any, list[str], list[str]]:
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    return page, complaints, requests


@pytest.mark.parametrize("width", [360, 390, 719, 768, 1000, 1280])
def test_silent_offline_and_without_sideways_scrolling(browser: Any, address: str, width: int) -> None:
    page, complaints, requests = opened(browser, address, width)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert complaints == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    sizes = page.evaluate(SIZES)
    drawn = [size for figure in sizes for size in figure]
    assert len(drawn) >= 10 and all(len(figure) <= 1 for figure in sizes)  # each figure once, at one of its widths
    assert all(w > 250 and h > 50 for w, h in drawn)
    page.close()


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_words_in_charts_are_whole_apart_and_large_enough(browser: Any, address: str, width: int) -> None:
    page, _, _ = opened(browser, address, width)
    assert page.evaluate(CUT_OFF) == []
    assert page.evaluate(COLLIDING) == []
    assert page.evaluate(SMALLEST) >= 10  # pixels
    page.close()


@pytest.mark.parametrize("width", [360, 1280])
def test_a_mixture_of_sources_fits(browser: Any, demo_facts: ReportFacts, tmp_path: Path, width: int) -> None:
    write_report(replace(demo_facts, data=mixed_data()), tmp_path / "report.html")
    page, complaints, _ = opened(browser, (tmp_path / "report.html").as_uri(), width)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(CUT_OFF) == page.evaluate(COLLIDING) == complaints == []
    page.close()


def test_folding_works_without_script(browser: Any, address: str) -> None:
    page, _, _ = opened(browser, address, 1280)
    fold = page.locator("#configuration details").first
    assert not fold.locator("pre").is_visible()
    fold.locator("summary").click()
    assert fold.locator("pre").is_visible()
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_of_all_text(browser: Any, address: str, scheme: str) -> None:
    page, _, _ = opened(browser, address, 1280, scheme)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    ratio, where = page.evaluate(CONTRAST)
    assert ratio >= 4.5, where  # WCAG 2.2 AA for text
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(20, 24, 27)") == (scheme == "dark")
    page.close()


def test_print_is_light_and_unfolded(browser: Any, address: str) -> None:
    page, _, _ = opened(browser, address, 794, "dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--ink').trim()") == "#1b2127"
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.close()


def test_nothing_is_cut_off_on_paper(browser: Any, address: str) -> None:
    page, _, _ = opened(browser, address, PAPER)
    page.emulate_media(media="print")
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate(BEYOND, PAPER) == []
    page.close()


def test_hostile_sample_runs_nothing(browser: Any, address: str) -> None:
    page, _, requests = opened(browser, address, 1280)
    assert page.evaluate("document.scripts.length") == 0
    assert "<script>fetch(" in page.inner_text("#samples")
    assert not any("evil.example" in url for url in requests)
    page.close()
