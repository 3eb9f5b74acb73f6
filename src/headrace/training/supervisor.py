"""Trains a run to its end through whatever happens to its ranks: attempts, one after the other, and their ledger.

An attempt is one set of ranks (or, for a layout of one, this process) that takes up the newest good checkpoint and
trains. Each has a rendezvous of its own: a new store on a new port, so nothing of the last one is in its way. It ends

    finished        with the last step of the recipe
    with a phase    the next phase of the recipe, and with it the next attempt, may have another layout and model
    stopped         the deadline or SIGTERM: all is saved, the stage exits with 75
    with a fault    a rank died, hung or failed: all are ended, named in log and ledger, and the next attempt begins

No further attempt is made where the same step failed `SAME_STEP` times (what comes after such a step counts as
progress, and starts the count anew), or `WITHOUT_SAVING` attempts brought no new checkpoint; nor after the user's
mistake or a divergence, which would be the same again. In one process an exception is the stage's; its next run goes
on.

Two things it does not do: it does not choose the checkpoint (the trainer does, by reading it), and it does not outlive
its own death. Ranks whose supervisor is gone leave at once; the next run of the stage takes over the stale lease and
goes on.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from headrace.checkpoint.reader import steps
from headrace.config.phases import layout_of
from headrace.config.schema import Config
from headrace.launch.blame import RankFailure
from headrace.launch.deadline import StopRequested
from headrace.launch.start import started
from headrace.launch.supervisor import OnMessage, supervise
from headrace.pipeline.engine import schedule_of
from headrace.planning.flops import training_flops
from headrace.recipe.model import model_in_phase
from headrace.recipe.schedule import Schedule
from headrace.training import ledger, on_rank
from headrace.training.ledger import Ledger
from headrace.training.on_rank import Job, Stretch, train
from headrace.training.policies import DivergenceError
from headrace.training.trainer import Watchers

SAME_STEP = 3
WITHOUT_SAVING = 10
RANKS = "ranks"
"""Folder of a run with the ranks' logs and their job."""
PROGRAM = ("-m", on_rank.__name__)
_REMEMBERED = 10_000  # steps whose time is known, for saves that are told of later


def train_supervised(job: Job, folder: Path, watchers: Watchers, program: Sequence[str] = PROGRAM) -> dict[str, Any]:
    """Train `job` to its end and write the artifact's files; returns `Trainer.summary`. `folder` is the run's.

    Raises `UserError`; `StopRequested` once the state is saved because the deadline said so; `DivergenceError`; and
    `RankFailure` with a diagnosis in one line where another attempt would lead nowhere.
    """
    account = Account(Ledger(folder / ledger.NAME), Schedule(job.config.recipe), watchers)
    try:
        summary = _Attempts(job, folder / RANKS, watchers, account, program).run()
    except (StopRequested, KeyboardInterrupt) as stop:
        account.event("stopped", {"reason": str(stop) or "interrupted"})
        raise
    except BaseException as error:
        account.event("gave_up", {"why": f"{type(error).__name__}: {error}"})
        raise
    finally:
        watchers.progress.close()
    account.event("finished", {"step": account.step})
    return summary


def job_in_phase(job: Job, name: str) -> Job:
    """The job of one phase of the recipe, with its layout and model, and only the groups that ranks read."""
    config = job.config
    phase = next(phase for phase in Schedule(config.recipe).phases if phase.name == name)
    model = model_in_phase(config.model, phase)
    flops = training_flops(model, phase.sequence_length, mtp=bool(model.num_nextn_predict_layers))
    until = _last_alike(config, name)
    groups = {group: getattr(config, group) for group in on_rank.GROUPS}
    changed = cast(Config, SimpleNamespace(**groups | {"model": model, "parallel": layout_of(config.parallel, name)}))
    return replace(job, config=changed, place=replace(job.place, phase=name, until=until, flops_per_token=flops))


