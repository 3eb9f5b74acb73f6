"""A rank's own side: who it is, what it is at, what it tells its parent, and how it ends.

A program of ranks is a module whose last lines are

    if __name__ == "__main__":
        sys.exit(run_as_rank(body))

`body(rank)` opens torch.distributed with `rank.connect`, names each activity as it begins, and returns when the work is
done, or raises `StopRequested` once it has saved because `rank.asked_to_stop()` gave a reason. Any other exception is
reported to the parent with its traceback and activity, and the process leaves at once, so that ranks that wait for it
learn of it. Exit codes are those of stages: 0 done, 75 stopped as asked, 2 the user's mistake, 1 anything else.
"""

import faulthandler
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from headrace.errors import UserError
from headrace.launch.deadline import StopRequested
from headrace.launch.heartbeat import Heartbeat
from headrace.launch.store import PrefixStore, connect
from headrace.launch.wire import PATIENCE_SECONDS, STOPPED, Meeting, Mood

TIMEOUT = timedelta(seconds=2 * PATIENCE_SECONDS)
"""Of collectives: the supervisor ends a hang long before, and says more about it."""
_NUMBERS = {
    "local": ("RANK", "LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_LOCALID"),
    "torchrun": ("RANK", "LOCAL_RANK"),
}
_ANOTHER_LEFT = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|closed by peer|broken pipe|socket|timed out|timeout"
    r"|remote process|communicator was aborted",
    re.IGNORECASE,
)


class Rank:
    """One of `world` processes that train together; `local_rank` counts those of this machine, `ranks_here` of them."""

    def __init__(self, meeting: Meeting, rank: int, local_rank: int) -> None:
        self.rank, self.local_rank, self.world = rank, local_rank, meeting.world
        self.ranks_here = -(-meeting.world // meeting.nodes)
        self._meeting = meeting
        self._heart = Heartbeat(connect(meeting), rank, meeting.slate_of(rank))
        # The attribute itself, not a method around it: the executor marks every action.
        self._mark = self._heart.mark
        self._busy = Mood.BUSY

    @staticmethod
    def join(environment: Mapping[str, str] = os.environ) -> "Rank":
        """Find out who this process is and start to beat; from here its output goes to a log of its own."""
        meeting = Meeting.of(environment)
        rank, local_rank = (int(environment[name]) for name in _NUMBERS[meeting.start])
        if meeting.start != "local":  # a launcher mixes the output of all ranks
            _redirect_output(meeting, rank)
        faulthandler.enable()
        # And end, which is the signal's default: ranks must not train on while they are being ended.
        faulthandler.register(signal.SIGUSR1, chain=True)
        # Schedulers signal every process of a job; whether to save and stop is the parent's to say.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return Rank(meeting, rank, local_rank)

    def connect(self, device: torch.device, timeout: timedelta = TIMEOUT) -> torch.device:
        """Open torch.distributed with all ranks; returns this rank's device. NCCL on GPUs, one each, gloo on CPUs."""
        if device.type == "cuda":
            if torch.cuda.device_count() < self.ranks_here:
                raise UserError(
                    f"{self.ranks_here} ranks on this machine, but {torch.cuda.device_count()} GPUs: change "
                    "parallel.pipeline or parallel.data, or use launch.device=cpu"
                )
            device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(device)
        with self.patiently("connecting to the other ranks"):
            distributed.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=PrefixStore("torch", connect(self._meeting)),
                rank=self.rank,
                world_size=self.world,
                timeout=timeout,
                device_id=device if device.type == "cuda" else None,
            )
        return device

    def doing(self, label: str) -> None:
        """Say what is done from now on, e.g. `1B3 of step 17`: it must change within `launch.hang_seconds`.

        Within `patiently` it may take as long as that.
        """
        self._mark(label, self._busy)

    def waiting(self, label: str) -> None:
        """As `doing`, for a wait for another rank: e.g. `2RECV_F3 of step 5, for rank 0`."""
        self._mark(label, Mood.WAITING)

    @contextmanager
    def patiently(self, label: str) -> Iterator[None]:
        """Mark an activity that may take minutes. An exception leaves it standing, so that the report names it."""
        (before, _, mood), busy = self._heart.activity, self._busy
        self._busy = Mood.PATIENT
        self._mark(label, Mood.PATIENT)
        yield
        self._busy = busy
        self._mark(before, mood)

    def busy_seconds(self) -> float:
        """Seconds since it joined in which it did not wait for another rank, as far as its marks tell.

        What happens under a mark of `waiting` until the next `doing` counts as a wait, and a wait inside a collective
        that an activity of `doing` makes counts as work.
        """
        return self._heart.busy_seconds()

    def tell(self, kind: str, payload: Any) -> None:
        """Send JSON to the parent's `on_message`, in order and without waiting."""
        self._heart.tell("told", [kind, payload])

    def asked_to_stop(self) -> str | None:
        """Why the parent wants all ranks to save and stop, or None.

        Ranks learn of it up to a second apart: let one rank read it and share the answer, so that all stop at one step.
        """
        return self._heart.stop

    def leave(self, stopped: str | None = None) -> None:
        """Report a good end once every rank has come to one."""
        if distributed.is_initialized():
            self.waiting("the end of all ranks")
            distributed.barrier()
            distributed.destroy_process_group()
        self.doing("leaving")
        self._heart.tell("ended", {"well": True, "stopped": stopped})
        self._heart.close()

    def report(self, error: BaseException) -> None:
        """Tell the parent what ended this rank, and during what."""
        facts = {
            "well": False,
            "activity": self._heart.activity[0],
            "type": type(error).__name__,
            "text": _text(error),
            "traceback": "".join(traceback.format_exception(error)),
            "user": isinstance(error, UserError),
            "another_left": another_left(error),
            "at": time.time(),
        }
        self._heart.tell("ended", facts)
        self._heart.close()


def _text(error: BaseException) -> str:
    """What an exception says, with the cause where Python names none."""
    text = str(error)
    if text == "can't start new thread":
        text += ": no memory is left, or no process (see `ulimit -v -u`)"
    return text


def run_as_rank(body: Callable[[Rank], None]) -> int:
    """Join, run `body`, report how it ended; returns the exit code, or leaves the process where `body` failed."""
    rank = Rank.join()
    try:
        try:
            body(rank)
            rank.leave()
            return 0
        except StopRequested as stop:
            rank.leave(stopped=str(stop))
            return STOPPED
    except BaseException as error:
        traceback.print_exception(error)
        rank.report(error)
        sys.stdout.flush()
        sys.stderr.flush()
        # Not by way of the interpreter's end: threads that wait in a collective would hold it up.
        os._exit(2 if isinstance(error, UserError) else 1)


def another_left(error: BaseException | None) -> bool:
    """Whether `error`, or what caused it, says that another rank closed a connection or did not answer."""
    while error:
        if isinstance(error, ConnectionError | distributed.DistError):
            return True
        if type(error) is RuntimeError and _ANOTHER_LEFT.search(str(error)):  # gloo's own
            return True
        error = error.__cause__ or error.__context__
    return False


def _redirect_output(meeting: Meeting, rank: int) -> None:
    with meeting.log_of(rank).open("ab") as log:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())
