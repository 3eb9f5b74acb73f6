"""The ledger of a training run: every attempt, save, restart and lost step, and what share of it all was progress.

`ledger.jsonl` in the run's folder only grows: one JSON object per line, fsynced, a torn last line is passed over. An
entry has `event`, `time` (since 1970, for people), `sitting` (which process of the stage wrote it, from 1), `clock`
(monotonic seconds since that process began, by which all durations are reckoned), `attempt`, and the event's own facts:

    attempt    an attempt began: phase, ranks
    resumed    it trains from here: step, load (seconds that loading took)
    step_done  so far it has come; written now and then
    save       step, stall (seconds that training waited); published: step, seconds, bytes; save_failed: step, error
    skipped    a step was not applied · spike · rollback (step, to) · corruption · slow_rank (rank, factor) · router
    failure    an attempt ended by a fault: rank, cause, what, detect (seconds), stacks (files, where it hung)
    restart    training is where it was before the fault: detect, restart, load, replay (seconds)
    stretch    a phase of the recipe is done; the next one is another attempt
    stopped    saved and stopped as asked; gave_up: ended by a fault for good; finished

`step` counts steps done, `tokens` those that all steps up to it were trained on. The figures (`figures`):

    ETTR      seconds of steps that lead to the final weights / seconds in which a process of the stage was at it
    goodput   tokens that reached the final weights / tokens computed

Progress between two marks (resumed, save, step_done, the end) counts unless a later attempt took the run up before it.
Time between two processes of the stage (pre-empted, or killed until somebody ran it again) is not counted. After a
process was killed, its time is known to the last entry only, so the figures may miss up to `PULSE_SECONDS` of it.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

NAME = "ledger.jsonl"
PULSE_SECONDS = 10.0
"""Where nothing else happened for so long, the next step is written down."""
PARTS = ("detect", "restart", "load", "replay")
"""What a recovery consists of."""


class Ledger:
    """Appends to `path`. A disk that refuses costs nothing but memory: what waits is written with the next entry."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock, self._began = path, clock, clock()
        before = read(path)
        self.sitting = 1 + max((entry["sitting"] for entry in before), default=0)
        self.attempt = max((entry["attempt"] for entry in before), default=0)
        self._waiting = b"\n" if path.exists() and not path.read_bytes().endswith(b"\n") else b""
        self._written = self._began

    def write(self, event: str, facts: Mapping[str, Any]) -> bool:
        """Append one entry durably; whether the disk took it."""
        self._written = self._clock()
        own = {"event": event, "time": round(time.time(), 3), "clock": round(self.clock(), 3)}
        entry = {**facts, **own, "sitting": self.sitting, "attempt": self.attempt}
        self._waiting += json.dumps(_strict(entry), ensure_ascii=False, allow_nan=False).encode() + b"\n"
        try:
            self._flush()
        except OSError:
            return False
        return True

    def clock(self) -> float:
        """Seconds since this process began to write."""
        return self._clock() - self._began

    def idle(self) -> float:
        """Seconds since the last entry."""
        return self._clock() - self._written

    def _flush(self) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            while self._waiting:
                self._waiting = self._waiting[os.write(descriptor, self._waiting) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read(path: Path) -> list[dict[str, Any]]:
    """All entries, oldest first; lines that a crash tore are left out."""
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and {"event", "clock", "sitting", "attempt"} <= entry.keys():
            found.append(entry)
    return found


def _strict(value: Any) -> Any:
    """With numbers that no JSON can hold as text: the loss of a step that was not applied."""
    if isinstance(value, Mapping):
        return {key: _strict(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class _Span:
    """Training between two marks: steps and tokens done, and seconds at it, without stalls."""

    first: int
    last: int
    tokens: int
    seconds: float

    def until(self, step: int) -> "_Span":
        """What of it lies before `step`."""
        share = (min(self.last, step) - self.first) / (self.last - self.first)
        return _Span(self.first, min(self.last, step), round(share * self.tokens), share * self.seconds)


class _Progress:
    """Spans of training, of which those that are not behind a later beginning count."""

    def __init__(self) -> None:
        self.kept: list[_Span] = []
        self.computed = 0  # tokens
        self._mark: tuple[int, int, float] | None = None  # step, tokens, clock

    def begin(self, step: int, tokens: int, clock: float) -> None:
        """Training goes on behind `step`: what was done beyond it is lost."""
        self.kept = [span.until(step) for span in self.kept if span.first < step]
        self._mark = (step, tokens, clock)

    def reach(self, step: int, tokens: int, clock: float, stall: float = 0.0) -> None:
        """`step` was done at `clock`; then came a stall."""
        if self._mark and step >= self._mark[0]:
            before, had, since = self._mark
            if step > before:
                self.kept.append(_Span(before, step, tokens - had, max(0.0, clock - since)))
                self.computed += tokens - had
                self._mark = (step, tokens, clock + stall)
            elif stall:
                self._mark = (step, tokens, since + stall)

    def pause(self) -> None:
        """Nobody trains."""
        self._mark = None


def figures(entries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What came of a run, in JSON; seconds and shares, None where nothing was measured. See the module for each."""
    entries, progress = list(entries), _Progress()
    skipped: dict[int, int] = {}  # tokens of steps that were not applied, by step
    for entry in entries:
        event, step, tokens, clock = entry["event"], entry.get("step"), entry.get("tokens"), entry["clock"]
        if event == "attempt":
            progress.pause()
        if step is None or tokens is None:
            continue
        if event == "resumed":
            progress.begin(step, tokens, clock)
            skipped = {at: lost for at, lost in skipped.items() if at <= step}
        elif event == "rollback":
            progress.reach(step, tokens, clock)
            progress.begin(entry["to"], entry["to_tokens"], clock)
            skipped = {at: lost for at, lost in skipped.items() if at <= entry["to"]}
        else:
            progress.reach(step, tokens, entry.get("reached", clock), entry.get("stall", 0.0))
            if event == "skipped":
                skipped[step] = entry["step_tokens"]
    seconds = sum(span.seconds for span in progress.kept)
    useful = sum(span.tokens for span in progress.kept) - sum(skipped.values())
    wall = _seconds_at_it(entries)
    saves = [entry for entry in entries if entry["event"] == "save"]
    return {
        "ettr": seconds / wall if wall else None,
        "goodput": useful / progress.computed if progress.computed else None,
        "productive_seconds": seconds,
        "wall_seconds": wall,
        "tokens_computed": progress.computed,
        "tokens_useful": useful,
        "mttr": _recovery(entries),
        "attempts": len({entry["attempt"] for entry in entries if entry["event"] == "attempt"}),
        "sittings": len({entry["sitting"] for entry in entries}),
        "failures": [_failure(entry) for entry in entries if entry["event"] == "failure"],
        "restarts": _count(entries, "restart"),
        "saves": len(saves),
        "stall_seconds": sum(entry.get("stall", 0.0) for entry in saves),
        "saves_failed": _count(entries, "save_failed"),
        "skipped_steps": _count(entries, "skipped"),
        "spikes": _count(entries, "spike"),
        "rollbacks": _count(entries, "rollback"),
        "corruptions": _count(entries, "corruption"),
        "router_alarms": _count(entries, "router"),
        "slow_ranks": sorted({entry["rank"] for entry in entries if entry["event"] == "slow_rank"}),
    }


def _seconds_at_it(entries: Iterable[Mapping[str, Any]]) -> float:
    ends: dict[int, float] = {}
    for entry in entries:
        ends[entry["sitting"]] = max(ends.get(entry["sitting"], 0.0), entry["clock"])
    return sum(ends.values())


def _recovery(entries: Iterable[Mapping[str, Any]]) -> dict[str, float] | None:
    """Mean seconds of each part of a recovery and of the whole, None where none was needed."""
    found = [entry for entry in entries if entry["event"] == "restart"]
    if not found:
        return None
    parts = {part: mean(entry[part] for entry in found) for part in PARTS}
    return {**parts, "total": sum(parts.values())}


def _failure(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: entry.get(key) for key in ("step", "rank", "cause", "what")}


def _count(entries: Iterable[Mapping[str, Any]], event: str) -> int:
    return sum(entry["event"] == event for entry in entries)