def _last_alike(config: Config, name: str) -> str:
    """The last of the phases from `name` on that have its model, length, layout and schedule: no new ranks for them."""
    phases = Schedule(config.recipe).phases
    first = next(phase for phase in phases if phase.name == name)
    last = name
    for phase in phases:
        if phase.first < first.first:
            continue
        if (phase.sequence_length, phase.rope_scaling) != (first.sequence_length, first.rope_scaling):
            break
        if layout_of(config.parallel, phase.name) != layout_of(config.parallel, name):
            break
        if schedule_of(config, phase.name)[0] != schedule_of(config, name)[0]:
            break
        last = phase.name
    return last


def phase_behind(checkpoints: Path, schedule: Schedule) -> str:
    """The phase that the newest checkpoint, good or not, leads into; the last one where all steps are done."""
    saved = max(steps(checkpoints), default=0)
    return schedule.at(saved).phase if saved < schedule.steps else schedule.phases[-1].name


class Faults:
    """How often which step failed: why there must be no further attempt, where there must not."""

    def __init__(self) -> None:
        self._failed, self._saved, self._fruitless = Counter[int](), -1, 0

    def add(self, step: int, saved: int) -> str | None:
        """An attempt ended by a fault with `step` steps done and `saved` of them in the newest checkpoint."""
        self._failed = Counter({at: count for at, count in self._failed.items() if at >= step})
        self._failed[step] += 1
        self._fruitless = self._fruitless + 1 if saved == self._saved else 1
        self._saved = saved
        if self._failed[step] == SAME_STEP:
            return f"step {step + 1} failed {SAME_STEP} times, so it would again"
        if self._fruitless == WITHOUT_SAVING:
            return f"{WITHOUT_SAVING} attempts in a row saved nothing beyond step {saved}; lower checkpoint.interval"
        return None


@dataclass
class _Recovery:
    """A fault that training has not made up for yet; times on the ledger's clock."""

    step: int  # steps done before it
    detect: float
    noticed: float
    resumed: float = 0.0
    load: float = 0.0


