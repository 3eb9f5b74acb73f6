"""Dots, whiskers and marks lie where the numbers say."""

import re

import pytest

from headrace.reporting.facts import Estimate
from headrace.reporting.svg import NARROW, WIDE
from headrace.reporting.whiskers import Row, WhiskerChart, draw_whiskers


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_whisker_ends_are_in_proportion(width: int) -> None:
    chart = WhiskerChart("c", "x", (Row("a", Estimate(0.5, 0.25, 1.0)),), domain=(0.0, 1.0))
    drawn = str(draw_whiskers(chart, width))
    low, high = (float(x) for x in re.search(r'd="M([\d.]+) [\d.]+H([\d.]+)', drawn).groups())  # type: ignore[union-attr]
    centre = float(re.search(r'<circle cx="([\d.]+)"', drawn).group(1))  # type: ignore[union-attr]
    assert (centre - low) / (high - low) == pytest.approx((0.5 - 0.25) / 0.75, abs=2e-3)


def test_no_interval_no_whisker() -> None:
    drawn = str(draw_whiskers(WhiskerChart("c", "x", (Row("a", Estimate(0.5)), Row("b", Estimate(0.7)))), WIDE))
    assert drawn.count("<circle") == 2 and "whisker" not in drawn


def test_marks_are_named_and_differ_in_shape() -> None:
    row = Row("a", Estimate(2.0, 1.9, 2.1), (("bigram", 2.5), ("xz -9", 1.5)))
    drawn = str(draw_whiskers(WhiskerChart("c", "x", (row,), ("bigram", "xz -9")), WIDE))
    assert "<title>bigram: 2.5</title>" in drawn and "<title>xz -9: 1.5</title>" in drawn
    assert 'class="mark mark1"' in drawn and 'class="mark mark2"' in drawn
