"""Drawn timelines: well-formed, complete, to scale, told apart by colour, and legible in a browser."""

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from headrace.errors import UserError
from headrace.pipeline.generators import generate
from headrace.pipeline.simulate import Costs, simulate
from headrace.pipeline.timeline import COMMUNICATION, Span
from headrace.pipeline.timeline_svg import Panel, svg

CHROMIUM = next((path for path in ("/usr/bin/chromium", shutil.which("chromium"), shutil.which("chromium-browser"),
                                   shutil.which("google-chrome")) if path and Path(path).exists()), None)  # fmt: skip
SVG = "{http://www.w3.org/2000/svg}"
MEASURED = [
    Span(0, 5.0, 5.1, "0F0"),
    Span(1, 5.1, 5.2, "1F0"),
    Span(0, 5.02, 5.08, 'a <dispatch> & "combine\'"', COMMUNICATION),
]

WRONG_TEXT = """() => {
  const boxes = [...document.querySelectorAll('text')].map(t => [t.getBoundingClientRect(), t.textContent]);
  const frame = document.querySelector('svg').getBoundingClientRect();
  const cut = boxes.filter(([b]) => b.left < frame.left || b.right > frame.right || b.bottom > frame.bottom);
  const met = boxes.flatMap(([a, one], i) => boxes.slice(i + 1).filter(([b]) => a.left < b.right - 1
    && b.left < a.right - 1 && a.top < b.bottom - 4 && b.top < a.bottom - 4).map(([_, two]) => one + ' / ' + two));
  return [...cut.map(([_, words]) => words), ...met];
}"""


def planned(name: str, ranks: int, microbatches: int) -> Panel:
    return Panel(name, simulate(generate(name, ranks, microbatches), Costs()).spans)


def groups(text: str) -> list[tuple[str, list[ElementTree.Element]]]:
    """(title, rectangles) of each drawn span."""
    found = ElementTree.fromstring(text).findall(f"{SVG}g")
    return [(group.findtext(f"{SVG}title", ""), group.findall(f"{SVG}rect")) for group in found]


def classes(text: str) -> dict[str, list[str]]:
    return {title: [rect.attrib["class"] for rect in rects] for title, rects in groups(text)}


@pytest.mark.parametrize("name", ["1f1b", "zb1p", "zb_v", "dualpipe", "dualpipe_v"])
def test_every_span_is_drawn_once(name: str) -> None:
    panel = planned(name, 4, 8)
    assert Counter(title for title, _ in groups(svg([panel]))) == Counter(span.action for span in panel.spans)


def test_kinds_differ_in_colour_and_a_pair_shows_both() -> None:
    found = classes(svg([planned("dualpipe", 4, 8)]))
    assert [found[action] for action in ("0F0", "3B6", "0I2", "0W2")] == [["F"], ["B pale"], ["I"], ["W"]]
    assert found["(0F3;3B5)OVERLAP_F_B"] == ["F", "B pale"]
    style = svg([planned("dualpipe", 4, 8)]).split("<style>")[1].split("@media")[0]
    fills = [style.split(f".{kind}{{fill:")[1][:7] for kind in ("F", "B", "I", "W", "other")]
    assert len(set(fills)) == 5


def test_directions_are_told_apart_where_there_are_two() -> None:
    mirrored = classes(svg([planned("dualpipe", 4, 8)]))
    assert {t: c for t, c in mirrored.items() if t in ("0F3", "2F0", "0F4", "2F4")} == {
        "2F0": ["F"], "0F4": ["F pale"], "2F4": ["F pale"]}  # fmt: skip
    folded = classes(svg([planned("zb_v", 4, 8)]))
    assert all((c == [f"{t[1]} pale"]) == (int(t[0]) >= 4) for t, c in folded.items())
    assert not any("pale" in c[0] for c in classes(svg([planned("1f1b", 4, 8)])).values())
    assert "entered at the other end" in svg([planned("dualpipe", 4, 8)])
    assert "second stage" in svg([planned("zb_v", 4, 8)])
    assert "<text" in svg([planned("1f1b", 4, 8)]) and "pale:" not in svg([planned("1f1b", 4, 8)])


def test_panels_share_one_scale_and_start_at_zero() -> None:
    plan = Panel("planned", [Span(0, 0, 0.1, "0F0"), Span(1, 0.1, 0.2, "1F0")])
    long = Panel("measured", [*MEASURED, Span(0, 5.2, 5.4, "0B0")])
    rects = [rects[0] for _, rects in groups(svg([plan, long], "ms", 1000))]
    widths = [float(rect.attrib["width"]) for rect in rects]
    assert widths[0] == pytest.approx(widths[1], abs=0.02)
    blocks = {title: rects[0] for title, rects in groups(svg([long], "ms", 1000))}
    assert float(blocks["0B0"].attrib["width"]) == pytest.approx(2 * float(blocks["0F0"].attrib["width"]), abs=0.7)
    assert rects[0].attrib["x"] == rects[2].attrib["x"]


def test_idle_shares_unit_and_titles_are_written() -> None:
    words = [text.text for text in ElementTree.fromstring(svg([planned("dualpipe", 4, 8)])).iter(f"{SVG}text")]
    assert words.count("7.7 %") == 4
    assert "dualpipe · 26 F" in words
    assert {"rank 0", "rank 3", "idle", "20", "25 F"} <= set(words)


def test_numbers_are_dropped_where_they_do_not_fit() -> None:
    wide, narrow = ({t.attrib.get("class", "") for t in ElementTree.fromstring(svg([panel])).iter(f"{SVG}text")}
                    for panel in (planned("dualpipe", 4, 8), planned("dualpipe", 16, 120)))  # fmt: skip
    assert any(name.startswith("number") for name in wide)
    assert not any(name.startswith("number") for name in narrow)


def test_names_are_escaped_and_the_text_is_always_the_same() -> None:
    panel = Panel('<b> & "so"', MEASURED)
    drawn = svg([panel], "ms", 1000)
    assert MEASURED[2].action in [title for title, _ in groups(drawn)]
    assert ElementTree.fromstring(drawn).attrib["aria-label"] == '<b> & "so"'
    assert drawn == svg([Panel(panel.title, list(reversed(MEASURED)))], "ms", 1000)


def test_nothing_to_draw_is_said() -> None:
    with pytest.raises(UserError, match="needs spans that take time"):
        svg([Panel("measured", [])])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        )
        yield started
        started.close()


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: timelines are not opened in a browser")
@pytest.mark.parametrize("width", [350, 860, 1140])
@pytest.mark.parametrize(("name", "ranks", "microbatches"), [("dualpipe", 4, 8), ("zb_v", 8, 20), ("dualpipe", 16, 40)])
def test_no_text_is_cut_or_covers_another(
    browser: Any, tmp_path: Path, width: int, name: str, ranks: int, microbatches: int
) -> None:
    path = tmp_path / "timeline.svg"
    path.write_text(svg([planned(name, ranks, microbatches), Panel("measured", MEASURED)], width=width))
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.goto(path.as_uri())
    assert page.evaluate(WRONG_TEXT) == []
    page.close()
