"""A program of ranks for test_supervisor.py: `python supervised.py <case>` is one rank of that case."""

import atexit
import os
import signal
import sys
import time
from datetime import timedelta

import psutil
import torch
from torch import distributed

from headrace.errors import UserError
from headrace.launch.deadline import StopRequested
from headrace.launch.rank import Rank, run_as_rank

CPU = torch.device("cpu")


def sums(rank: Rank) -> None:
    """Sum over all ranks, 40 times; rank 0 also tells on which addresses any of the processes listens."""
    rank.connect(CPU)
    if rank.rank == 0:
        parent = psutil.Process(os.getppid())
        family = [parent, *parent.children()]
        found = {c.laddr.ip for p in family for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
        rank.tell("addresses", sorted(found))
    for step in range(40):
        rank.doing(f"sum {step}")
        total = torch.tensor([float(rank.rank + step)])
        distributed.all_reduce(total)
        rank.tell("sum", {"step": step, "total": total.item()})


def pair(rank: Rank) -> None:
    """Rank 1 ends in the way that the second argument names, in its 4th action; rank 0 waits for its messages."""
    rank.connect(CPU)
    got = torch.zeros(1)
    for step in range(8):
        if rank.rank == 0:
            rank.waiting(f"0RECV_F{step} of step 5")
            distributed.recv(got, 1)
            print(f"received {step}", flush=True)
        else:
            rank.doing(f"1F{step} of step 5")
            if step == 3:
                rank.tell("now", [time.time(), os.getpid()])
                time.sleep(0.1)
                ENDS[sys.argv[2]]()
            distributed.send(got, 0)


def loop() -> None:
    while True:
        pass


def raise_chained() -> None:
    try:
        raise ValueError("shapes [2, 3] and [3, 2] disagree")
    except ValueError as error:
        raise RuntimeError("microbatch 3\nis broken") from error


def user_error() -> None:
    raise UserError("recipe.tokens=3: give it more")


ENDS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "loop": loop,
    "raise": raise_chained,
    "user": user_error,
}


def ring(rank: Rank) -> None:
    """The last rank dies inside a collective of all ranks."""
    rank.connect(CPU)
    for step in range(4):
        rank.waiting(f"0REDUCE_GRAD of step {step}")
        if step == 3 and rank.rank == rank.world - 1:
            rank.tell("now", [time.time(), os.getpid()])
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)
        distributed.all_reduce(torch.ones(1 << 16))


def deadlock(rank: Rank) -> None:
    """Each rank waits for the other; rank 1 began first."""
    rank.connect(CPU)
    rank.tell("now", [time.time(), os.getpid()])
    time.sleep(0.6 * (1 - rank.rank))
    rank.waiting(f"{rank.rank}RECV_B0 of step 0")
    distributed.recv(torch.zeros(1), 1 - rank.rank)


def patience(rank: Rank) -> None:
    """Rank 1 saves for longer than `hang_seconds`, as does an action within, while rank 0 waits for it."""
    rank.connect(CPU)
    if rank.rank == 1:
        with rank.patiently("saving"):
            time.sleep(1.6)
            rank.doing("the first action of its shape")
            time.sleep(1.6)
    rank.waiting("rank 1's checkpoint")
    distributed.barrier()


def polite(rank: Rank) -> None:
    """Train until asked to stop; all agree on the step."""
    rank.connect(CPU)
    for step in range(10_000):
        rank.doing(f"step {step}")
        flag = torch.tensor(float(rank.rank == 0 and rank.asked_to_stop() is not None))
        distributed.broadcast(flag, 0)
        if flag:
            raise StopRequested(f"{rank.asked_to_stop() or 'rank 0'}, saved at step {step}")
        rank.tell("step", step)
        time.sleep(0.05)


def linger(rank: Rank) -> None:
    """Do all, and then rank 1 does not end."""
    rank.connect(CPU)
    if rank.rank == 1:
        atexit.register(time.sleep, 60)


def forever(rank: Rank) -> None:
    rank.connect(CPU, timedelta(seconds=60))
    rank.tell("pid", os.getpid())
    loop()


if __name__ == "__main__":
    case = {f.__name__: f for f in (sums, pair, ring, deadlock, patience, polite, linger, forever)}[sys.argv[1]]
    sys.exit(run_as_rank(case))
