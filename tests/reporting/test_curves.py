"""Smoothing against brute force, thinning keeps every spike, broken values are left out."""

import itertools
import math
import random
import re

from headrace.reporting.curves import Line, LineChart, draw_lines, finite, smooth, thin
from headrace.reporting.svg import NARROW, WIDE


def noisy_points(count: int) -> list[tuple[float, float]]:
    noise = random.Random(3)
    return [(float(i), noise.gauss(5, 1)) for i in range(count)]


def test_smooth_is_the_centred_mean() -> None:
    points = noisy_points(50)
    for i, (x, y) in enumerate(smooth(points, 7)):
        near = [points[j][1] for j in range(50) if abs(j - i) <= 3]
        assert x == points[i][0]
        assert math.isclose(y, sum(near) / len(near))


def test_thin_keeps_first_last_and_the_spike() -> None:
    points = noisy_points(10_000)
    points[7321] = (7321.0, 99.0)
    kept = thin(points, 100)
    assert len(kept) <= 400
    assert kept[0] == points[0] and kept[-1] == points[-1]
    assert (7321.0, 99.0) in kept
    assert kept == sorted(kept)


def test_values_that_are_not_finite_are_not_drawn() -> None:
    points = [(0.0, 1.0), (1.0, math.nan), (2.0, math.inf), (3.0, 2.0)]
    assert finite(points) == [(0.0, 1.0), (3.0, 2.0)]
    chart = LineChart("c", "y", (Line("a", tuple(points), 1),))
    assert "nan" not in str(draw_lines(chart, WIDE)) and "inf" not in str(draw_lines(chart, WIDE))


def test_direct_labels_never_overlap() -> None:
    lines = tuple(Line(f"series {i}", ((0.0, 5.0), (10.0, 1.0 + 0.001 * i)), 1 + i % 4) for i in range(4))
    drawn = str(draw_lines(LineChart("c", "y", lines), WIDE))
    heights = sorted(float(y) for y in re.findall(r'y="([\d.]+)" class="ink', drawn))
    assert len(heights) == 4
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 15.9
    assert heights[-1] <= 300 - 42


def test_one_point_and_a_constant_are_drawn() -> None:
    for points in (((5.0, 2.0),), ((0.0, 3.0), (9.0, 3.0))):
        for width in (WIDE, NARROW):
            assert "<path" in str(draw_lines(LineChart("c", "y", (Line("a", points, 1),), zero=True), width))
