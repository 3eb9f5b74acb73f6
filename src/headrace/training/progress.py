"""What a person sees while a model trains: a live bar on a terminal, a line every 15 seconds anywhere else.

It measures nothing itself; it shows what the trainer tells it.
"""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Protocol, TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 15.0


class Progress(Protocol):
    """What the trainer tells after every step."""

    def update(self, step: int, steps: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """`step` of `steps` are done; `metrics` holds `loss` (nats per token) and `tokens_per_second`."""

    def close(self) -> None:
        """Training ended or paused."""


def progress_on(stream: TextIO = sys.stderr, name: str = "pretrain") -> "Bar | Lines":
    """A live bar where `stream` is a terminal, else lines; `name` says what is being trained."""
    return Bar(stream, name) if stream.isatty() else Lines(stream, name=name)


class Bar:
    """A tqdm bar with loss, tokens/s and the time left."""

    def __init__(self, stream: TextIO, name: str = "pretrain") -> None:
        self._stream, self._name = stream, name
        self._bar: tqdm[None] | None = None

    def update(self, step: int, steps: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """See `Progress`."""
        if self._bar is None:
            self._bar = tqdm(
                total=steps, initial=step - 1, desc=self._name, unit="step", file=self._stream, dynamic_ncols=True
            )
        self._bar.set_postfix_str(_figures(metrics), refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """See `Progress`."""
        if self._bar is not None:
            self._bar.close()


class Lines:
    """One line at the first step, about every 15 seconds, and at the last step."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic, name: str = "pretrain") -> None:
        self._stream, self._clock, self._name = stream, clock, name
        self._begun: tuple[int, float] | None = None
        self._next = 0.0

    def update(self, step: int, steps: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """See `Progress`."""
        now = self._clock()
        first = self._begun is None
        begun_step, begun = self._begun = self._begun or (step, now)
        if not first and now < self._next and step < steps:
            return
        self._next = now + SECONDS_BETWEEN_LINES
        done = step - begun_step  # after a restart, steps are told again
        left = f", {_duration((now - begun) / done * (steps - step))} left" if done > 0 else ""
        share = f"step {step:,} of {steps:,} ({100 * step // steps} %)"
        print(f"{self._name}: {share}, {_figures(metrics)}{left}", file=self._stream, flush=True)

    def close(self) -> None:
        """See `Progress`."""


def _figures(metrics: Mapping[str, float]) -> str:
    return f"loss {metrics['loss']:.3f}, {metrics['tokens_per_second']:,.0f} tokens/s"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
