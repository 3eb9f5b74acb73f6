"""A rank's line to its parent: a thread that beats, carries messages out, and brings orders in.

The training thread only assigns attributes and appends to a queue. The thread here does all the talking, so that it
goes on while the rank waits in a collective. What it cannot tell apart is a rank at work and one in an endless loop:
that is the parent's judgement, from how long an activity lasts.

Ranks never outlive their parent: where the store is gone, or the parent orders the end, the process leaves at once.
"""

import faulthandler
import json
import mmap
import os
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from headrace.launch import wire
from headrace.launch.store import TCPStore
from headrace.launch.wire import Beat, Mood

FLUSH_SECONDS = 10.0


class Heartbeat:
    """Beats for `rank` on `store` until `close`; `slate` is a file that shows the activity to this machine."""

    def __init__(self, store: TCPStore, rank: int, slate: Path | None) -> None:
        self._store, self._rank = store, rank
        self._slate = _map(slate) if slate else None
        self._outbox: deque[str] = deque()
        self._wake, self._closing = threading.Event(), False
        self._count, self._busy = 0, 0.0
        self.activity = ("starting", time.monotonic(), Mood.PATIENT)
        self.stop: str | None = None  # why the parent wants this rank to stop
        self.mark("starting", Mood.PATIENT)
        store.set(wire.pid_key(rank), str(os.getpid()))
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def mark(self, label: str, mood: Mood) -> None:
        """What the rank does from now on. Costs about a microsecond."""
        now = time.monotonic()
        _, since, before = self.activity
        if before is not Mood.WAITING:
            self._busy += now - since
        self.activity = (label, now, mood)
        if self._slate is not None:
            self._slate[:] = label.encode()[: wire.SLATE_BYTES].ljust(wire.SLATE_BYTES)

    def busy_seconds(self) -> float:
        """Seconds since the beginning that were not spent waiting for another rank; called by who calls `mark`."""
        _, since, mood = self.activity
        return self._busy + (0.0 if mood is Mood.WAITING else time.monotonic() - since)

    def tell(self, kind: str, payload: Any) -> None:
        """Send JSON to the parent, in order, without waiting."""
        self._outbox.append(wire.message(self._rank, kind, payload))
        self._wake.set()

    def close(self) -> None:
        """Send what is left and end the thread, within `FLUSH_SECONDS`."""
        self._closing = True
        self._wake.set()
        self._thread.join(FLUSH_SECONDS)

    def _run(self) -> None:
        due = 0.0
        try:
            while True:
                closing = self._closing  # read before sending: what was told before `close` is sent
                while self._outbox:
                    self._store.queue_push(wire.MESSAGES, self._outbox.popleft())
                if closing:
                    return self._beat()
                if time.monotonic() >= due:
                    due = time.monotonic() + wire.BEAT_SECONDS
                    self._beat()
                self._wake.wait(max(0.0, due - time.monotonic()))
                self._wake.clear()
        except (RuntimeError, OSError) as error:  # torch's errors of the network and the store are RuntimeErrors
            self._leave(f"the parent is gone: {error}")

    def _beat(self) -> None:
        label, since, mood = self.activity
        self._count += 1
        beat = Beat(self._count, label, time.monotonic() - since, mood)
        self._store.set(wire.beat_key(self._rank), json.dumps(beat))
        orders = json.loads(self._store.get(wire.ORDERS))
        self.stop = orders["stop"]
        if orders["end"]:
            self._leave("the parent ends all ranks")

    def _leave(self, why: str) -> None:
        print(f"rank {self._rank} leaves: {why}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr)
        os._exit(1)


def _map(path: Path) -> mmap.mmap:
    with path.open("w+b") as file:
        file.truncate(wire.SLATE_BYTES)
        return mmap.mmap(file.fileno(), wire.SLATE_BYTES)
