"""Bars: amounts side by side, and a histogram over powers of two."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from headrace.reporting.quantities import exact, tick
from headrace.reporting.svg import WIDE, Scale, axis_below, drawing, element, fit, label_width, text

_THIN = 9.0


@dataclass(frozen=True)
class Bar:
    """One amount; `total` for one that the bars after it are parts of."""

    label: str
    value: float
    total: bool = False


@dataclass(frozen=True)
class BarChart:
    """Bars over one axis that begins at 0."""

    label: str  # read aloud
    axis_title: str
    bars: tuple[Bar, ...]


def draw_bars(chart: BarChart, width: float) -> Markup:
    """The chart at one width; on a phone a bar's name stands above it."""
    wide = width >= WIDE
    left = 30 + max(label_width(bar.label) for bar in chart.bars) if wide else 5.0
    right = width - (14 + max(label_width(tick(bar.value)) for bar in chart.bars) if wide else 14)
    row, top = (26.0, 4.0) if wide else (40.0, 0.0)
    bottom = top + row * len(chart.bars) + 4
    scale = Scale(0.0, max(bar.value for bar in chart.bars) or 1.0, left, right)
    ticks = scale.ticks(8 if wide else 4)
    parts = [element("line", x1=scale(t), x2=scale(t), y1=top, y2=bottom, class_="grid") for t in ticks]
    for number, bar in enumerate(chart.bars):
        parts += _row(bar, scale, top + row * number, wide=wide, width=width)
    parts += axis_below(scale, bottom, ticks, chart.axis_title, tick)
    return drawing(width, bottom + 42, chart.label, parts)


def _row(bar: Bar, scale: Scale, top: float, *, wide: bool, width: float) -> list[Markup]:
    baseline = top + (18 if wide else 15)
    indent = 0 if bar.total else 14
    y = top + 13 - _THIN / 2 if wide else top + 22
    length = max(1.0, scale(bar.value) - scale.start) if bar.value else 0.0
    value = scale.start + length + 6 if wide else width
    return [
        text(indent, baseline, bar.label, class_="stage" if bar.total else "label"),
        element("rect", x=scale.start, y=y, width=length, height=_THIN, rx=1.5,
                class_="bar" if bar.total else "bar part"),
        text(value, baseline, tick(bar.value), "start" if wide else "end", "value"),
    ]  # fmt: skip


@dataclass(frozen=True)
class Histogram:
    """`counts[k]` things of 2^k to 2^(k+1) - 1; `marks`: values at which a vertical line stands, with their names."""

    label: str  # read aloud
    axis_title: str
    y_title: str
    counts: tuple[int, ...]  # one at least is not 0
    marks: tuple[tuple[float, str], ...] = ()
    height: float = 270


def draw_histogram(chart: Histogram, width: float) -> Markup:
    """The histogram at one width, from the first bin that holds something to the last."""
    bins = filled_bins(chart.counts)
    top, bottom = 30.0 + 16 * len(chart.marks), chart.height - 42
    values = fit([float(count) for count in chart.counts], bottom, top, zero=True)
    whole = [t for t in values.ticks(5) if t == int(t)]
    left = 12 + max(label_width(tick(t)) for t in whole)
    x = Scale(2.0**bins.start, 2.0**bins.stop, left, width - 8, logarithmic=True)
    parts = [text(0, 12, chart.y_title, class_="axis-title")]
    for t in whole:
        parts.append(element("line", x1=left, x2=x.end, y1=values(t), y2=values(t), class_="grid"))
        parts.append(text(left - 6, values(t) + 4, tick(t), "end", "tick"))
    parts += [_bin(k, chart.counts[k], x, values) for k in bins]
    every = -(-len(bins) // max(1, int((x.end - left) / 52)))
    edges = [2.0**k for k in range(bins.start, bins.stop + 1, every)]
    parts += axis_below(x, bottom, edges, chart.axis_title, power)
    for number, (value, name) in enumerate(sorted(chart.marks, reverse=True)):  # so that no line crosses a name
        parts += _mark(x, value, name, 28 + 16 * number, bottom)
    return drawing(width, chart.height, chart.label, parts)


def power(value: float) -> str:
    """A power of two as the field writes it: 512, 4K, 128K, 1M, where K is 1,024."""
    for unit, size in (("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
        if value >= size and value % size == 0:
            return f"{int(value) // size}{unit}"
    return exact(value)


def bin_name(k: int) -> str:
    """What bin k counts: 1, 2 to 3, 4 to 7, ..."""
    return "1" if k == 0 else f"{exact(2**k)} to {exact(2 ** (k + 1) - 1)}"


def filled_bins(counts: Sequence[int]) -> range:
    """From the first bin that holds something to the last."""
    filled = [k for k, count in enumerate(counts) if count]
    return range(filled[0], filled[-1] + 1) if filled else range(0)


def _bin(k: int, count: int, x: Scale, values: Scale) -> Markup:
    begin, end = x(2.0**k), x(2.0 ** (k + 1))
    height = max(1.0, values.start - values(count)) if count else 0.0  # what is there is seen
    name = element("title", f"{bin_name(k)}: {exact(count)}")
    return element("rect", name, x=begin + 1, y=values.start - height, width=end - begin - 2, height=height,
                   class_="bar")  # fmt: skip


def _mark(x: Scale, value: float, name: str, y: float, bottom: float) -> list[Markup]:
    """A line where the value lies within the plot, named at its left where there is room."""
    if not x.low < value < x.high:
        return []
    at = x(value)
    left = at - x.start > label_width(name)
    return [
        element("line", x1=at, x2=at, y1=y - 10, y2=bottom, class_="limit"),
        text(at + (-6 if left else 6), y, name, "end" if left else "start", "label"),
    ]
