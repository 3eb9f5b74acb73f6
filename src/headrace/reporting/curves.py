"""Line charts over tokens: losses, schedules, throughput, gradient norm.

Noisy series are drawn twice, faint as logged and strong as a running mean, so that neither noise nor trend is hidden.
Long runs are thinned to the first, last, smallest and largest value of each few pixels: every spike stays visible.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from headrace.reporting import quantities
from headrace.reporting.quantities import plain
from headrace.reporting.svg import WIDE, Scale, axis_below, drawing, element, fit, fit_log, label_width, path, text

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """One series; `tone` 1..5 picks the page's colour (5 is grey), `noisy` adds the running mean."""

    label: str  # empty: not named
    points: Points
    tone: int
    noisy: bool = False
    dots: bool = False  # few measurements: mark each
    step: bool = False  # the value holds until the next point
    faint: bool = False  # one of several behind what they come to
    band: Sequence[tuple[float, float, float]] = ()  # (x, low, high), shaded


@dataclass(frozen=True)
class LineChart:
    """What is drawn; sizes come later, since every chart is drawn twice."""

    label: str  # read aloud
    y_title: str
    lines: tuple[Line, ...]
    logarithmic: bool | None = False  # None: by logarithm where values span more than a factor of 20
    zero: bool = False
    height: float = 300
    half: bool = False  # one of a pair on a desk
    write_y: Callable[[float], str] = plain
    marks: tuple[float, ...] = ()  # tokens at which a vertical line stands


def finite(points: Points) -> list[tuple[float, float]]:
    """The points that can be drawn; the caption says how many could not."""
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def smooth(points: Points, window: int) -> list[tuple[float, float]]:
    """Running mean over `window` points, centred; at the ends over what there is."""
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    half = window // 2
    result = []
    for i, (x, _) in enumerate(points):
        low, high = max(0, i - half), min(len(points), i + half + 1)
        result.append((x, (sums[high] - sums[low]) / (high - low)))
    return result


