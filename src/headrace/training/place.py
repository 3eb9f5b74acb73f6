"""What a trainer is handed beside model and data: where its run stands, and who watches; and how it ends."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from logging import Logger
from pathlib import Path
from typing import Any, Protocol

from headrace.config.phases import MAIN
from headrace.training.progress import Progress
from headrace.training.telling import Ledger, Tracker


class Deadline(Protocol):
    """Why to stop now, or None."""

    def reason(self) -> str | None: ...


@dataclass(frozen=True)
class Place:
    """Where a run stands: its folder of checkpoints, its identity, its phase, and what it starts from."""

    checkpoints: Path
    fingerprint: str  # a checkpoint of another run is refused
    flops_per_token: float  # model FLOPs of forward and backward, for MFU
    source: Path | None  # train.from: the folder of another run's checkpoint
    same_rows: bool = False  # whether that run read the same rows in the same order, so that this one goes on behind
    timeline: Path | None = None  # where the timeline of one step is written
    phase: str = MAIN  # of the recipe
    until: str | None = None  # the last phase that is trained with the same model and layout; None: `phase` itself
    slice: Mapping[str, Any] = field(default_factory=dict)  # what the fingerprint hashes, to name what differs
    data: str = ""  # manifest hash of the token shards
    code: str = ""  # version of the code


def _nothing(event: str, facts: Mapping[str, Any]) -> None:
    """A ledger that nobody keeps."""


@dataclass(frozen=True)
class Watchers:
    """Who is told what happens, and who may ask the run to stop."""

    tracker: Tracker
    logger: Logger
    deadline: Deadline
    progress: Progress
    ledger: Ledger = _nothing  # (event, facts in JSON)
    busy: Callable[[], float] = float  # seconds that this rank has been at work, waits for others left out


@dataclass(frozen=True)
class Outcome:
    """How `Trainer.run` ended: the recipe done, saved because of `reason`, or to be gone on with in `next_phase`."""

    finished: bool
    step: int
    reason: str | None
    next_phase: str | None = None
