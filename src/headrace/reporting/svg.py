"""A few words of SVG: elements, scales and ticks, enough for quiet charts that follow the page's colours.

Charts are drawn here instead of by a plotting library, because colours then come from CSS (dark mode, print), text
stays text of the page's font, no element needs an id, and each chart can be drawn twice, for a desk and for a phone.
Lengths are CSS pixels; the origin is the upper left corner.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from headrace.reporting.quantities import plain

WIDE, HALF, NARROW = 860, 410, 350
"""Widths of a chart: the page's column, half of it, and a phone. CSS shows one drawing of each chart."""

GLYPH = 6.7
"""Estimated mean width of a glyph at the charts' 12 px text."""


def element(tag: str, *children: str, **attributes: str | float | None) -> Markup:
    """One element; text children are escaped, `class_` becomes `class`, `text_anchor` becomes `text-anchor`."""
    names = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{_attribute(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    inner = "".join(escape(child) for child in children)
    return Markup(f"<{tag}{names}>{inner}</{tag}>" if inner else f"<{tag}{names}/>")  # noqa: S704  every part is escaped


def text(x: float, y: float, words: str, anchor: str = "start", class_: str | None = None) -> Markup:
    """A line of text with its baseline at y; anchor is start, middle or end."""
    return element("text", words, x=x, y=y, text_anchor=anchor if anchor != "start" else None, class_=class_)


def drawing(width: float, height: float, label: str, parts: Sequence[str]) -> Markup:
    """The root element: scales down, never up, and reads out `label`."""
    box = f"0 0 {_attribute(width)} {_attribute(height)}"
    return element("svg", *parts, viewBox=box, width=width, height=height, role="img", aria_label=label)


def path(points: Sequence[tuple[float, float]], class_: str) -> Markup:
    """A line through points; rounding to a tenth of a pixel keeps the page small."""
    steps = " ".join(f"{'M' if i == 0 else 'L'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(points))
    return element("path", d=steps, class_=class_)


@dataclass(frozen=True)
class Scale:
    """Maps [low, high] of the data onto [start, end] in pixels, linearly or by logarithm."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value, held inside the plot."""
        if self.logarithmic:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self, wanted: int) -> list[float]:
        """Round values inside the domain: 1-2-5 steps, or powers of ten with their 2 and 5 where there is room."""
        return (
            _log_ticks(self.low, self.high, wanted) if self.logarithmic else _linear_ticks(self.low, self.high, wanted)
        )


def fit(values: Sequence[float], start: float, end: float, *, zero: bool = False, pad: float = 0.04) -> Scale:
    """A linear scale around values with a little air; `zero` makes it begin at 0."""
    low, high = (min(0.0, *values) if zero else min(values)), max(values)
    span = (high - low) or abs(high) or 1.0
    return Scale(low if zero and low == 0 else low - pad * span, high + pad * span, start, end)


def fit_log(values: Sequence[float], start: float, end: float) -> Scale:
    """A logarithmic scale around positive values."""
    low, high = min(values), max(values)
    return Scale(low / 1.1, max(high, low * 1.5) * 1.1, start, end, logarithmic=True)


def axis_below(
    scale: Scale, y: float, ticks: Sequence[float], label: str, write: Callable[[float], str] = plain
) -> list[Markup]:
    """Tick labels below y and the axis title at the right end."""
    parts = [element("line", x1=scale.start, x2=scale.end, y1=y, y2=y, class_="axis")]
    for tick in ticks:
        x = scale(tick)
        anchor = "end" if x > scale.end - 14 else "middle"
        parts += [
            element("line", x1=x, x2=x, y1=y, y2=y + 4, class_="axis"),
            text(x, y + 18, write(tick), anchor, "tick"),
        ]
    return [*parts, text(scale.end, y + 35, label, "end", "axis-title")]


def label_width(words: str) -> float:
    """How wide a chart label will be, roughly."""
    return GLYPH * len(words)


def _linear_ticks(low: float, high: float, wanted: int) -> list[float]:
    """The finest 1-2-5 step that gives at most `wanted` + 1 ticks."""
    power = 10.0 ** math.floor(math.log10((high - low) / wanted))
    for step in (factor * power for factor in (0.5, 1, 2, 5, 10)):
        places = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
        if len(places) <= wanted + 1:
            break
    return [place * step for place in places]


def _log_ticks(low: float, high: float, wanted: int) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1,)):
        ticks = [factor * 10.0**power for power in powers for factor in factors]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) <= wanted + 2:
            return inside
    every = math.ceil(len(inside) / wanted)
    return inside[::every]


def _attribute(value: str | float) -> str:
    if isinstance(value, str):
        return str(escape(value))
    return f"{round(value, 1):g}"