def thin(points: Points, buckets: int) -> list[tuple[float, float]]:
    """At most 4 points per bucket: first, smallest, largest, last."""
    if len(points) <= 4 * buckets:
        return list(points)
    kept: list[tuple[float, float]] = []
    for i in range(buckets):
        part = range(i * len(points) // buckets, (i + 1) * len(points) // buckets)
        extremes = {part[0], part[-1], min(part, key=lambda j: points[j][1]), max(part, key=lambda j: points[j][1])}
        kept += [points[j] for j in sorted(extremes)]
    return kept


def draw_lines(chart: LineChart, width: float) -> Markup:
    """The chart at one width; direct labels at the right where there is room, a key above on a phone."""
    return drawing(width, chart.height, chart.label, line_parts(chart, width))


def line_parts(chart: LineChart, width: float) -> list[Markup]:
    """What `draw_lines` draws, to be put into a larger drawing."""
    lines = [Line(**{**line.__dict__, "points": finite(line.points)}) for line in chart.lines]
    lines = [line for line in lines if line.points]
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + [y for line in lines for edge in line.band for y in edge[1:]]
    wide = width >= WIDE
    logarithmic = _wants_logarithm(ys) if chart.logarithmic is None else chart.logarithmic
    named = [line for line in lines if line.label]
    direct = wide and len(named) > 1
    right = width - (max(label_width(line.label) for line in named) + 18 if direct else 8)
    key = [] if direct or len(named) < 2 else _key(named, right)
    top, bottom = 30.0 + (18.0 * len({y for _, y, _, _ in key})), chart.height - 42
    left = 12 + max(label_width(chart.write_y(tick)) for tick in _y_scale(ys, chart, logarithmic, bottom, top).ticks(5))
    y_scale = _y_scale(ys, chart, logarithmic, bottom, top)
    x_scale = Scale(min(0.0, *xs), max(xs) or 1.0, left, right)
    parts = _grid(y_scale, chart, left, right)
    parts += axis_below(x_scale, bottom, x_scale.ticks(8 if wide else 4), "training tokens", quantities.tick)
    for mark in chart.marks:
        parts.append(element("line", x1=x_scale(mark), x2=x_scale(mark), y1=top, y2=bottom, class_="implied"))
    for line in lines:
        parts += _series(line, x_scale, y_scale)
    if direct:
        parts += _direct_labels(named, x_scale, y_scale, top, bottom)
    for x, y, line, _ in key:
        parts.append(element("path", d=f"M{x} {y - 4}h14", class_=f"line tone{line.tone}"))
        parts.append(text(x + 19, y, line.label, class_=f"ink{line.tone}"))
    return parts


def _wants_logarithm(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) > 20


def _y_scale(values: Sequence[float], chart: LineChart, logarithmic: bool, bottom: float, top: float) -> Scale:
    return fit_log(values, bottom, top) if logarithmic else fit(values, bottom, top, zero=chart.zero)


def _grid(y_scale: Scale, chart: LineChart, left: float, right: float) -> list[Markup]:
    parts = [text(0, 12, chart.y_title, class_="axis-title")]
    for tick in y_scale.ticks(5):
        y = y_scale(tick)
        parts.append(element("line", x1=left, x2=right, y1=y, y2=y, class_="grid"))
        parts.append(text(left - 6, y + 4, chart.write_y(tick), "end", "tick"))
    return parts


def _series(line: Line, x_scale: Scale, y_scale: Scale) -> list[Markup]:
    def pixels(points: Points) -> list[tuple[float, float]]:
        return [(x_scale(x), y_scale(y)) for x, y in thin(points, 110)]

    points = line.points
    tone = f"tone{line.tone}"
    parts = [_shade(line, x_scale, y_scale)] if line.band else []
    parts += [path(pixels(points), f"line faint {tone}")] if is_smoothed(line) else []
    parts.append(path(pixels(_trend(line)), f"line faint {tone}" if line.faint else f"line {tone}"))
    if line.dots or len(points) == 1:
        parts += [element("circle", cx=x, cy=y, r=2.6, class_=f"dot {tone}") for x, y in pixels(points)]
    return parts


def _shade(line: Line, x_scale: Scale, y_scale: Scale) -> Markup:
    every = max(1, len(line.band) // 220)
    kept = [*line.band[:-1:every], line.band[-1]]
    lows = [(x_scale(x), y_scale(low)) for x, low, _ in kept]
    highs = [(x_scale(x), y_scale(high)) for x, _, high in reversed(kept)]
    return path(lows + highs, f"band tone{line.tone}")


def is_smoothed(line: Line) -> bool:
    """Whether a running mean is drawn over the faint line."""
    return line.noisy and len(line.points) >= 40


def _trend(line: Line) -> Points:
    """What the strong line shows."""
    if line.step:
        return _staircase(line.points)
    return smooth(line.points, max(3, len(line.points) // 40)) if is_smoothed(line) else line.points


def _staircase(points: Points) -> list[tuple[float, float]]:
    result = list(points[:1])
    for (_, before), (x, y) in itertools.pairwise(points):
        if y != before:
            result.append((x, before))
        result.append((x, y))
    return result


def _direct_labels(lines: Sequence[Line], x_scale: Scale, y_scale: Scale, top: float, bottom: float) -> list[Markup]:
    """Names beside the ends of their lines, pushed apart so that none covers another."""
    wanted = sorted(((y_scale(_trend(line)[-1][1]), line) for line in lines), key=lambda pair: pair[0])
    places: list[float] = []
    for y, _ in wanted:
        places.append(max(y, places[-1] + 16 if places else top))
    overflow = max(0.0, places[-1] - bottom + 4)
    for i in reversed(range(len(places))):
        limit = places[i + 1] - 16 if i + 1 < len(places) else bottom - 4
        places[i] = min(places[i], limit) if overflow else places[i]
    return [
        text(x_scale(line.points[-1][0]) + 9, place + 4, line.label, class_=f"ink{line.tone}")
        for place, (_, line) in zip(places, wanted, strict=True)
    ]


def _key(lines: Sequence[Line], right: float) -> list[tuple[float, float, Line, float]]:
    """Places of the key's entries above the plot, wrapped at the right edge."""
    entries, x, y = [], 0.0, 32.0
    for line in lines:
        length = label_width(line.label) + 19
        if x and x + length > right:
            x, y = 0.0, y + 18
        entries.append((x, y, line, length))
        x += length + 14
    return entries
