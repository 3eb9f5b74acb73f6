"""The saves of a run: begun on all ranks together, written while training goes on, published by the first rank.

    begin     every rank copies what it owns; training has waited for that and no more
    look      at every step, with what all ranks said of their part: once all have written, the first rank publishes (in
              a thread) and removes what need not be kept; where one has failed, the save is given up, training goes on
    settle    wait until the save in progress is published or given up

All ranks make the same calls in the same order, and agree on what became of a save from the words that they exchange.
Only the last save of a run must succeed: `last` raises `SaveFailed`, or `UserError` where the disk is full.
"""

import errno
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from logging import Logger
from pathlib import Path
from typing import Any

from headrace.checkpoint.reader import checkpoint_folder, open_checkpoint, steps
from headrace.checkpoint.retain import retain
from headrace.checkpoint.writer import Writer, abandon, clear_leftovers, publish, remove
from headrace.config.schema import CheckpointConfig, ParallelConfig
from headrace.errors import UserError
from headrace.parallel.shards import Piece
from headrace.planning.reliability import auto_interval, machines_of
from headrace.training.learner import Learner
from headrace.training.telling import Ledger

FIRST_SAVE = 10
"""With `checkpoint.interval=auto`: steps until the first save, which tells how long one takes."""


class SaveFailed(OSError):  # noqa: N818  what happened, not what is raised
    """The last save of a run could not be written; older checkpoints are as they were."""


@dataclass
class _Save:
    """A save in progress. `said` is what all ranks have written, once they have."""

    step: int
    token: str
    state: Mapping[str, Any]  # on the first rank
    began: float
    back_to: Collection[int]
    publishing: Future[None] | None = None
    said: Sequence[Mapping[str, Any]] | None = None

    def bytes(self) -> int:
        """What all ranks wrote."""
        return sum(file["bytes"] for files in self.said or () for file in files.values())


