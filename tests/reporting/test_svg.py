"""Elements are escaped, ticks are round and inside, scales are monotone."""

import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.reporting.svg import Scale, drawing, element, fit, fit_log, text


def test_hostile_words_stay_text() -> None:
    words = "<script>\"&'"
    picture = ElementTree.fromstring(str(drawing(10, 10, words, [text(0, 0, words)])))
    assert picture.get("aria-label") == words
    assert picture[0].text == words


def test_attribute_names() -> None:
    assert (
        str(element("text", "a", class_="b", text_anchor="end", x=1.26, y=None))
        == '<text class="b" text-anchor="end" x="1.3">a</text>'
    )


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 9))
def test_linear_ticks_are_round_multiples_inside(low: float, span: float, wanted: int) -> None:
    ticks = Scale(low, low + span, 0, 100).ticks(wanted)
    assert 1 <= len(ticks) <= wanted + 1
    assert all(low - 1e-6 * span <= tick <= low + span * (1 + 1e-6) for tick in ticks)
    if len(ticks) > 1:
        step = ticks[1] - ticks[0]
        mantissa = step / 10 ** math.floor(math.log10(step * 1.0001))
        assert min(abs(mantissa - good) for good in (1, 2, 5)) < 0.01


@given(st.floats(1e-6, 1e3), st.floats(2, 1e6))
def test_log_scale_keeps_equal_ratios_equal(low: float, ratio: float) -> None:
    scale = fit_log([low, low * ratio], 0, 100)
    middle = low * math.sqrt(ratio)
    assert scale(middle) - scale(low) == pytest.approx(scale(low * ratio) - scale(middle), abs=1e-6)
    assert all(scale.low <= tick <= scale.high for tick in scale.ticks(5))


def test_fit_survives_a_constant_series() -> None:
    scale = fit([0.0, 0.0], 100, 0)
    assert math.isfinite(scale(0.0))
    assert fit([3.0, 5.0], 0, 10, zero=True).low == 0.0
