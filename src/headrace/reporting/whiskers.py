"""Dot-and-whisker charts: a value with its 95 % interval per row, and reference marks to judge it by.

Marks differ by shape as well as by colour, so that the chart survives a black-and-white printer and any colour vision.
"""

from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup

from headrace.reporting.facts import Estimate
from headrace.reporting.quantities import fixed, interval, plain
from headrace.reporting.svg import WIDE, Scale, axis_below, drawing, element, fit, label_width, text

ROW = 34.0


@dataclass(frozen=True)
class Row:
    """One line of the chart: an estimate, reference marks by name, or both."""

    label: str
    estimate: Estimate | None
    marks: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class WhiskerChart:
    """Rows over one shared axis. `names` fixes the shape and colour of each kind of mark."""

    label: str  # read aloud
    axis_title: str
    rows: tuple[Row, ...]
    names: tuple[str, ...] = ()
    shapes: tuple[int, ...] = (0, 1, 2, 3, 4)
    model_name: str = "this model"
    domain: tuple[float, float] | None = None
    write: Callable[[float], str] = plain
    digits: int = 3


def draw_whiskers(chart: WhiskerChart, width: float) -> Markup:
    """The chart at one width; on a phone the row's name stands above its marks."""
    wide = width >= WIDE
    values_width = 150.0 if wide else 0.0
    left = 16 + max(label_width(row.label) for row in chart.rows) if wide else 8.0
    key, key_height = _key(chart, width)
    row_height = ROW if wide else ROW + 18
    top = key_height + 6
    bottom = top + row_height * len(chart.rows)
    scale = _scale(chart, left, width - values_width - 12)
    ticks = scale.ticks(8 if wide else 4)
    parts = [element("line", x1=scale(t), x2=scale(t), y1=top, y2=bottom, class_="grid") for t in ticks]
    parts += axis_below(scale, bottom, ticks, chart.axis_title, chart.write)
    for i, row in enumerate(chart.rows):
        y = top + row_height * i + row_height / 2 + (0 if wide else 12)
        baseline = y + 4 if wide else y - 18
        parts.append(text(0, baseline, row.label, class_="stage" if row.label == chart.model_name else "label"))
        parts += _row(chart, row, scale, y)
        parts.append(text(width, baseline, _value(row, chart.digits), "end", "value"))
    return drawing(width, bottom + 42, chart.label, [*parts, *key])


def _scale(chart: WhiskerChart, start: float, end: float) -> Scale:
    if chart.domain:
        return Scale(*chart.domain, start, end)
    values = [mark for row in chart.rows for _, mark in row.marks]
    for row in chart.rows:
        if row.estimate:
            values += [v for v in (row.estimate.value, row.estimate.low, row.estimate.high) if v is not None]
    return fit(values, start, end)


def _row(chart: WhiskerChart, row: Row, scale: Scale, y: float) -> list[Markup]:
    """Where a row has both, marks stand a little below the whisker, so that neither hides the other."""
    lane = 0.0 if row.estimate is None else 6.0 if row.marks else 0.0
    parts = [
        _mark(chart.shapes[chart.names.index(name)], scale(value), y + lane, f"{name}: {plain(value, 4)}")
        for name, value in row.marks
    ]
    if row.estimate is None:
        return parts
    y -= lane
    if row.estimate.low is not None and row.estimate.high is not None:
        low, high = scale(row.estimate.low), scale(row.estimate.high)
        parts.append(
            element("path", d=f"M{low:.1f} {y}H{high:.1f}M{low:.1f} {y - 5}v10M{high:.1f} {y - 5}v10", class_="whisker")
        )
    parts.append(element("circle", cx=scale(row.estimate.value), cy=y, r=5, class_="dot tone1"))
    return parts


def _value(row: Row, digits: int) -> str:
    if row.estimate is None:
        return fixed(row.marks[0][1], digits)
    return f"{fixed(row.estimate.value, digits)} {interval(row.estimate.low, row.estimate.high, digits)}".strip()


_SHAPES = (
    "M{x} {t}L{r} {y}L{x} {b}L{l} {y}Z",  # diamond
    "M{x} {t}L{r} {b}L{l} {b}Z",  # triangle
    "M{l} {t}L{r} {b}M{r} {t}L{l} {b}",  # cross
    "M{l} {t}H{r}V{b}H{l}Z",  # square
    "M{x} {t}V{b}",  # bar
)


def _mark(index: int, x: float, y: float, title: str | None = None) -> Markup:
    shape = _SHAPES[index]
    reach = (4.8, 4.8, 4.4, 3.9, 6.0)[index]
    numbers = {"x": x, "y": y, "t": y - reach, "b": y + reach, "l": x - reach, "r": x + reach}
    d = shape.format(**{name: f"{value:.1f}" for name, value in numbers.items()})
    children = [element("title", title)] if title else []
    return element("path", *children, d=d, class_=f"mark mark{index + 1}")


def _key(chart: WhiskerChart, width: float) -> tuple[list[Markup], float]:
    """What dot and marks mean, above the plot; nothing where the rows say it themselves."""
    if not chart.names or all(row.estimate is None or not row.marks for row in chart.rows):
        return [], 0.0
    parts: list[Markup] = []
    x, y = 6.0, 14.0
    for index, name in enumerate((f"{chart.model_name}, 95 % interval", *chart.names)):
        length = label_width(name) + 16
        if x > 6 and x + length > width:
            x, y = 6.0, y + 20
        shape = (
            element("circle", cx=x, cy=y - 4, r=5, class_="dot tone1")
            if index == 0
            else _mark(chart.shapes[index - 1], x, y - 4)
        )
        parts += [shape, text(x + 12, y, name, class_="label")]
        x += length + 16
    return parts, y + 10
