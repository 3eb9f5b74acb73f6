"""Bars are as long as their values, bins as high as their counts, and what is not drawn is not there."""

from xml.etree import ElementTree

import pytest

from headrace.reporting.bars import Bar, BarChart, Histogram, bin_name, draw_bars, draw_histogram, filled_bins, power
from headrace.reporting.svg import NARROW, WIDE

WIDTHS = (WIDE, NARROW)


def rectangles(drawn: str) -> list[ElementTree.Element]:
    return [each for each in ElementTree.fromstring(drawn).iter() if each.tag == "rect"]


def words(drawn: str) -> list[str]:
    return [each.text or "" for each in ElementTree.fromstring(drawn).iter() if each.tag == "text"]


@pytest.mark.parametrize("width", WIDTHS)
def test_bars_are_as_long_as_their_values(width: int) -> None:
    bars = (Bar("train", 4e9, total=True), Bar("<b>web</b>", 3e9), Bar("code", 1e9), Bar("none", 0.0), Bar("dust", 1.0))
    drawn = str(draw_bars(BarChart("Tokens", "tokens", bars), width))
    lengths = [float(each.get("width", "")) for each in rectangles(drawn)]
    assert lengths[1] / lengths[0] == pytest.approx(0.75, abs=0.01)
    assert lengths[2] / lengths[0] == pytest.approx(0.25, abs=0.01)
    assert lengths[3:] == [0.0, 1.0]  # what is there is seen
    assert {"<b>web</b>", "3B", "train", "tokens"} <= set(words(drawn))
    edges = [float(each.get("x", "")) + float(each.get("width", "")) for each in rectangles(drawn)]
    assert max(edges) <= width


@pytest.mark.parametrize("width", WIDTHS)
def test_bins_are_as_high_as_their_counts(width: int) -> None:
    counts = (0, 0, 10, 40, 0, 20, 0, 0)
    drawn = str(draw_histogram(Histogram("Lengths", "tokens", "documents", counts, ((8.0, "row of 8"),)), width))
    bins = rectangles(drawn)
    heights = [float(each.get("height", "")) for each in bins]
    assert [height / heights[1] for height in heights] == pytest.approx([0.25, 1, 0, 0.5], abs=0.01)
    assert [each[0].text for each in bins] == ["4 to 7: 10", "8 to 15: 40", "16 to 31: 0", "32 to 63: 20"]
    assert {"4", "8", "16", "32", "64"} <= set(words(drawn))
    line = next(each for each in ElementTree.fromstring(drawn).iter() if each.get("class") == "limit")
    assert float(line.get("x1", "")) == pytest.approx(float(bins[1].get("x", "")) - 1, abs=0.11)  # where 8 begins


def test_a_mark_outside_of_the_plot_is_left_out() -> None:
    drawn = str(draw_histogram(Histogram("Lengths", "tokens", "documents", (1, 2), ((4096.0, "row of 4,096"),)), WIDE))
    assert "limit" not in drawn and "row of 4,096" not in words(drawn)


def test_counts_have_whole_ticks() -> None:
    drawn = words(str(draw_histogram(Histogram("Lengths", "tokens", "documents", (0, 2, 1)), WIDE)))
    assert "0" in drawn and "1" in drawn and "0.5" not in drawn


def test_powers_of_two_are_written_as_the_field_writes_them() -> None:
    assert [power(2.0**k) for k in (0, 9, 10, 12, 17, 20, 30)] == ["1", "512", "1K", "4K", "128K", "1M", "1G"]
    assert (bin_name(0), bin_name(1), bin_name(12)) == ("1", "2 to 3", "4,096 to 8,191")
    assert (filled_bins((0, 3, 0, 1, 0)), len(filled_bins((0, 0)))) == (range(1, 4), 0)
