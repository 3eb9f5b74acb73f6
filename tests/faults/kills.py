"""SIGKILL at random moments: the plan of the kills, who dies, and how long it takes until the run trains again.

    fight = Fight(product, seed=1)
    fight.kill(range(13))      13 kills, then to the end; fewer where the run ends before
    fight.kills                what was done: victims, moments, seconds to the first step after each

Each kill is a pure function of the seed and its number: the victim (rank 0, rank 1, the stage's own process, or all
three at once), and the moment:

    training    up to two save intervals after the last kill was recovered from
    saving      while a save is under way (its unfinished folder is there)
    starting    while the run is recovering from the kill before

Who uses the product runs the same command again when its process was killed; so does this, and after nothing else.
After every recovery nothing may be left of what was before: no rank, and no port on which the stage still listens.
"""

import random
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import TypeVar

import psutil

from faults.product import Product, Stage, running, steps
from headrace.config.compose import load
from headrace.tracking.journal import read_lines

T = TypeVar("T")
VICTIMS = ("rank 0", "rank 1", "stage", "all")
WEIGHTS = (3, 3, 3, 1)
POLL_SECONDS = 0.02
ORPHAN_SECONDS = 10.0
"""How long ranks may outlive their killed parent: they learn of it at their next heartbeat."""


@dataclass(frozen=True)
class Kill:
    """One kill. `recovery` is in seconds, from the signal to the end of the next step; None where another kill came."""

    number: int
    victim: str
    moment: str
    step: int  # the last one logged before
    at: float  # seconds since 1970
    recovery: float | None = None


class _Finished(Exception):  # noqa: N818  an end, not an error
    """The run has ended, with all done."""


def planned(seed: int, number: int) -> tuple[str, str, float]:
    """Victim, moment, and a number from 0 to 1 that spreads the moment."""
    chance = random.Random(f"{seed}/{number}")
    victim = chance.choices(VICTIMS, WEIGHTS)[0]
    moments = ("training", "saving", "starting") if number else ("training", "saving")
    return victim, chance.choice(moments), chance.random()


