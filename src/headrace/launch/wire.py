"""What a parent and its ranks say to each other: keys and JSON in one store of the parent (`launch.store`).

Without torch: every stage program explains failures of ranks, few have any.
"""

import dataclasses
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

BEAT_SECONDS = 0.5
PATIENCE_SECONDS = 1800.0
"""How long one activity may take that is marked as one that takes long."""
STOPPED = 75
"""Exit code of a rank that saved and stopped because it was asked to."""

MESSAGES = "messages"  # a queue: ranks push, the parent pops
ORDERS = "orders"  # what the parent wants of all ranks: {"stop": reason or null, "end": bool}
SLATE_BYTES = 256

_VARIABLE = "HEADRACE_RANKS"


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

    def log_of(self, rank: int) -> Path:
        """Where a rank's output and stacks go."""
        return Path(self.logs) / f"rank-{rank}.log"

    def slate_of(self, rank: int) -> Path | None:
        """A file of this machine that holds what a rank is at, up to date even after it was killed."""
        return Path(self.slates) / f"rank-{rank}" if self.slates else None


def message(rank: int, kind: str, payload: Any) -> str:
    """One entry of the queue, as JSON."""
    return json.dumps({"rank": rank, "kind": kind, "payload": payload})


def _loopback_interface() -> str:
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
