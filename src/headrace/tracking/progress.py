"""What a person sees while something goes on: a live bar on a terminal, a line every 15 seconds anywhere else.

    display = progress_on(name="tokenize", unit="tokens")
    display.show(12_000, 50_000, "3,100 tokens/s")
    display.close()

It measures nothing itself; it shows what it is told.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Protocol, TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 15.0
_RULES_SHOWN = 3


class Display(Protocol):
    """Shows how far something has got."""

    def show(self, done: int, total: int, said: str) -> None:
        """`done` of `total` are done; `said` is what there is to say beside."""

    def close(self) -> None:
        """It ended or paused."""


def progress_on(stream: TextIO | None = None, name: str = "", unit: str = "step") -> "Bar | Lines":
    """A live bar where `stream` (standard error by default) is a terminal, else lines; `name` says what goes on."""
    stream = stream or sys.stderr
    return Bar(stream, name, unit) if stream.isatty() else Lines(stream, name=name, unit=unit)


class Bar:
    """A tqdm bar with the time left."""

    def __init__(self, stream: TextIO, name: str, unit: str) -> None:
        self._stream, self._name, self._unit = stream, name, unit
        self._bar: tqdm[None] | None = None

    def show(self, done: int, total: int, said: str) -> None:
        """See `Display`."""
        if self._bar is None:
            self._bar = tqdm(
                total=total,
                initial=done,
                desc=self._name,
                unit=self._unit,
                unit_scale=self._unit != "step",
                file=self._stream,
                dynamic_ncols=True,
            )
        self._bar.set_postfix_str(said, refresh=False)
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """See `Display`."""
        if self._bar is not None:
            self._bar.close()


class Lines:
    """One line at the beginning, about every 15 seconds, and at the end."""

    def __init__(
        self, stream: TextIO, clock: Callable[[], float] = time.monotonic, *, name: str, unit: str = "step"
    ) -> None:
        self._stream, self._clock, self._name, self._unit = stream, clock, name, unit
        self._begun: tuple[int, float] | None = None
        self._next = 0.0

    def show(self, done: int, total: int, said: str) -> None:
        """See `Display`."""
        now = self._clock()
        first = self._begun is None
        begun_done, begun = self._begun = self._begun or (done, now)
        if not first and now < self._next and done < total:
            return
        self._next = now + SECONDS_BETWEEN_LINES
        more = done - begun_done  # after a restart, steps are told again
        left = f", {_duration((now - begun) / more * (total - done))} left" if more > 0 else ""
        share = f"{self._unit} {done:,} of {total:,} ({100 * done // max(1, total)} %)"
        print(f"{self._name}: {share}, {said}{left}", file=self._stream, flush=True)

    def close(self) -> None:
        """See `Display`."""


def by_rule(counts: Mapping[str, int]) -> str:
    """What was left out, most first: '900 exact duplicate, 20 not UTF-8, 8 text is null, 7 by 2 other rules'."""
    ordered = Counter(counts).most_common()
    shown = ordered if len(ordered) <= _RULES_SHOWN + 1 else ordered[:_RULES_SHOWN]
    rest = [count for _, count in ordered[len(shown) :]]
    other = [f"{sum(rest):,} by {len(rest)} other rules"] if rest else []
    return ", ".join([*(f"{count:,} {rule}" for rule, count in shown), *other])


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