class Fight:
    """Kills and reruns one run."""

    def __init__(self, product: Product, seed: int, interval_seconds: float = 2.0) -> None:
        self._product, self._seed, self._interval = product, seed, interval_seconds
        self.kills: list[Kill] = []
        self.reruns = 0
        self._stage: Stage | None = None
        self._killed_at: float | None = None
        self._old: dict[int, psutil.Process] = {}

    def kill(self, numbers: Iterable[int]) -> None:
        """Carry out the kills with these numbers, and let the run end."""
        self._stage = self._product.start()
        try:
            for number in numbers:
                self._carry_out(number)
            self._wait(lambda: None, seconds=600)
        except _Finished:
            self._note_recovery()
        finally:
            self._stage.end()

    def _carry_out(self, number: int) -> None:
        victim, moment, spread = planned(self._seed, number)
        if moment == "starting" and self.kills and self.kills[-1].moment != "starting":
            time.sleep(5 * spread)
        else:
            self._recover()
            if moment == "saving":
                self._wait(lambda: next(self._product.checkpoints.glob(".unfinished-*"), None), poll=0.0005)
                time.sleep(0.03 * spread)
            else:
                moment = "training"
                time.sleep(2 * self._interval * spread)
        self._strike(number, victim, moment)

    def _recover(self) -> None:
        """Wait until it trains again after the last kill, and a save was published since: kills must cost something."""
        self._wait(self._trained, poll=0.1)
        self._note_recovery()
        before = steps(self._product.checkpoints)
        self._wait(lambda: steps(self._product.checkpoints) - before or None)

    def _strike(self, number: int, victim: str, moment: str) -> None:
        assert self._stage is not None
        ranks = self._wait(lambda: found if len(found := self._stage.ranks()) == 2 else None)
        self._note_recovery()
        rows = self._stage.rows()
        assert self._stage.listens() <= 1, "rendezvous of before are still open"
        self._old, self._killed_at = ranks, time.time()
        processes = {"rank 0": [ranks[0]], "rank 1": [ranks[1]], "stage": [], "all": list(ranks.values())}[victim]
        for process in processes:
            _kill(process)
        if victim in ("stage", "all"):
            self._stage.process.kill()
            self._stage.process.wait()
        self.kills.append(Kill(number, victim, moment, rows[-1][1]["step"] if rows else 0, self._killed_at))

    def _trained(self) -> float | None:
        """When the first step was logged by ranks that were not there when the last kill came."""
        assert self._stage is not None
        began = self._new_since()
        # What ranks told before they died is logged a moment later.
        after = None if began is None else max(began, (self._killed_at or 0.0) + 0.5)
        rows = (row["time"] for _, row in self._stage.rows() if "loss" in row)
        return None if after is None else next((at for at in rows if at > after), None)

    def _new_since(self) -> float | None:
        """When the oldest rank of now was started; None while one of before is there."""
        assert self._stage is not None
        if self._killed_at is None:
            return 0.0
        now = self._stage.ranks()
        if len(now) < 2 or any(process in self._old.values() for process in now.values()):
            return None
        return min(process.create_time() for process in now.values())

    def _note_recovery(self) -> None:
        """Write down how long the last kill took to recover from, where it did, and look for what it left behind."""
        if self._killed_at is None or not self.kills or self.kills[-1].recovery is not None:
            return
        try:
            at = self._trained()
        except psutil.Error:
            return
        if at is None:
            return
        last = self.kills[-1] = replace(self.kills[-1], recovery=at - self._killed_at)
        until = self._killed_at + ORPHAN_SECONDS
        while orphans := [process for process in self._old.values() if process.is_running() and _alive(process)]:
            assert time.time() < until, f"{last}: {orphans} live on"
            time.sleep(POLL_SECONDS)

    def _wait(self, ask: Callable[[], T | None], seconds: float = 180, poll: float = POLL_SECONDS) -> T:
        """The first answer of `ask`; runs the stage again where its own process was killed."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            assert self._stage is not None
            code = self._stage.code
            try:
                found = ask()
            except psutil.NoSuchProcess:
                found = None
            if found is not None:
                return found
            if code == 0:
                raise _Finished
            if code is not None:
                self._run_again(code)
            time.sleep(poll)
        assert self._stage is not None
        raise AssertionError(f"nothing came within {seconds} s; the stage said:\n{self._stage.said[-4000:]}")

    def _run_again(self, code: int) -> None:
        assert self._stage is not None
        killed = bool(self.kills) and self.kills[-1].victim in ("stage", "all")
        said = self._stage.said
        assert killed and code == -9, f"the stage ended with {code} after {self.kills[-1:]}:\n{said[-4000:]}"
        self.reruns += 1
        self._stage = self._product.start()


def fought(product: Product, undisturbed: Product, seed: int, numbers: range) -> Fight:
    """A run to its end, with the kills of these numbers, or as many as it has time for."""
    fight = Fight(product, seed, interval_seconds(undisturbed))
    fight.kill(numbers)
    check_nothing_is_left(product)
    assert fight.kills, "the run ended before anything happened to it"
    lost, interval = lost_steps(product, fight.kills), load(product.words).checkpoint.interval
    assert interval != "auto"
    # A save that is cut down costs the interval before it, and what was trained while it was under way another at most:
    # the next save waits for it.
    assert max(lost) <= 2 * interval, list(zip(fight.kills, lost, strict=True))
    return fight


def lost_steps(product: Product, kills: Iterable[Kill]) -> list[int]:
    """By kill, steps that had been logged and were taken again."""
    resumed = [(event["time"], event["step"]) for event in product.events("resumed")]
    return [kill.step - next((step for at, step in resumed if at > kill.at), kill.step) for kill in kills]


def interval_seconds(product: Product) -> float:
    """Seconds between two saves of a finished run, in the median."""
    times = [row["time"] for _, row in read_lines(product.folder / "tracking" / "metrics.jsonl") if "loss" in row]
    saved = sorted(steps(product.checkpoints))
    return (saved[1] - saved[0]) * median(after - before for before, after in pairwise(times))


def check_nothing_is_left(product: Product, seconds: float = ORPHAN_SECONDS) -> None:
    """No rank of the run is alive, not even a stopped one."""
    until = time.monotonic() + seconds
    while left := running(str(product.folder)):
        assert time.monotonic() < until, f"still there: {left}"
        time.sleep(0.1)


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that at least so large a share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill()


def _alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
