"""A stand-in for `headrace.training.on_rank`: ranks that take steps together, save nothing but a folder, have faults.

    python supervised_run.py <faults.json> <job.json>

faults.json: [{"step", "rank", "how", "once"}]; a fault with `once` happens in one attempt only. A step takes 10 ms.
"""

import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import distributed

from headrace.checkpoint.reader import checkpoint_folder, steps
from headrace.errors import UserError
from headrace.launch.deadline import StopRequested
from headrace.launch.rank import Rank, run_as_rank
from headrace.recipe.schedule import Schedule
from headrace.training.on_rank import EVENT, PROGRESS, STRETCH, Job, Stretch


def fail(how: str) -> None:
    if how == "raise":
        raise RuntimeError("shapes [2, 3] and [3, 2] disagree")
    if how == "user":
        raise UserError("recipe.tokens=3: give it more")
    if how in ("kill", "stop"):
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[how])
    time.sleep(2)  # "dawdle"


def due(faults: Path, step: int, rank: int) -> str | None:
    """The fault of this rank in this step; one that happens once is struck off."""
    for number, fault in enumerate(json.loads(faults.read_text())):
        struck = faults.with_name(f"struck-{number}")
        if (fault["step"], fault["rank"]) == (step, rank) and not struck.exists():
            if fault["once"]:
                struck.touch()
            return str(fault["how"])
    return None


def body(rank: Rank) -> None:
    faults, job = Path(sys.argv[1]), Job.read(Path(sys.argv[2]))
    first, folder, schedule = rank.rank == 0, job.place.checkpoints, Schedule(job.config.recipe)
    rank.connect(torch.device("cpu"))
    step = max(steps(folder), default=0)
    phase = next(phase for phase in schedule.phases if phase.name == job.place.phase)
    if first:
        rank.tell(EVENT, ["resumed", {"step": step, "load": 0.0}])
        (folder.parent / f"ran-{phase.name}-{rank.world}").touch()
    while step < phase.end:
        flag = torch.tensor(float(first and rank.asked_to_stop() is not None))
        distributed.broadcast(flag, 0)
        if flag:
            save(rank, folder, step)
            raise StopRequested(f"{rank.asked_to_stop() or 'rank 0'}, saved at step {step}")
        rank.doing(f"1F3 of step {step + 1}")
        if how := due(faults, step + 1, rank.rank):
            fail(how)
        time.sleep(0.01)
        rank.waiting(f"the gradients of step {step + 1}")
        distributed.barrier()
        step += 1
        if first:
            rank.tell(PROGRESS, [step, schedule.steps, schedule.tokens_after(step), {"loss": 1.0}])
        if step % job.config.checkpoint.interval == 0 or step == phase.end:
            save(rank, folder, step)
    if first:
        following = schedule.at(step).phase if step < schedule.steps else None
        summary = None if following else {"steps": step}
        rank.tell(STRETCH, asdict(Stretch(step, following, summary)))


def save(rank: Rank, folder: Path, step: int) -> None:
    if rank.rank == 0:
        checkpoint_folder(folder, step).mkdir(parents=True, exist_ok=True)
        rank.tell(EVENT, ["save", {"step": step, "stall": 0.0}])
    distributed.barrier()


if __name__ == "__main__":
    sys.exit(run_as_rank(body))
