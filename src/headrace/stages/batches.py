"""One job of a stage that is done in many: some of its units, in any number of jobs side by side.

    python -m headrace.stages.tokenize_shards 00002 experiment=tiny

Each batch has a lease, a ledger and a log of its own. A unit is published by a rename and found again by what it was
made from: a killed job costs at most one unit, and the gathering stage makes whatever is missing.
"""

import logging
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from headrace.artifacts import manifest as manifests
from headrace.artifacts.files import write_atomic
from headrace.config.compose import load
from headrace.config.schema import Config
from headrace.corpus.lock import Lock
from headrace.corpus.sources import known_lock
from headrace.errors import UserError
from headrace.launch.deadline import Deadline, StopRequested
from headrace.stages.attempts import Ledger
from headrace.stages.batch_names import batch_folder
from headrace.stages.cache import fetched
from headrace.stages.places import Place, places
from headrace.stages.run import close_log, explain, fail, failed, held, open_log, say
from headrace.tracking.redact import Redactor

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """What the work of a batch is handed."""

    name: str
    config: Config
    lock: Lock
    place: Place
    inputs: dict[str, Path]  # artifacts of the stage's parents
    log: logging.Logger


@dataclass(frozen=True)
class Batches(Generic[T]):
    """The units of `stage` that jobs make in batches. `unit_name` names a unit for people."""

    stage: str
    program: str
    per_job: Callable[[Config], int]
    units: Callable[[Config, Lock, Place], Sequence[T]]
    finished: Callable[[Place, T], bool]
    make: Callable[[Job, Sequence[T]], Iterator[str]]  # a line for the log with each unit
    unit_name: Callable[[T], str]

    def folder(self, config: Config) -> str:
        """Where the jobs' files lie in the stage's run directory."""
        return batch_folder(self.program, self.per_job(config))

    def main(self, argv: Sequence[str]) -> int:
        """Make the units of the batch `argv[0]` under the overrides `argv[1:]`; returns the exit code."""
        name = f"{self.program} {argv[0] if argv else ''}".strip()
        try:
            if not argv:
                raise UserError(f"usage: python -m headrace.stages.{self.program} BATCH [key=value ...]")
            config = load(argv[1:])
            lock = known_lock(config)
            found = places(config, lock.hash)
            with Deadline(config.launch.minutes).watching():
                # What is no number becomes no file's name: `batch_of` refuses it.
                if argv[0].isdigit() and _is_there(config, found[self.stage], found):
                    self._done(argv[0], found[self.stage], config, "the stage's artifact is there\n")
                    return 0
                units = batch_of(argv[0], self.units(config, lock, found[self.stage]), self.per_job(config))
                return self._attempt(argv[0], units, config, lock, found)
        except (Exception, KeyboardInterrupt, StopRequested) as error:
            return failed(name, error)

    def _attempt(self, batch: str, units: Sequence[T], config: Config, lock: Lock, found: dict[str, Place]) -> int:
        place = found[self.stage]
        folder = place.folder / self.folder(config)
        folder.mkdir(parents=True, exist_ok=True)
        with held(place, f"{self.program}-{batch}"):
            ledger, written = Ledger(folder, batch), folder / f"{batch}.log"
            log = open_log(written, config.tracking.log_level)
            stuck = ledger.start(sum(self.finished(place, unit) for unit in units))
            if stuck:
                return fail(f"{self.program} {batch}", stuck, 1)
            code, reason = 1, "failed"
            try:
                inputs = {name: found[name].artifact for name in place.slice["parents"]}
                for artifact in inputs.values():
                    manifests.verify(artifact, manifests.SMALL)  # readers verify the large files as they read
                for line in self.make(Job(f"{self.program} {batch}", config, lock, place, inputs, log), units):
                    log.info("%s", line)
                self._done(batch, place, config, "".join(f"{self.unit_name(unit)}\n" for unit in units))
                code, reason = 0, f"{len(units)} units"
            except BaseException as error:
                code, reason = explain(error)
                log.error("%s", "".join(traceback.format_exception(error)))
                if code == 1:
                    reason += f" (traceback in {written})"
            finally:
                ledger.end(code, Redactor().text(reason))
                close_log(log)
        return code if code == 0 else fail(f"{self.program} {batch}", reason, code)

    def _done(self, batch: str, place: Place, config: Config, what: str) -> None:
        folder = place.folder / self.folder(config)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / f"{batch}.done", what.encode())


def _is_there(config: Config, place: Place, found: dict[str, Place]) -> bool:
    """Whether the whole stage is finished, or its artifact came from the cache `launch.fetch`: no unit is wanted then.

    Jobs that start meanwhile wait for the one that fetches.
    """
    if place.artifact.exists() or config.launch.fetch is None:
        return place.artifact.exists()
    place.folder.mkdir(parents=True, exist_ok=True)
    with held(place):
        there, line = (True, "") if place.artifact.exists() else fetched(config, place, found)
    if line:
        say(place, line)
    return there


def batch_of(batch: str, units: Sequence[T], per_job: int) -> Sequence[T]:
    """The units of one batch; `UserError` for a batch that does not exist."""
    count = -(-len(units) // per_job)
    if not batch.isdigit() or int(batch) >= count:
        raise UserError(f"batch {batch!r}: give a number from 0 to {count - 1}")
    return units[int(batch) * per_job : (int(batch) + 1) * per_job]


def run(batches: Batches[T]) -> None:
    """The program of these batches."""
    sys.exit(batches.main(sys.argv[1:]))
