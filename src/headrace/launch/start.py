"""Starts the ranks of a layout, as processes of this machine, or through `srun` or `torchrun`.

    local     one process per rank, each the leader of a process group, so that what it starts ends with it
    srun      one `srun` inside the Slurm job that runs the parent, which spreads the ranks evenly over the job's nodes
    torchrun  one `torchrun` for the ranks of this machine; for several nodes, use srun

A command is a list of words; no shell reads it. How ranks are judged is supervisor.py's matter.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from headrace.errors import UserError
from headrace.launch import wire
from headrace.launch.store import TCPStore, host_store
from headrace.launch.wire import Meeting

STACK_SECONDS = 1.0
"""How long a rank gets to write down its stacks, after which it ends by itself."""
LAUNCHER_SECONDS = 3.0
"""How long srun or torchrun gets to leave by itself after its ranks were told to."""


class Ranks:
    """Started ranks: their store, their logs, and their processes (one per rank, or one launcher for all of them)."""

    def __init__(self, meeting: Meeting, store: TCPStore, processes: list[subprocess.Popen[bytes]]) -> None:
        self.meeting, self.store, self._processes = meeting, store, processes
        self._asked: str | None = None
        self._order(end=False)
        for rank in range(meeting.world):
            store.set(wire.beat_key(rank), "")

    @property
    def local(self) -> bool:
        """Whether each rank is a child process of this one."""
        return self.meeting.start == "local"

    def exit_codes(self) -> list[int | None]:
        """Of each process: None while it lives, negative for a signal."""
        return [process.poll() for process in self._processes]

    def ask_to_stop(self, reason: str) -> None:
        """Ask all ranks to save and stop."""
        if self._asked != reason:
            self._asked = reason
            self._order(end=False)

    def close(self, stacks: bool = False) -> None:
        """End whatever still runs, and everything that it started; before, with `stacks`, have it dump its stacks.

        Ranks on other nodes, or below a launcher, are told through the store; they dump their stacks as they leave.
        """
        live = [process for process in self._processes if process.poll() is None]
        if live and not self.local:
            self._order(end=True)
            _await(live, LAUNCHER_SECONDS)
            self._kill_ranks_of_torchrun()
        elif live and stacks:
            for process in live:
                process.send_signal(signal.SIGUSR1)
                process.send_signal(signal.SIGCONT)  # one that is stopped writes nothing
            _await(live, STACK_SECONDS)
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()

    def _kill_ranks_of_torchrun(self) -> None:
        """Where torchrun still waits for a rank that cannot leave: it gave it a session of its own."""
        if self.meeting.start != "torchrun" or self._processes[0].poll() is not None:
            return
        keys = [wire.pid_key(rank) for rank in range(self.meeting.world)]
        for key in keys:
            if self.store.check([key]):
                with suppress(ProcessLookupError):
                    os.kill(int(self.store.get(key)), signal.SIGKILL)

    def _order(self, end: bool) -> None:
        self.store.set(wire.ORDERS, json.dumps({"stop": self._asked, "end": end}))


@contextmanager
def started(
    program: Sequence[str],
    world: int,
    start: str,
    logs: Path,
    environment: Mapping[str, str] = os.environ,
) -> Iterator[Ranks]:
    """`world` ranks of `python <program>` (`-m`, module, arguments), ended when the block is left, however it is.

    `start` is `launch.start`; `logs` a folder that all nodes see, for one log per rank.
    Raises `UserError` where `world` does not fit the Slurm job, or srun is missing.
    """
    nodes = _nodes(start, world, environment)
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="headrace-") as slates:
        store, host = host_store(nodes)
        meeting = Meeting(host, store.port, world, nodes, start, str(logs), slates if nodes == 1 else None)
        processes: list[subprocess.Popen[bytes]] = []
        ranks = Ranks(meeting, store, processes)
        try:
            for command, extra, log in commands(program, meeting):
                processes.append(_start(command, {**environment, **meeting.environment(), **extra}, log))
            yield ranks
        finally:
            ranks.close()
            # Its port is free once nobody refers to it: not even the frames of an exception that somebody keeps.
            del ranks.store, store


def commands(program: Sequence[str], meeting: Meeting) -> list[tuple[list[str], dict[str, str], Path]]:
    """What to run: commands, their variables beside the meeting's, and the files for their output."""
    world, logs = meeting.world, Path(meeting.logs)
    if meeting.start == "local":
        seats = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
        command = [sys.executable, "-m", "headrace.launch.child", str(os.getpid()), *program]
        return [(command, seat, meeting.log_of(rank)) for rank, seat in enumerate(seats)]
    if meeting.start == "srun":
        command = [
            "srun",
            f"--nodes={meeting.nodes}",
            f"--ntasks={world}",
            f"--ntasks-per-node={world // meeting.nodes}",
            "--distribution=block",  # consecutive ranks share a node, as parallel/mesh.py counts them
            "--cpu-bind=none",  # each rank sees the job's cores of its node and takes its share
            "--kill-on-bad-exit=0",  # the supervisor ends the ranks, once it knows which one is to blame
            sys.executable,
            *program,
        ]
        return [(command, {}, logs / "srun.log")]
    command = [
        *(sys.executable, "-m", "torch.distributed.run"),
        "--nnodes=1",
        f"--nproc-per-node={world}",
        "--standalone",
        "--local-addr=127.0.0.1",
        "--max-restarts=0",
        *program,
    ]
    return [(command, {}, logs / "torchrun.log")]


def _nodes(start: str, world: int, environment: Mapping[str, str]) -> int:
    nodes = int(environment.get("SLURM_JOB_NUM_NODES", "1")) if start == "srun" else 1
    if world % nodes:
        raise UserError(
            f"launch.start=srun: {world} ranks do not spread evenly over the Slurm job's {nodes} nodes; change "
            "parallel.pipeline or parallel.data, or the nodes of the job"
        )
    return nodes


def _start(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    try:
        with log.open("ab") as output:
            return subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL, process_group=0
            )
    except FileNotFoundError:
        raise UserError(
            f"launch.start needs `{command[0]}`, which is not on the PATH; use launch.start=local on one machine"
        ) from None


def _await(processes: list[subprocess.Popen[bytes]], seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(process.poll() is None for process in processes):
        time.sleep(0.05)
