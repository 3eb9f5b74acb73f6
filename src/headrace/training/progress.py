"""What a person sees while a model trains: see `tracking.progress`."""

from collections.abc import Mapping
from typing import Protocol, TextIO

from headrace.tracking import progress
from headrace.tracking.progress import Display


class Progress(Protocol):
    """What the trainer tells after every step."""

    def update(self, step: int, steps: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """`step` of `steps` are done; `metrics` holds `loss` (nats per token) and `tokens_per_second`."""

    def close(self) -> None:
        """Training ended or paused."""


class Shown:
    """Shows what the trainer tells: loss, tokens/s and the time left."""

    def __init__(self, display: Display) -> None:
        self._display = display

    def update(self, step: int, steps: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """See `Progress`."""
        self._display.show(step, steps, f"loss {metrics['loss']:.3f}, {metrics['tokens_per_second']:,.0f} tokens/s")

    def close(self) -> None:
        """See `Progress`."""
        self._display.close()


def progress_on(stream: TextIO | None = None, name: str = "pretrain") -> Shown:
    """Shows the training of what `name` says on `stream`, standard error by default."""
    return Shown(progress.progress_on(stream, name))
