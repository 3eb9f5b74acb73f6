"""The DAG as a ledger: one row per stage in running order, arcs for what reads what, bars for seconds.

A chain with a few long edges is easier to read downward than as boxes across, and each row has room for the
fingerprint, for what was made, and for the time, at a desk and on a phone.
"""

from collections.abc import Sequence

from markupsafe import Markup

from headrace.reporting.facts import Stage
from headrace.reporting.quantities import duration
from headrace.reporting.svg import WIDE, drawing, element, text


def direct_parents(stages: Sequence[Stage]) -> dict[str, set[str]]:
    """The parents that no other parent already implies (transitive reduction): these edges are drawn strong."""
    above: dict[str, set[str]] = {}
    for stage in stages:
        above[stage.name] = set(stage.parents).union(*(above.get(parent, set()) for parent in stage.parents))
    return {
        stage.name: {p for p in stage.parents if not any(p in above.get(other, set()) for other in stage.parents)}
        for stage in stages
    }


def draw_dag(stages: Sequence[Stage], width: float) -> Markup:
    """The ledger at one width. Parents must come before their children, as in the stage table."""
    wide = width >= WIDE
    row = 40.0 if wide else 58.0
    gutter = 74.0 if wide else 44.0
    centres = {stage.name: 20.0 + row * i for i, stage in enumerate(stages)}
    reduced = direct_parents(stages)
    edges = [(parent, stage.name) for stage in stages for parent in stage.parents if parent in centres]
    edges.sort(key=lambda edge: edge[0] in reduced[edge[1]])
    parts = [
        _edge(centres[parent], centres[child], row, gutter, strong=parent in reduced[child]) for parent, child in edges
    ]
    longest = max((stage.seconds or 0.0 for stage in stages), default=0.0) or 1.0
    for stage in stages:
        y = centres[stage.name]
        parts.append(element("circle", cx=gutter - 10, cy=y, r=5, class_="node"))
        parts += (
            _wide_row(stage, y, gutter + 8, width, longest)
            if wide
            else _narrow_row(stage, y, gutter + 8, width, longest)
        )
    names = ", ".join(f"{stage.name} from {' and '.join(stage.parents) or 'the sources'}" for stage in stages)
    return drawing(width, row * len(stages) + 4, f"Graph of the stages: {names}.", parts)


def _edge(start: float, end: float, row: float, gutter: float, *, strong: bool) -> Markup:
    x = gutter - 10
    class_ = "edge" if strong else "edge implied"
    if end - start < row * 1.5:
        return element("path", d=f"M{x:.1f} {start + 5:.1f}V{end - 5:.1f}", class_=class_)
    left = x - min(gutter - 14, 9 + (end - start) / row * (gutter - 20) / 8)
    first, second = start + row * 0.55, end - row * 0.55
    d = f"M{x - 4:.1f} {start + 3:.1f}C{left:.1f} {first:.1f} {left:.1f} {second:.1f} {x - 4:.1f} {end - 3:.1f}"
    return element("path", d=d, class_=class_)


def _wide_row(stage: Stage, y: float, x: float, width: float, longest: float) -> list[Markup]:
    bar, room = x + 530, width - x - 530 - 84
    return [
        text(x, y + 4, stage.name, class_="stage"),
        text(x + 88, y + 4, stage.fingerprint, class_="mono"),
        text(x + 196, y + 4, _clip(stage.made, 52), class_="label"),
        *_bar(stage.seconds, bar, y - 5, room, longest),
        text(width, y + 4, _seconds(stage), "end", "value"),
    ]


def _narrow_row(stage: Stage, y: float, x: float, width: float, longest: float) -> list[Markup]:
    return [
        text(x, y + 4, stage.name, class_="stage"),
        text(x + 78, y + 4, stage.fingerprint, class_="mono"),
        text(width, y + 4, _seconds(stage), "end", "value"),
        text(x, y + 21, _clip(stage.made, 46), class_="label"),
        *_bar(stage.seconds, x, y + 27, width - x, longest, height=3),
    ]


def _bar(seconds: float | None, x: float, y: float, room: float, longest: float, height: float = 10) -> list[Markup]:
    if not seconds:
        return []
    return [element("rect", x=x, y=y, width=max(1.0, room * seconds / longest), height=height, rx=1.5, class_="bar")]


def _seconds(stage: Stage) -> str:
    return "not timed" if stage.seconds is None else duration(stage.seconds)


def _clip(words: str, length: int) -> str:
    return words if len(words) <= length else words[: length - 1].rstrip() + "…"
