"""Timelines as a drawing: ranks as rows, time to the right, what each rank does in colour, its idle share at the end.

Forward and backward are one colour each, an overlapped pair is split between the two. Where a rank serves two stages
of a model (both directions of DualPipe, both legs of a V), one is drawn strong and the other pale: strong is the
microbatch that enters where microbatch 0 does, at its first stage on that rank. The idle gaps show the row's ground.

The drawing carries its own colours (those of the report, light and dark), so it can stand alone or inside a page. Text
is dark on tinted blocks in both, numbers are left out where they do not fit, and hovering names each block. The same
spans give the same text, byte for byte. Lengths are CSS pixels.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from headrace.errors import UserError
from headrace.pipeline.schedule import Action, Kind
from headrace.pipeline.timeline import COMPUTE, Span, idle_shares, tracks, window

_KINDS = {
    Kind.F: "forward",
    Kind.B: "backward",
    Kind.I: "input gradient",
    Kind.W: "weight gradient",
}
_LEFT, _RIGHT, _STRIP, _GLYPH = 58, 48, 5, 6.0

_LIGHT = {"page": "#fcfcfa", "surface": "#eaebe6", "ink": "#1b2127", "soft": "#55606a", "grid": "#dcdfdd",
          "F": "#1b5e9e", "B": "#b0480a", "I": "#81418c", "W": "#12735a"}  # fmt: skip
_DARK = {"page": "#14181b", "surface": "#1f262a", "ink": "#e3e7e9", "soft": "#9ca7af", "grid": "#333b41",
         "F": "#74b4f0", "B": "#f0995c", "I": "#cf9cda", "W": "#5cc6a2"}  # fmt: skip
_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "Liberation Sans", sans-serif'


@dataclass(frozen=True)
class Panel:
    """One timeline under a title. Its first span begins at 0 of the axis; spans and axis differ by `svg`'s scale."""

    title: str
    spans: Sequence[Span]


def svg(panels: Sequence[Panel], unit: str = "F", scale: float = 1.0, width: float = 860) -> str:
    """Panels below each other on one axis of time, so that equal lengths are equal times.

    `scale` turns the spans' times into `unit`: 1000 for milliseconds from seconds. Raises `UserError` without spans.
    """
    longest = max((end - start for start, end in (window(panel.spans) for panel in panels)), default=0.0)
    if longest <= 0:
        raise UserError("a timeline needs spans that take time; none was recorded")
    pixels = (width - _LEFT - _RIGHT) / longest
    ticks = _ticks(longest * scale, int((width - _LEFT - _RIGHT) / 70))
    places = [(_LEFT + tick / scale * pixels, f"{tick:g}{f' {unit}' if tick == ticks[-1] else ''}") for tick in ticks]
    parts, y = _legend(panels, width)
    for panel in panels:
        drawn, bottom = _panel(panel, y, pixels, [x for x, _ in places], unit, scale, width - _RIGHT + 6)
        parts, y = parts + drawn, bottom + 10
    parts += [_text(x, y + 8, words, "tick", "middle") for x, words in places]
    height, label = y + 18, "; ".join(panel.title for panel in panels if panel.title) or "timeline"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="timeline" viewBox="0 0 {_n(width)} {_n(height)}" '
        f'width="{_n(width)}" height="{_n(height)}" role="img" aria-label="{escape(label)}">\n'
        f'<style>{_style()}</style>\n<rect class="page" width="{_n(width)}" height="{_n(height)}"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _style() -> str:
    def colours(tones: dict[str, str], strong: float, pale: float) -> str:
        kinds = "".join(f".timeline .{kind}{{fill:{tones[kind]};fill-opacity:{strong}}}" for kind in _KINDS)
        return (
            f".timeline .page{{fill:{tones['page']}}}.timeline .row{{fill:{tones['surface']}}}"
            f".timeline text{{fill:{tones['ink']}}}.timeline .tick{{fill:{tones['soft']}}}"
            f".timeline .grid{{stroke:{tones['grid']}}}.timeline .other{{fill:{tones['soft']};fill-opacity:{strong}}}"
            f"{kinds}.timeline .pale{{fill-opacity:{pale}}}"
        )

    fonts = f".timeline text{{font:12px {_FONT};font-variant-numeric:tabular-nums}}"
    sizes = ".timeline .number{font-size:10.5px}.timeline .small{font-size:9px}.timeline .title{font-weight:650}"
    dark = f"@media screen and (prefers-color-scheme:dark){{{colours(_DARK, 0.55, 0.26)}}}"
    return fonts + sizes + colours(_LIGHT, 0.62, 0.27) + dark


def _panel(
    panel: Panel, y: float, pixels: float, grid: Iterable[float], unit: str, scale: float, idle_x: float
) -> tuple[list[str], float]:
    """One timeline from y downwards, and where it ends."""
    start, end = window(panel.spans)
    idle, pale = idle_shares(panel.spans), _pale(panel.spans)
    height = 26 if len(idle) <= 8 else 18
    title = f"{panel.title}{' · ' if panel.title else ''}{(end - start) * scale:.4g} {unit}"
    right = _LEFT + (end - start) * pixels
    parts = [_text(_LEFT, y + 12, title, "title"), _text(idle_x, y + 12, "idle", "tick")]
    top = y = y + 22
    for rank, share in idle.items():
        own = [span for span in panel.spans if span.rank == rank]
        strips = tracks(span for span in own if span.lane != COMPUTE)
        parts.append(f'<rect class="row" x="{_LEFT}" y="{_n(y)}" width="{_n(right - _LEFT)}" height="{height}"/>')
        parts.append(_text(_LEFT - 8, y + height / 2 + 4, f"rank {rank}", "tick", "end"))
        parts.append(_text(idle_x, y + height / 2 + 4, _percent(share)))
        for span in sorted((span for span in own if span.lane == COMPUTE), key=lambda span: span.start):
            parts.append(_block(span, _LEFT + (span.start - start) * pixels, y, pixels, height, pale))
        y += height
        for line in strips:
            for span in line:
                x = _LEFT + (span.start - start) * pixels
                parts.append(_group(span, [_rect("other", x, y + 1, (span.end - span.start) * pixels, _STRIP - 1)]))
            y += _STRIP
        y += 3
    lines = [f'<path class="grid" d="M{_n(x)} {_n(top - 4)}V{_n(y)}"/>' for x in grid if x <= right + 0.5]
    return parts[:2] + lines + parts[2:], y


