"""What a parent and its ranks say to each other, and through what: keys and JSON in one `TCPStore` of the parent.

The store is also the rendezvous of torch.distributed. It has no password: whoever reaches its port can write to it. So
it listens on the loopback interface, unless ranks run on other nodes; then the network between them must be trusted,
as it must be for gloo and NCCL themselves.
"""

import dataclasses
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed import PrefixStore as PrefixStore  # type: ignore[attr-defined]  # exported all the same
from torch.distributed import TCPStore as TCPStore  # type: ignore[attr-defined]

from headrace.errors import UserError

BEAT_SECONDS = 0.5
PATIENCE_SECONDS = 1800.0
"""How long one activity may take that is marked as one that takes long."""
STOPPED = 75
"""Exit code of a rank that saved and stopped because it was asked to."""

MESSAGES = "messages"  # a queue: ranks push, the parent pops
ORDERS = "orders"  # what the parent wants of all ranks: {"stop": reason or null, "end": bool}
SLATE_BYTES = 256

_VARIABLE = "HEADRACE_RANKS"
_STORE_TIMEOUT = timedelta(seconds=60)


class Mood(StrEnum):
    """How an activity is judged when it lasts."""

    BUSY = "busy"  # moves on within `hang_seconds`
    WAITING = "waiting"  # for another rank, who is to blame when it lasts
    PATIENT = "patient"  # may take long: loading, saving, compiling


class Beat(NamedTuple):
    """One sign of life: its number, what the rank is at, for how many seconds, and how that is to be judged."""

    number: int
    label: str
    age: float
    mood: Mood

    @staticmethod
    def parse(text: bytes) -> "Beat":
        """The inverse of `json.dumps(beat)`."""
        number, label, age, mood = json.loads(text)
        return Beat(number, label, age, Mood(mood))


def beat_key(rank: int) -> str:
    """Where a rank's latest beat stands; empty before its first."""
    return f"beat/{rank}"


def pid_key(rank: int) -> str:
    """Where a rank's process id stands, from when it joined."""
    return f"pid/{rank}"


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of one parent meet: what each of them is told, in one environment variable."""

    host: str
    port: int
    world: int
    nodes: int
    start: str  # launch.start
    logs: str  # folder of the ranks' logs, the same on all nodes
    slates: str | None  # folder on this machine where ranks write what they are at; None with several nodes

    def environment(self) -> dict[str, str]:
        """The variables to start ranks with; gloo and NCCL keep to the loopback interface where all ranks are here."""
        found = {_VARIABLE: json.dumps(dataclasses.asdict(self)), "WORLD_SIZE": str(self.world)}
        if self.nodes == 1:
            found |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), _loopback_interface())
        return found

    @staticmethod
    def of(environment: Mapping[str, str] = os.environ) -> "Meeting":
        """What this process was started with."""
        assert _VARIABLE in environment, "this program is a rank: `headrace.launch.start` starts it"
        return Meeting(**json.loads(environment[_VARIABLE]))

    def connect(self) -> TCPStore:
        """A connection of its own: a blocking read on one does not hold up another."""
        return TCPStore(self.host, self.port, is_master=False, timeout=_STORE_TIMEOUT)

    def log_of(self, rank: int) -> Path:
        """Where a rank's output and stacks go."""
        return Path(self.logs) / f"rank-{rank}.log"

    def slate_of(self, rank: int) -> Path | None:
        """A file of this machine that holds what a rank is at, up to date even after it was killed."""
        return Path(self.slates) / f"rank-{rank}" if self.slates else None


def host_store(nodes: int) -> tuple[TCPStore, str]:
    """A store that listens on a port of the system's choice, and the address under which ranks reach it.

    Raises `UserError` where other nodes could not reach this host by its name.
    """
    host = "127.0.0.1" if nodes == 1 else socket.gethostbyname(socket.gethostname())
    if nodes > 1 and host.startswith("127."):
        raise UserError(
            f"launch.start=srun on {nodes} nodes: this host's name {socket.gethostname()} resolves to {host}, which "
            "other nodes cannot reach; give it its network address in /etc/hosts or DNS"
        )
    listener = socket.socket()
    listener.bind((host, 0))
    listener.listen(4096)
    port = listener.getsockname()[1]
    # By itself a TCPStore listens on every interface.
    store = TCPStore(
        host, port, is_master=True, wait_for_workers=False, timeout=_STORE_TIMEOUT, master_listen_fd=listener.detach()
    )
    return store, host


def message(rank: int, kind: str, payload: Any) -> str:
    """One entry of the queue, as JSON."""
    return json.dumps({"rank": rank, "kind": kind, "payload": payload})


def _loopback_interface() -> str:
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
