"""When a job must stop: a time budget, or SIGTERM from a scheduler.

Code that can save its state polls `reason()` and returns; around code that cannot, the signal raises `StopRequested`
and the stage starts afresh next time. Either way the process exits with 75: "saved, run me again".
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

GRACE_SECONDS = 60.0


class StopRequested(BaseException):
    """Raised in the main thread on SIGTERM or at the end of the time budget, unless the stage polls."""


class Deadline:
    """`reason()` says why to stop now, or None. `minutes` counts from construction; null means no budget."""

    def __init__(self, minutes: float | None) -> None:
        self._reason: str | None = None
        self._polled = False
        self._budget = None if minutes is None else minutes * 60
        self._started = time.monotonic()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Handle SIGTERM and the budget within this block (main thread only)."""
        before = signal.signal(signal.SIGTERM, self._on_signal)
        timer = self._start_timer()
        try:
            yield
        finally:
            if timer:
                timer.cancel()
            signal.signal(signal.SIGTERM, before)

    def reason(self) -> str | None:
        """Why the caller must save and return, or None."""
        return self._reason

    @contextmanager
    def polled(self) -> Iterator[None]:
        """Within this block the caller polls `reason()`, so the signal does not raise."""
        self._polled = True
        try:
            yield
        finally:
            self._polled = False

    def _start_timer(self) -> threading.Timer | None:
        if self._budget is None:
            return None
        # Saving takes time too: stop a minute early, or a tenth of a short budget.
        ends = self._started + self._budget - min(GRACE_SECONDS, self._budget / 10)
        timer = threading.Timer(max(0.0, ends - time.monotonic()), self._on_budget)
        timer.daemon = True
        timer.start()
        return timer

    def _on_budget(self) -> None:
        self._reason = "the time budget launch.minutes is used up"
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._reason = self._reason or "SIGTERM"
        if not self._polled:
            raise StopRequested(self._reason)
