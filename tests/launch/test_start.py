"""Commands that start ranks, as built lists; test_supervisor.py runs them (srun excepted)."""

import os
import sys
from pathlib import Path

import pytest

from headrace.errors import UserError
from headrace.launch.start import commands, started
from headrace.launch.wire import Meeting

pytestmark = pytest.mark.alone

PROGRAM = ["-m", "headrace.somewhere", "experiment=tiny", "paths.results=a b;c"]


def meeting(start: str, world: int = 8, nodes: int = 1) -> Meeting:
    return Meeting("127.0.0.1", 4711, world, nodes, start, "/run/ranks", "/tmp/slates" if nodes == 1 else None)


def test_local_starts_one_process_per_rank() -> None:
    built = commands(PROGRAM, meeting("local", world=2))
    assert [command for command, _, _ in built] == [
        [sys.executable, "-m", "headrace.launch.child", str(os.getpid()), *PROGRAM]
    ] * 2
    assert [extra for _, extra, _ in built] == [{"RANK": "0", "LOCAL_RANK": "0"}, {"RANK": "1", "LOCAL_RANK": "1"}]
    assert [log for _, _, log in built] == [Path("/run/ranks/rank-0.log"), Path("/run/ranks/rank-1.log")]


def test_srun_spreads_consecutive_ranks_over_the_nodes() -> None:
    [(command, extra, log)] = commands(PROGRAM, meeting("srun", world=8, nodes=2))
    assert command[0] == "srun"
    assert {"--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--distribution=block"} <= set(command)
    assert "--kill-on-bad-exit=0" in command
    assert command[command.index(sys.executable) :] == [sys.executable, *PROGRAM]
    assert (extra, log) == ({}, Path("/run/ranks/srun.log"))


def test_torchrun_never_restarts_by_itself() -> None:
    [(command, _, _)] = commands(PROGRAM, meeting("torchrun", world=4))
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert {"--nnodes=1", "--nproc-per-node=4", "--max-restarts=0"} <= set(command)
    assert command[-len(PROGRAM) :] == PROGRAM


def test_what_ranks_are_told_survives_the_environment() -> None:
    told = meeting("srun", nodes=2)
    assert Meeting.of(told.environment()) == told
    assert "GLOO_SOCKET_IFNAME" not in told.environment()
    assert meeting("local").environment()["GLOO_SOCKET_IFNAME"].startswith("lo")


def test_ranks_that_do_not_fit_the_job_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"8 ranks do not spread evenly over the Slurm job's 3 nodes"),
        started(PROGRAM, 8, "srun", tmp_path, {"SLURM_JOB_NUM_NODES": "3"}),
    ):
        pass


def test_a_missing_srun_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"`srun`, which is not on the PATH"),
        started(PROGRAM, 2, "srun", tmp_path, {"PATH": str(tmp_path)}),
    ):
        pass
