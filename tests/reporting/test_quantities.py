"""Numbers in words, against values worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.reporting import quantities as q


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (q.short(950), "950"),
        (q.short(999_960), "1.00M"),
        (q.short(7_712_064), "7.71M"),
        (q.short(671_026_404_352), "671B"),
        (q.tick(1_500_000), "1.5M"),
        (q.tick(10_000), "10k"),
        (q.size(812), "812 bytes"),
        (q.size(15_482_336), "15.5 MB"),
        (q.plain(0.000312), "0.000312"),
        (q.plain(-2.5), "\N{MINUS SIGN}2.5"),
        (q.plain(3.2e-7), "3.2e\N{MINUS SIGN}7"),
        (q.plain(187.4), "187"),
        (q.percent(0.413), "41.3 %"),
        (q.duration(0.84), "0.8 s"),
        (q.duration(59.96), "1 min 00 s"),
        (q.duration(291.0), "4 min 51 s"),
        (q.duration(7500), "2 h 05 min"),
        (q.duration(200_000), "2 d 07 h"),
        (q.interval(2.0564, 2.1551), "[2.056, 2.155]"),
        (q.interval(None, 2.0), ""),
    ],
)
def test_words(written: str, expected: str) -> None:
    assert written == expected


@given(st.floats(min_value=1.0, max_value=9e14))
def test_short_is_within_half_a_percent_of_the_number(number: float) -> None:
    text = q.short(number)
    scale = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1], 1.0)
    assert float(text.rstrip("kMBT")) * scale == pytest.approx(number, rel=5.1e-3)
