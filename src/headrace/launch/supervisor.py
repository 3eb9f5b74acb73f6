"""Watches over started ranks until all have ended well, or ends them all with one message that says why.

It relays what ranks tell, passes a reason to stop on, and notices a rank that died (at once), reported an exception
(at once), fell silent, or is busy with one activity for `hang_seconds`. Who is to blame is blame.py's judgement.
"""

import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from headrace.errors import UserError
from headrace.launch import wire
from headrace.launch.blame import RankFailure, Sight, Verdict, failures, stuck
from headrace.launch.start import Ranks
from headrace.launch.wire import Beat, Mood

POLL_SECONDS = 0.05
GRACE_SECONDS = 1.0
"""How long reports are collected after the first rank failed."""
GRACE_BELOW_LAUNCHER_SECONDS = 4.0
"""The same where only its silence tells that a rank died: longer than `SILENT_SECONDS`."""
SILENT_SECONDS = 3.0
"""Beside a rank in trouble, one that has not beaten for so long is taken for dead or stopped."""
START_SECONDS = 300.0
"""How long ranks may take to start and join."""
EXIT_SECONDS = 20.0
"""How long a rank that has done all may take to end by itself; then it is ended, and nothing is lost."""
_COUNTED = (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat"))
"""Where Linux counts processes that it ended for lack of memory: in this container, or on this machine."""

OnMessage = Callable[[int, str, Any], None]
"""Called with the rank, the kind and the payload of what a rank told, in each rank's order."""


class Deadline(Protocol):
    """Why to stop now, or None."""

    def reason(self) -> str | None: ...


@dataclass(frozen=True)
class Ended:
    """All ranks ended well: with all done, or, in their words, `stopped` because they were asked to."""

    stopped: str | None


def supervise(ranks: Ranks, on_message: OnMessage, deadline: Deadline, hang_seconds: float) -> Ended:
    """Wait for all ranks; none of them is left when this returns or raises.

    Raises `UserError` with a rank's own text where it was the user's mistake, and `RankFailure` for everything else.
    """
    watch = _Watch(ranks, on_message, hang_seconds)
    stacks = True
    try:
        while not watch.over():
            watch.look()
            if reason := deadline.reason():
                ranks.ask_to_stop(reason)
            if verdict := watch.verdict():
                raise _error(verdict, ranks)
            time.sleep(POLL_SECONDS)
        stacks = None in ranks.exit_codes()  # its log says what kept one that is ended here
        return Ended(watch.stopped())
    finally:
        ranks.close(stacks)


def _error(verdict: Verdict, ranks: Ranks) -> Exception:
    if verdict.user:
        return UserError(verdict.what)
    line = f"rank {verdict.rank} {verdict.what}; all ranks were stopped, logs in {ranks.meeting.logs}"
    error = RankFailure(line, verdict, max(0.0, time.monotonic() - verdict.began))
    if verdict.traceback:
        error.add_note(f"on rank {verdict.rank}:\n{verdict.traceback}")
    return error


class _Watch:
    """What is known of all ranks."""

    def __init__(self, ranks: Ranks, on_message: OnMessage, hang_seconds: float) -> None:
        self._ranks, self._on_message, self._hang = ranks, on_message, hang_seconds
        slates = map(ranks.meeting.slate_of, range(ranks.meeting.world))
        self._sights = [Sight(rank, slate=slate) for rank, slate in enumerate(slates)]
        self._began = self._moved = time.monotonic()
        self._beats_due = 0.0
        self._silent = min(SILENT_SECONDS, hang_seconds / 2)
        self._out_of_memory = ended_for_memory()

    def over(self) -> bool:
        """Whether every rank has reported its end, and is gone or has had the time to go."""
        late = time.monotonic() - EXIT_SECONDS
        return all(sight.report and (sight.exit is not None or sight.report_at < late) for sight in self._sights)

    def stopped(self) -> str | None:
        """What the first rank that stopped as asked says, or None."""
        said = [sight.report["stopped"] for sight in self._sights if sight.report]
        return next(filter(None, said), None)

    def look(self) -> None:
        """Look at processes, then messages, so that what a rank told before it ended is not missed, then beats."""
        codes = self._ranks.exit_codes()
        if self._ranks.local:
            for sight, code in zip(self._sights, codes, strict=True):
                if code is not None and sight.exit is None:
                    sight.exit, sight.exit_at = code, time.monotonic()
        self._relay()
        if time.monotonic() >= self._beats_due:
            self._beats_due = time.monotonic() + wire.BEAT_SECONDS / 2
            self._hear()
        if not self._ranks.local and codes[0] is not None:
            self._launcher_left(codes[0])

    def verdict(self) -> Verdict | None:
        """Whom to blame, once there is somebody; takes the time to look what others report."""
        now = time.monotonic()
        if any(sight.failed for sight in self._sights):
            self._settle(now + (GRACE_SECONDS if self._ranks.local else GRACE_BELOW_LAUNCHER_SECONDS))
            silent_after = self._hang if self._ranks.local else self._silent
            return self._explained(failures(self._sights, time.monotonic(), silent_after))
        late = [sight.rank for sight in self._sights if sight.beat is None]
        if late and now - self._began > START_SECONDS:
            return Verdict(late[0], f"did not start within {START_SECONDS:.0f} s")
        return stuck(self._sights, now, self._moved, self._hang, self._silent)

    def _explained(self, verdict: Verdict | None) -> Verdict | None:
        """With what the kernel has to say of a rank that was killed."""
        killed = verdict and self._sights[verdict.rank].exit == -signal.SIGKILL
        if verdict and killed and ended_for_memory() > self._out_of_memory:
            return replace(verdict, what=f"{verdict.what}, and the kernel ended a process for lack of memory")
        return verdict

    def _settle(self, until: float) -> None:
        while time.monotonic() < until and not all(sight.ended for sight in self._sights):
            time.sleep(POLL_SECONDS)
            self.look()

    def _relay(self) -> None:
        store = self._ranks.store
        for _ in range(store.queue_len(wire.MESSAGES)):
            entry = json.loads(store.queue_pop(wire.MESSAGES))
            if entry["kind"] == "ended":
                sight = self._sights[entry["rank"]]
                sight.report, sight.report_at = entry["payload"], time.monotonic()
                if not self._ranks.local:  # a launcher tells nothing of single processes
                    sight.exit = 0
            else:
                self._on_message(entry["rank"], *entry["payload"])

    def _hear(self) -> None:
        texts = self._ranks.store.multi_get([wire.beat_key(sight.rank) for sight in self._sights])
        now = time.monotonic()
        for sight, text in zip(self._sights, texts, strict=True):
            beat = Beat.parse(text) if text else None
            if beat and (sight.beat is None or beat.number > sight.beat.number):
                sight.beat, sight.beat_at = beat, now
            if not sight.ended:
                patient = beat is None or beat.mood == Mood.PATIENT
                self._moved = max(self._moved, now if patient else now - sight.age(now))

    def _launcher_left(self, code: int) -> None:
        """Srun or torchrun ended: ranks that did not report have ended with it."""
        for sight in self._sights:
            if not sight.ended:
                sight.lost = f"{self._ranks.meeting.start} ended with exit code {code}"


def ended_for_memory() -> int:
    """How many processes the kernel has ended for lack of memory so far; 0 where it does not say."""
    for path in _COUNTED:
        lines = path.read_text().splitlines() if path.exists() else []
        for name, _, count in (line.partition(" ") for line in lines):
            if name == "oom_kill":
                return int(count)
    return 0
