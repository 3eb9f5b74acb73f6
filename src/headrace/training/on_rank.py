"""One rank's part of a training run: the same program whether it is the stage's own process or one of many ranks.

A layout of several ranks is started by the stage (`launch`), which keeps what a run has only once: its lease, its log,
its tracker, its ledger, the deadline. Each rank reads the job from a file, trains, and the first one tells the stage
what to log, show, track and write into the ledger, and how the phase of the recipe ended:

    python -m headrace.training.on_rank results/pretrain/<fingerprint>/ranks/job.json

The configuration in the job holds the groups that training reads, and no others.
"""

import logging
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from headrace.artifacts.files import read_json, write_json
from headrace.config.compose import groups_from, groups_to_dict
from headrace.config.schema import Config
from headrace.launch.deadline import StopRequested
from headrace.launch.device import resolve, use_threads
from headrace.launch.rank import Rank, run_as_rank
from headrace.training.learner import build_engine
from headrace.training.place import Place, Watchers
from headrace.training.rows import open_rows
from headrace.training.trainer import Trainer

GROUPS = ("seed", "model", "precision", "recipe", "train", "parallel", "launch", "checkpoint", "tracking")
LOG, METRICS, PROGRESS, EVENT, STRETCH = "log", "metrics", "progress", "event", "stretch"
"""Kinds of what the first rank tells."""
_PLACE = TypeAdapter(Place)


@dataclass(frozen=True)
class Job:
    """What a rank needs to know."""

    config: Config  # with at least `GROUPS`
    dataset: Path  # a tokenize artifact
    output: Path  # where the files of the artifact go
    place: Place

    def write(self, path: Path) -> None:
        """Write it for `read`."""
        paths = {"dataset": str(self.dataset), "output": str(self.output)}
        place = _PLACE.dump_python(self.place, mode="json")
        write_json(path, {"config": groups_to_dict(self.config, GROUPS), **paths, "place": place})

    @staticmethod
    def read(path: Path) -> "Job":
        """What `write` wrote."""
        said = read_json(path)
        place = _PLACE.validate_python(said["place"])
        return Job(groups_from(said["config"]), Path(said["dataset"]), Path(said["output"]), place)


@dataclass(frozen=True)
class Stretch:
    """The steps that one set of ranks took: to `step`, from which the next phase goes on, if there is one."""

    step: int
    next_phase: str | None
    summary: dict[str, Any] | None  # `Trainer.summary`, once all is done


def train(job: Job, watchers: Watchers, rank: Rank | None = None) -> Stretch:
    """Train a phase to its end; after the last, write the artifact's files. Without `rank` in one process.

    Raises `StopRequested` once the state is saved because the deadline said so.
    """
    launch = job.config.launch
    device = resolve(launch.device)
    if rank is not None:
        device = rank.connect(device)
    threads = use_threads(launch.threads, rank.ranks_here if rank else 1)
    watchers.logger.info("device %s (launch.device=%s), %d threads", device, launch.device, threads)
    # The loader verifies every shard as it opens it.
    rows = open_rows(job.dataset, job.config, job.place.phase)
    engine = build_engine(job.config, device, rank.rank if rank else 0, rank, job.place.phase, rows.eos)
    try:
        trainer = Trainer(job.config, engine, rows, job.place, watchers)
        end = trainer.run()
        if end.reason:
            raise StopRequested(f"{end.reason}, saved at step {end.step}")
        if end.finished:
            trainer.write_results(job.output)
    finally:
        engine.close()
    return Stretch(end.step, end.next_phase, trainer.summary() if end.finished else None)


def body(rank: Rank) -> None:
    """A rank's work."""
    with rank.patiently("loading"):
        job = Job.read(Path(sys.argv[1]))
    told = _Told(rank) if rank.rank == 0 else _Silent()
    logger = logging.getLogger("headrace.rank")
    logger.setLevel(job.config.tracking.log_level.upper())
    logger.propagate = False
    logger.addHandler(_Handler(rank) if rank.rank == 0 else logging.StreamHandler())
    stretch = train(job, Watchers(told, logger, _Deadline(rank), told, told.event, rank.busy_seconds), rank)
    if rank.rank == 0:
        rank.tell(STRETCH, asdict(stretch))


class _Silent:
    """Tracker, progress and ledger of every rank but the first."""

    def event(self, name: str, facts: Mapping[str, Any]) -> None:
        """Nothing."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def update(self, step: int, steps: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class _Told(_Silent):
    """Tracker, progress and ledger that tell the stage."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank

    def event(self, name: str, facts: Mapping[str, Any]) -> None:
        """Pass an event on."""
        self._rank.tell(EVENT, [name, dict(facts)])

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Pass metrics on."""
        self._rank.tell(METRICS, [step, dict(metrics)])

    def update(self, step: int, steps: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """Pass progress on."""
        self._rank.tell(PROGRESS, [step, steps, tokens, dict(metrics)])


class _Handler(logging.Handler):
    """Log lines of the first rank, told to the stage."""

    def __init__(self, rank: Rank) -> None:
        super().__init__()
        self._rank = rank

    def emit(self, record: logging.LogRecord) -> None:
        """Pass a line on."""
        self._rank.tell(LOG, [record.levelno, record.getMessage()])


class _Deadline:
    """The stage's word, as the rank has heard it."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank

    def reason(self) -> str | None:
        """Why to stop now, or None."""
        return self._rank.asked_to_stop()


if __name__ == "__main__":
    sys.exit(run_as_rank(body))
