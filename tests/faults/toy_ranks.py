"""A program of ranks for test_wire.py: they meet, add up, and the last one dies in the middle of the next sum."""

import os
import signal
import sys

import torch
from torch import distributed

from headrace.launch.rank import Rank, run_as_rank


def body(rank: Rank) -> None:
    rank.connect(torch.device("cpu"))
    total = torch.ones(1)
    distributed.all_reduce(total)
    if rank.rank == 0:  # what the other one tells may die with it
        rank.tell("sum", total.item())
    distributed.barrier()
    if rank.rank == rank.world - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    rank.waiting("the sum of the dead")
    distributed.all_reduce(total)


if __name__ == "__main__":
    sys.exit(run_as_rank(body))
