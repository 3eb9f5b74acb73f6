"""What a rank really did: spans of actions, of their pieces of computation, and of collectives from issue to wait.

On a CPU times are the host's. On a GPU computation is timed by events on the device, so tracing costs no
synchronisation until the spans are read. Times are seconds since `begin`, which all ranks call together. Nothing is
recorded, and no memory grows, before `begin` and after `end`.
"""

import time
from collections.abc import Callable
from typing import TypeVar

import torch

from headrace.pipeline.timeline import COMMUNICATION, COMPUTE, Span

T = TypeVar("T")
PIECES = "pieces"
"""The lane of what actions are made of: attention, experts."""
Mark = float | torch.cuda.Event


class Trace:
    """Records one run of an executor on pipeline rank `rank`."""

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank, self._cuda = rank, device.type == "cuda"
        self._spans: list[tuple[str, str, Mark, Mark]] = []
        self._collectives: list[tuple[str, float, float, float, float]] = []
        self.on = False

    def begin(self) -> None:
        """Forget what was recorded and record from now on; time starts now."""
        self.on = True
        self._spans.clear()
        self._collectives.clear()
        self._host, self._zero = time.perf_counter(), self.now()

    def end(self) -> None:
        """Record no more; what was recorded stays until the next `begin`."""
        self.on = False

    def now(self) -> Mark:
        """This moment: in the host's time, or on the current CUDA stream."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def action(self, action: str, begun: Mark) -> None:
        """An action that ends now."""
        self._spans.append((action, COMPUTE, begun, self.now()))

    def compute(self, label: str, work: Callable[[], T]) -> T:
        """Run `work` as a piece of computation."""
        begun = self.now()
        result = work()
        self._spans.append((label, PIECES, begun, self.now()))
        return result

    def collective(self, label: str, issued: float, waited: float, finished: float, returned: float) -> None:
        """A collective, as `headrace.parallel.channel` records it."""
        self._collectives.append((label, issued, waited, finished, returned))

    def spans(self) -> list[Span]:
        """All that was recorded since `begin`, by start."""
        spans = [Span(self._rank, self._seconds(a), self._seconds(b), name, lane) for name, lane, a, b in self._spans]
        spans += [
            Span(self._rank, issued - self._host, returned - self._host, label, COMMUNICATION)
            for label, issued, _, _, returned in self._collectives
        ]
        return sorted(spans, key=lambda span: span.start)

    def _seconds(self, mark: Mark) -> float:
        if isinstance(mark, float):
            return mark - self._host
        assert not isinstance(self._zero, float)
        mark.synchronize()
        milliseconds: float = self._zero.elapsed_time(mark)
        return milliseconds / 1000
