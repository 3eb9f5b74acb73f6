"""The loss of every step of a run, on disk: for curves that are compared step by step.

The trainer's own history keeps about a hundred steps, and tracking tells as often as somebody wants to be told. What a
person watches, though, is told of every step; so this is a `Progress` that writes down what it is told and passes it
on. A run that goes on from a checkpoint writes some steps again; the later line counts, and both hold the same loss.
"""

import math
import time
from collections.abc import Mapping
from pathlib import Path

from headrace.errors import UserError
from headrace.tracking.journal import Journal, read_history
from headrace.training.progress import Progress


class LossLog:
    """Appends each step's loss to `path` and tells `shown` the same."""

    def __init__(self, path: Path, shown: Progress) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._journal, self._shown = Journal(path), shown

    def update(self, step: int, steps: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """See `Progress`; raises `OSError` where the disk refuses."""
        self._journal.write(step, time.time(), {"loss": metrics["loss"]})
        self._shown.update(step, steps, tokens, metrics)

    def close(self) -> None:
        """See `Progress`."""
        self._journal.close()
        self._shown.close()


def read_losses(path: Path, steps: int) -> list[float | None]:
    """The losses of steps 1 to `steps` in nats per token, None where one was not finite.

    A step that is missing, as after a power failure, is a `UserError`.
    """
    found = {row["step"]: float(row["loss"]) for row in read_history(path)}
    missing = [step for step in range(1, steps + 1) if step not in found]
    if missing:
        raise UserError(f"{path}: lacks step {missing[0]}; remove the folder {path.parent} to train this run again")
    return [found[step] if math.isfinite(found[step]) else None for step in range(1, steps + 1)]
