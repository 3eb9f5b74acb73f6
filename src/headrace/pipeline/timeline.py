"""What ran when on which rank: the spans that a simulation plans and that an executor measures.

Both speak of the same actions in the same spelling, so a plan and a real step can be drawn on one scale
(`timeline_svg.py`) or opened side by side in Perfetto (`chrome_trace`). Times are in whatever unit the spans came in:
seconds where measured, units of a forward where planned so. Nothing here measures.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

COMPUTE, COMMUNICATION = "compute", "communication"


@dataclass(frozen=True, slots=True)
class Span:
    """One action of a rank from start to end; a collective's span goes from its issue to the end of its wait."""

    rank: int
    start: float
    end: float
    action: str  # `str` of the schedule's action, or a name for what is none: "dispatch"
    lane: str = COMPUTE


def window(spans: Sequence[Span]) -> tuple[float, float]:
    """First start and last end; (0, 0) of nothing."""
    return min((s.start for s in spans), default=0.0), max((s.end for s in spans), default=0.0)


def idle_shares(spans: Sequence[Span]) -> dict[int, float]:
    """By rank, the share of the window of all ranks in which it does not compute (the bubble), 0 to 1."""
    start, end = window(spans)
    busy: dict[int, float] = {span.rank: 0.0 for span in sorted(spans, key=lambda span: span.rank)}
    for span in spans:
        if span.lane == COMPUTE:
            busy[span.rank] += span.end - span.start
    return {rank: 1 - time / (end - start) if end > start else 0.0 for rank, time in busy.items()}


def tracks(spans: Iterable[Span]) -> list[list[Span]]:
    """Spans of one lane on as few lines as keep them from covering each other, each line in order of time."""
    lines: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: (span.start, span.end)):
        free = next((line for line in lines if line[-1].end <= span.start), None)
        if free is None:
            lines.append([span])
        else:
            free.append(span)
    return lines


def chrome_trace(spans: Sequence[Span], microseconds: float = 1e6) -> str:
    """JSON for Perfetto or chrome://tracing: a process per rank, a thread per lane (more where its spans overlap).

    `microseconds` is the length of the spans' unit: 1e6 for seconds. Times are written to the nanosecond.
    """
    origin, _ = window(spans)
    events: list[dict[str, Any]] = []
    by_lane: dict[tuple[int, bool, str], list[Span]] = {}
    for span in spans:
        by_lane.setdefault((span.rank, span.lane != COMPUTE, span.lane), []).append(span)
    threads: dict[int, int] = {}
    for (rank, _, lane), members in sorted(by_lane.items()):
        if rank not in threads:
            events.append(_name("process_name", rank, 0, f"rank {rank}"))
        for line in tracks(members):
            thread = threads[rank] = threads.get(rank, -1) + 1
            events.append(_name("thread_name", rank, thread, lane))
            events += [
                {
                    "name": span.action,
                    "cat": lane,
                    "ph": "X",
                    "ts": round((span.start - origin) * microseconds, 3),
                    "dur": round((span.end - span.start) * microseconds, 3),
                    "pid": rank,
                    "tid": thread,
                }
                for span in line
            ]
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, separators=(",", ":"))


def _name(what: str, rank: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": rank, "tid": thread, "args": {"name": name}}
