"""Which of several ranks in trouble is to blame, and the one line that says so.

One rank's end makes others fail within milliseconds: their connections close, or they wait for ever. So all reports of
a short grace are looked at together, and the first of these is named, among equals the earliest:

    1. a rank that a signal killed (but SIGABRT, by which libraries end a process that lost its peers)
    2. a rank's own exception, an abort, an exit without a report
    3. a rank that fell silent: stopped, or on a machine that is gone
    4. a rank that reports that another one left
    5. the rank that has been busy with one activity for longest; where all wait, the one that has waited longest

Everything here is a pure function of what the supervisor saw.
"""

import math
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from headrace.launch.wire import PATIENCE_SECONDS, STOPPED, Beat, Mood

TEXT_LIMIT = 500

Cause = Literal["killed", "failed", "lost", "hung"]
"""A signal; an exception, abort or silent exit; no sign of life; one activity for too long."""


class RankFailure(RuntimeError):  # noqa: N818  what happened, not what is raised
    """A rank died, hung or failed: one line that names the rank, what it was doing, and what happened.

    `seconds` are those from the fault, as far as it is known, to its discovery.
    """

    def __init__(self, line: str, verdict: "Verdict", seconds: float) -> None:
        super().__init__(line)
        self.verdict, self.seconds = verdict, seconds


@dataclass
class Sight:
    """What the supervisor has seen of one rank; times are its own, in monotonic seconds."""

    rank: int
    beat: Beat | None = None
    beat_at: float = 0.0
    exit: int | None = None  # exit code of its process, negative for a signal; None while it lives or where unknown
    exit_at: float = 0.0
    report: dict[str, Any] | None = None  # how it says that it ended
    report_at: float = 0.0
    lost: str | None = None  # how its launcher ended, where it left the rank without a report
    slate: Path | None = None  # where it writes what it is at

    @property
    def activity(self) -> str:
        """What it is at, as far as is known."""
        if self.report and not self.report["well"]:
            return str(self.report["activity"])
        if self.slate and self.slate.exists():
            return self.slate.read_bytes().decode(errors="replace").rstrip(" \0") or "starting"
        return self.beat.label if self.beat else "starting"

    @property
    def failed(self) -> bool:
        """Whether it ended, and not well."""
        if self.report:
            return not self.report["well"] or self.exit not in (None, 0, STOPPED)
        return self.ended

    @property
    def ended(self) -> bool:
        """Whether it reported its end or its process is known to be gone."""
        return bool(self.report or self.lost) or self.exit is not None

    def age(self, now: float) -> float:
        """Seconds since its activity began."""
        return self.beat.age + now - self.beat_at if self.beat else 0.0

    def silence(self, now: float) -> float:
        """Seconds since its last sign of life; 0 before the first."""
        return now - self.beat_at if self.beat else 0.0


@dataclass(frozen=True)
class Verdict:
    """The rank to blame and what happened to it; `user` where it was the user's mistake, whose text `what` then is."""

    rank: int
    what: str
    user: bool = False
    traceback: str | None = None
    cause: Cause = field(default="failed", compare=False)
    began: float = field(default=math.nan, compare=False)  # when the trouble began, on the supervisor's clock
    kind: str | None = field(default=None, compare=False)  # name of the exception's type, where it was one


def failures(sights: Sequence[Sight], now: float, silent_after: float) -> Verdict | None:
    """The first to blame of ranks that ended badly, or fell silent for `silent_after` seconds beside such ones."""
    bad = [sight for sight in sights if sight.failed]
    killed = [s for s in bad if not s.report and s.exit is not None and s.exit < 0 and -s.exit != signal.SIGABRT]
    left_alone = [s for s in bad if s.report and s.report.get("another_left")]
    silent = [s for s in sights if s.lost or (not s.ended and s.silence(now) > silent_after)]
    own = [s for s in bad if not any(s in others for others in (killed, left_alone, silent))]
    if killed:
        return _gone(min(killed, key=lambda sight: sight.exit_at))
    if own:
        return _gone(min(own, key=_ended_at))
    if bad and silent:
        return _silence(max(silent, key=lambda sight: sight.silence(now)), now)
    return _gone(min(left_alone, key=_ended_at)) if left_alone else None


def stuck(
    sights: Sequence[Sight], now: float, moved: float, hang_seconds: float, silent_after: float
) -> Verdict | None:
    """The rank to blame for a hang, where there is one.

    A wait is no hang as long as any rank moves; `moved` is when one last did, or was in a patient activity.
    """
    live = [sight for sight in sights if sight.beat and not sight.ended]
    silent = [s for s in live if s.silence(now) > silent_after]
    slow = [s for s in live if s.age(now) > _limit(s, hang_seconds)]
    waiting = [s for s in live if _mood(s) == Mood.WAITING]
    still = bool(waiting) and now - moved > hang_seconds
    if any(sight.silence(now) > hang_seconds for sight in silent) or (silent and (slow or still)):
        return _silence(max(silent, key=lambda sight: sight.silence(now)), now)
    if slow:
        worst = max(slow, key=lambda sight: sight.age(now))
        return _hung(worst, f"hung in {worst.activity} for {worst.age(now):.0f} s", now)
    if still:
        worst = max(waiting, key=lambda sight: sight.age(now))
        return _hung(worst, f"has waited for {worst.age(now):.0f} s in {worst.activity}, and no rank moves", now)
    return None


def _hung(sight: Sight, what: str, now: float) -> Verdict:
    return Verdict(sight.rank, what, cause="hung", began=now - sight.age(now))


def _silence(sight: Sight, now: float) -> Verdict:
    what = f"gave no sign of life for {sight.silence(now):.0f} s during {sight.activity}"
    if sight.lost:
        what = f"was lost during {sight.activity}: {sight.lost}"
    return Verdict(sight.rank, what, cause="lost", began=now - sight.silence(now))


def _gone(sight: Sight) -> Verdict:
    report = sight.report
    if report and not report["well"]:
        if report["user"]:
            return Verdict(sight.rank, report["text"], user=True)
        text = " ".join(f"{report['type']}: {report['text']}".split())
        what = f"failed during {sight.activity}: {text[:TEXT_LIMIT]}"
        return Verdict(sight.rank, what, False, report["traceback"], "failed", sight.report_at, report["type"])
    assert sight.exit is not None
    if sight.exit < 0:
        what = f"was killed by {signal.Signals(-sight.exit).name} during {sight.activity}"
        return Verdict(sight.rank, what, cause="killed", began=sight.exit_at)
    what = f"left with exit code {sight.exit} and without a report during {sight.activity}"
    return Verdict(sight.rank, what, began=sight.exit_at)


def _ended_at(sight: Sight) -> float:
    return sight.report_at if sight.report else sight.exit_at


def _mood(sight: Sight) -> Mood:
    return sight.beat.mood if sight.beat else Mood.PATIENT


def _limit(sight: Sight, hang_seconds: float) -> float:
    """How many seconds its activity may last."""
    limits = {Mood.BUSY: hang_seconds, Mood.PATIENT: PATIENCE_SECONDS, Mood.WAITING: float("inf")}
    return limits[_mood(sight)]