class Account:
    """A run's `Progress`: writes what is told into the ledger, with tokens and times, and shows it as `watchers` do."""

    def __init__(self, book: Ledger, schedule: Schedule, watchers: Watchers) -> None:
        self._book, self._schedule, self._watch = book, schedule, watchers
        self._done_at: dict[int, float] = {}  # when a step of this attempt was done, on the ledger's clock
        self._recovery: _Recovery | None = None
        self._ranks = 0
        self.step = 0
        """Steps done by the attempt that is at work."""

    def begin(self, step: int, phase: str, ranks: int) -> None:
        """An attempt begins, presumably after `step`."""
        self._book.attempt += 1
        self._done_at.clear()
        self.step, self._ranks = step, ranks
        self.event("attempt", {"phase": phase, "ranks": ranks})

    def update(self, step: int, steps: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """See `Progress`."""
        self.step, self._done_at[step] = step, self._book.clock()
        self._done_at.pop(step - _REMEMBERED, None)
        if self._recovery and step >= self._recovery.step:
            self._recovered()
        if self._book.idle() > ledger.PULSE_SECONDS:
            self.event("step_done", {"step": step})
        self._watch.progress.update(step, steps, tokens, metrics)

    def event(self, name: str, facts: Mapping[str, Any]) -> None:
        """Write an event down. A step that was done some time ago comes with that time."""
        entry, step = dict(facts), facts.get("step")
        if step is not None:
            entry.setdefault("tokens", self._schedule.tokens_after(step))
            if step < self.step and step in self._done_at:
                entry["reached"] = round(self._done_at[step], 3)
        if name == "skipped":
            entry["step_tokens"] = entry["tokens"] - self._schedule.tokens_after(facts["step"] - 1)
        if name == "rollback":
            entry["to_tokens"] = self._schedule.tokens_after(facts["to"])
        if not self._book.write(name, entry):
            self._watch.logger.warning("the ledger could not be written; its entries wait for space on the disk")
        if name == "resumed":
            self._resumed(facts["step"], facts["load"])

    def failed(self, failure: RankFailure, logs: Path) -> None:
        """An attempt ended by a fault."""
        verdict, hung = failure.verdict, failure.verdict.cause in ("hung", "lost")
        facts = {
            "step": self.step,
            "rank": verdict.rank,
            "cause": verdict.cause,
            "what": verdict.what,
            "detect": round(failure.seconds, 3),
            "stacks": [str(logs / f"rank-{rank}.log") for rank in range(self._ranks)] if hung else [],
        }
        self.event("failure", facts)
        # A fault on the way back is part of the same recovery.
        self._recovery = self._recovery or _Recovery(self.step, failure.seconds, self._book.clock())
        self._recovery.step = max(self._recovery.step, self.step)

    def close(self) -> None:
        """See `Progress`; the bar stays until the last attempt has ended."""

    def _resumed(self, step: int, load: float) -> None:
        self.step = step
        if self._recovery:
            self._recovery.resumed, self._recovery.load = self._book.clock(), load
            if step >= self._recovery.step:
                self._recovered()

    def _recovered(self) -> None:
        """Training is where it was before the fault."""
        past, self._recovery = self._recovery, None
        assert past is not None
        parts = {
            "detect": past.detect,
            "restart": past.resumed - past.load - past.noticed,
            "load": past.load,
            "replay": self._book.clock() - past.resumed,
        }
        self.event("restart", {"step": self.step, **{part: round(seconds, 3) for part, seconds in parts.items()}})


class _Attempts:
    """The loop."""

    def __init__(self, job: Job, logs: Path, watchers: Watchers, account: Account, program: Sequence[str]) -> None:
        self._job, self._logs, self._watch, self._account, self._program = job, logs, watchers, account, program
        self._schedule, self._faults = Schedule(job.config.recipe), Faults()

    def run(self) -> dict[str, Any]:
        """Attempts until all is trained; the trainer's summary."""
        phase = phase_behind(self._job.place.checkpoints, self._schedule)
        while True:
            if reason := self._watch.deadline.reason():
                raise StopRequested(f"{reason}, saved at step {self._saved()}")
            try:
                stretch = self._attempt(job_in_phase(self._job, phase))
            except RankFailure as failure:
                self._judge(failure)
                phase = phase_behind(self._job.place.checkpoints, self._schedule)
                continue
            if stretch.next_phase is None:
                assert stretch.summary is not None
                return stretch.summary
            assert stretch.next_phase != phase, f"{phase} ended after step {stretch.step} without an end"
            phase = stretch.next_phase

    def _attempt(self, job: Job) -> Stretch:
        world = job.config.parallel.pipeline * job.config.parallel.data
        self._account.begin(self._saved(), job.place.phase, world)
        if world == 1:
            return train(job, replace(self._watch, progress=self._account, ledger=self._account.event))
        self._logs.mkdir(exist_ok=True)
        path = self._logs / "job.json"
        job.write(path)
        said: list[Stretch] = []
        with started([*self._program, str(path)], world, job.config.launch.start, self._logs) as ranks:
            ended = supervise(ranks, self._told(said), self._watch.deadline, job.config.launch.hang_seconds)
        if ended.stopped:
            raise StopRequested(ended.stopped)
        return said[0]

    def _told(self, said: list[Stretch]) -> OnMessage:
        def on_message(rank: int, kind: str, payload: Any) -> None:
            if kind == on_rank.LOG:
                self._watch.logger.log(*payload)
            elif kind == on_rank.METRICS:
                self._watch.tracker.log(*payload)
            elif kind == on_rank.PROGRESS:
                self._account.update(*payload)
            elif kind == on_rank.EVENT:
                self._account.event(*payload)
            elif kind == on_rank.STRETCH:
                said.append(Stretch(**payload))

        return on_message

    def _judge(self, failure: RankFailure) -> None:
        """Write a fault down; raises where it must be the last."""
        self._account.failed(failure, self._logs)
        if failure.verdict.kind == DivergenceError.__name__:
            raise DivergenceError(str(failure)) from failure
        if why := self._faults.add(self._account.step, self._saved()):
            raise RankFailure(f"{why}: {failure}", failure.verdict, failure.seconds) from failure
        # As text: who keeps the exception keeps its frames, and with them the attempt's store and port.
        self._watch.logger.warning("%s; going on from the newest good checkpoint", str(failure))

    def _saved(self) -> int:
        """Steps in the newest checkpoint, good or not."""
        return max(steps(self._job.place.checkpoints), default=0)