class Saver:
    """Saves under `folder`; made on all ranks at the same time."""

    def __init__(self, folder: Path, settings: CheckpointConfig, learner: Learner, log: Logger, ledger: Ledger) -> None:
        self._folder, self._settings, self._learner, self._log, self._ledger = folder, settings, learner, log, ledger
        self._first = learner.mesh.rank == 0
        self._writer = Writer(folder, learner.mesh.rank)
        self._token, self._saves = learner.agreed_all(secrets.token_hex(6))[0], 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._now: _Save | None = None
        self._failure: SaveFailed | None = None
        self._known: dict[str, bool] = {}  # checkpoints that need not be read again, by their manifests' hashes
        self.newest = 0  # the newest step with a whole checkpoint, as far as is known
        self.stall = 0.0  # seconds that training waited for the newest save
        if self._first:
            clear_leftovers(folder)

    @property
    def step(self) -> int | None:
        """The step whose save is in progress."""
        return self._now.step if self._now else None

    def begin(
        self, step: int, kinds: Mapping[str, Sequence[Piece]], state: Mapping[str, Any], back_to: Collection[int]
    ) -> None:
        """Save `kinds` and, from the first rank, `state`; waits for the save before and for the copy.

        back_to: steps that the run may have to go back to from here on; the checkpoints for that stay.
        """
        began = time.perf_counter()
        with self._learner.watch.patiently(f"saving step {step}"):
            self.settle()
            self._saves += 1
            self._now = _Save(step, f"{self._token}n{self._saves:06d}", state, time.perf_counter(), back_to)
            self._writer.begin(step, self._now.token, kinds)
            if not self._settings.asynchronous:
                self.settle()
        self.stall = time.perf_counter() - began
        self._ledger("save", {"step": step, "stall": round(self.stall, 6)})

    def last(
        self, step: int, kinds: Mapping[str, Sequence[Piece]], state: Mapping[str, Any], back_to: Collection[int]
    ) -> None:
        """Save and wait; `SaveFailed` where no checkpoint of this step comes of it, `UserError` for a full disk."""
        self.settle()
        if self.newest != step:
            self.begin(step, kinds, state, back_to)
            self.settle()
        if self.newest != step:
            assert self._failure is not None
            if self._failure.errno in (errno.ENOSPC, errno.EDQUOT):  # nothing that starting again would mend
                text = f"{self._failure.strerror}: the disk is full; free some space and run it again"
                raise UserError(f"{text}: nothing finished is lost")
            raise self._failure

    def word(self) -> str | None:
        """What this rank says of the save in progress, for `look`."""
        if self._now is None:
            return None
        if self._now.said is None:
            status = self._writer.status()
            assert status is not None
            return status.state
        if self._now.publishing is None or not self._now.publishing.done():
            return "publishing"
        error = self._now.publishing.exception()
        return f"{type(error).__name__}: {error}" if error else "published"

    def look(self, words: Sequence[str | None]) -> None:
        """Go on with the save in progress, given the `word` of each rank."""
        if self._now is None or "writing" in words:
            return
        if self._now.said is None:
            self._collect()
        elif words[0] == "published":
            self._end()
        elif words[0] != "publishing":
            error = self._now.publishing and self._now.publishing.exception()
            self._give_up(f"rank 0: {words[0]}", error.errno if isinstance(error, OSError) else None)

    def settle(self) -> None:
        """Wait until no save is in progress."""
        while self._now is not None:
            with self._learner.watch.patiently(f"saving step {self._now.step}"):
                self._writer.wait()
                if self._now.publishing:
                    self._now.publishing.exception()
                self.look(self._learner.agreed_all(self.word()))

    def drop(self) -> None:
        """Give up the save in progress, whose content is in doubt."""
        if self._now is not None and self._now.said is None:
            with self._learner.watch.patiently(f"giving up the save of step {self._now.step}"):
                self._writer.wait()
                self._learner.agreed_all(self._writer.take().state)  # nobody writes any more
                self._give_up("what was saved is in doubt", None)
        self.settle()

    def forget_after(self, step: int) -> None:
        """Remove checkpoints of later steps, which are taken again, differently; none is in progress."""
        for later in steps(self._folder) if self._first else ():
            if later > step:
                remove(checkpoint_folder(self._folder, later))
        self.newest = min(self.newest, step)

    def trust(self, step: int) -> None:
        """The checkpoint of `step` is the newest, and has been read and verified."""
        self.newest = step
        self._known[open_checkpoint(checkpoint_folder(self._folder, step)).manifest_hash] = True

    def leave(self) -> None:
        """However training ended, a rank alone in its world ends its save; of several, the others may be gone."""
        if self._learner.mesh.world == 1:
            self.settle()

    def _collect(self) -> None:
        """All ranks' parts have been written, or one has failed."""
        assert self._now is not None
        mine = self._writer.take()
        everyone = self._learner.agreed_all([mine.files, mine.error, mine.errno])
        failed = [f"rank {rank}: {error}" for rank, (_, error, _) in enumerate(everyone) if error]
        if failed:
            self._give_up("; ".join(failed), next(number for _, error, number in everyone if error))
            return
        self._now.said = [files for files, _, _ in everyone]
        if self._first:
            self._now.publishing = self._thread.submit(self._publish, self._now)

    def _publish(self, save: _Save) -> None:
        assert save.said is not None
        path = publish(self._folder, save.step, save.token, save.said, save.state)
        self._known[open_checkpoint(path).manifest_hash] = True
        retain(self._folder, self._settings.keep, self._settings.keep_every, self._known, save.back_to)

    def _end(self) -> None:
        assert self._now is not None
        save, self._now = self._now, None
        self.newest = save.step
        seconds = time.perf_counter() - save.began
        self._ledger("published", {"step": save.step, "seconds": round(seconds, 6), "bytes": save.bytes()})

    def _give_up(self, error: str, number: int | None) -> None:
        assert self._now is not None
        save, self._now = self._now, None
        if self._first:
            with suppress(OSError):
                abandon(self._folder, save.step, save.token)
        text = f"the checkpoint of step {save.step} could not be saved: {error}"
        self._failure = SaveFailed(number or errno.EIO, text)
        self._log.warning("%s; older checkpoints are as they were", text)
        self._ledger("save_failed", {"step": save.step, "error": error})


class Rhythm:
    """When a run saves: every `checkpoint.interval` steps, or as often as measured times and the rate of faults say.

    Asked on the first rank only, whose answer counts.
    """

    def __init__(self, settings: CheckpointConfig, parallel: ParallelConfig) -> None:
        self._interval, self._faults, self._machines = settings.interval, settings.faults_per_day, machines_of(parallel)
        self._steps, self._seconds = 0, 0.0
        self._saved = 0

    def took(self, seconds: float) -> None:
        """A step has been taken."""
        self._steps += 1
        self._seconds += seconds

    def saved(self, step: int) -> None:
        """The run's state after `step` steps is, or will be, in a checkpoint."""
        self._saved = step

    def due(self, step: int, stall: float) -> bool:
        """Whether to save after `step` steps; `stall` is what the newest save has cost training, in seconds."""
        if step == self._saved:
            return False
        if self._interval != "auto":
            return step % self._interval == 0
        return step - self._saved >= self._steps_between(stall)

    def _steps_between(self, stall: float) -> int:
        if not self._steps or not stall:
            return FIRST_SAVE
        return auto_interval(self._seconds / self._steps, stall, self._machines, self._faults)