def _block(span: Span, x: float, y: float, pixels: float, height: float, pale: "_Pale") -> str:
    """One action: a block, or two halves for a pair, each with its microbatch where that fits."""
    width = (span.end - span.start) * pixels
    drawn = []
    parts = _computations(span.action)
    for index, part in enumerate(parts):
        share = height / len(parts)
        tint = " pale" if (span.rank, part.stage, part.microbatch) in pale else ""
        drawn.append(_rect(f"{part.kind}{tint}", x, y + index * share, width, share))
        number = str(part.microbatch)
        if width >= _GLYPH * len(number) + 3 and share >= 11:
            size = "number" if len(parts) == 1 and width >= 18 else "number small"
            drawn.append(_text(x + width / 2, y + (index + 0.5) * share + 3.5, number, size, "middle"))
    return _group(span, drawn or [_rect("other", x, y, width, height)])


def _group(span: Span, drawn: Iterable[str]) -> str:
    return f"<g><title>{escape(span.action)}</title>{''.join(drawn)}</g>"


def _computations(action: str) -> tuple[Action, ...]:
    """The F, B, I and W in a span's name; none where it names something else, a reduction or a collective."""
    try:
        return Action.parse(action).computations
    except UserError:
        return ()


_Pale = dict[tuple[int, int, int | None], str]


def _pale(spans: Iterable[Span]) -> _Pale:
    """What is drawn pale, by (rank, stage, microbatch), and why, in the legend's words."""
    visits: dict[int, dict[int, int]] = {}  # stage -> rank, by microbatch
    for span in spans:
        for part in _computations(span.action) if span.lane == COMPUTE else ():
            assert part.microbatch is not None
            visits.setdefault(part.microbatch, {})[part.stage] = span.rank
    entries = {microbatch: ranks[min(ranks)] for microbatch, ranks in visits.items()}
    pale: _Pale = {}
    for microbatch, ranks in visits.items():
        for stage, rank in ranks.items():
            if entries[microbatch] != entries[min(entries)]:
                pale[rank, stage, microbatch] = "pale: entered at the other end"
            elif any(ranks[before] == rank for before in ranks if before < stage):
                pale[rank, stage, microbatch] = "pale: a rank's second stage"
    return pale


def _legend(panels: Sequence[Panel], width: float) -> tuple[list[str], float]:
    """A swatch for each kind that occurs, wrapped at the right edge, and where the legend ends."""
    actions = {span.action for panel in panels for span in panel.spans if span.lane == COMPUTE}
    found = [_computations(action) for action in sorted(actions)]
    kinds = {part.kind for parts in found for part in parts}
    entries = [([kind.value], words) for kind, words in _KINDS.items() if kind in kinds]
    if any(len(parts) > 1 for parts in found):
        entries.append((["F", "B"], "both, overlapped"))
    reasons = {words for panel in panels for words in _pale(panel.spans).values()}
    entries += [(["other pale"], words) for words in sorted(reasons)]
    if any(span.lane != COMPUTE for panel in panels for span in panel.spans):
        entries.append((["other"], "collective, from start to wait"))
    parts, x, y = [], float(_LEFT), 4.0
    for classes, words in entries:
        length = 20 + 6.4 * len(words)
        if x > _LEFT and x + length > width:
            x, y = float(_LEFT), y + 20
        share = 12 / len(classes)
        parts += [_rect(name, x, y + i * share, 14.6, share) for i, name in enumerate(classes)]
        parts.append(_text(x + 20, y + 10, words))
        x += length + 16
    return parts, y + 26


def _ticks(end: float, wanted: int) -> list[float]:
    """From 0 to the end in the finest 1-2-5 step that gives at most `wanted` of them."""
    power = 10.0 ** math.floor(math.log10(end / wanted))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if end / (factor * power) <= wanted)
    return [step * i for i in range(math.floor(end / step + 1e-9) + 1)]


def _percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %") if 0.0005 <= share < 0.0995 else f"{share:.0%}".replace("%", " %")


def _rect(name: str, x: float, y: float, width: float, height: float) -> str:
    """A block; a gap to the next where there is room for one."""
    size = f'width="{_n(max(width - (0.6 if width > 5 else 0.25), 0.3))}" height="{_n(height - 0.4)}"'
    return f'<rect class="{name}" x="{_n(x)}" y="{_n(y)}" {size}/>'


def _text(x: float, y: float, words: str, name: str = "", anchor: str = "start") -> str:
    attributes = (f' class="{name}"' if name else "") + (f' text-anchor="{anchor}"' if anchor != "start" else "")
    return f'<text x="{_n(x)}" y="{_n(y)}"{attributes}>{escape(words)}</text>'


def _n(value: float) -> str:
    return f"{round(value, 2):g}"
