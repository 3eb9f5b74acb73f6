"""One holder per run directory: a lease with a heartbeat.

Killing Snakemake leaves its jobs alive, and running the same command again starts a second copy. The lease makes the
second copy wait for the first. It is a small JSON file whose modification time is the heartbeat; it is stale when its
holder is dead (same host) or its heartbeat is old (another host), and then taken over. Taking and taking over happen
under an exclusive file lock, so that two copies never both believe they hold it; a holder that finds its lease gone
stops at once.
"""

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from headrace.artifacts.files import write_atomic

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
LOST_LEASE_EXIT = 1


@dataclass(frozen=True)
class Holder:
    """Who holds a lease. `started` is the process' start in clock ticks since boot: pids are used again."""

    token: str
    host: str
    pid: int
    started: int


class Lease:
    """The lease of one folder: `try_acquire`, then hold it as a context."""

    def __init__(self, folder: Path, name: str = "lease", stale_seconds: float = STALE_SECONDS) -> None:
        self._path = folder / f"{name}.json"
        self._guard = folder / f".{name}.lock"
        self._stale_seconds = stale_seconds
        self._me = Holder(uuid.uuid4().hex, _this_host(), os.getpid(), _process_start(os.getpid()) or 0)
        self._stop = threading.Event()

    def try_acquire(self) -> Holder | None:
        """Take the lease, also from a dead holder; returns the live holder where there is one, else None."""
        with self._guarded():
            holder = self._read()
            if holder and not self._is_stale(holder):
                return holder
            write_atomic(self._path, json.dumps(asdict(self._me)).encode())
        threading.Thread(target=self._beat, name="lease-heartbeat", daemon=True).start()
        return None

    def release(self) -> None:
        """Give the lease up, if it is still ours."""
        self._stop.set()
        with self._guarded():
            if self._read() == self._me:
                self._path.unlink()

    def _beat(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                with self._guarded():
                    if self._stop.is_set():
                        return
                    if self._read() != self._me:
                        # Somebody took us for dead: two writers in one folder are worse than a lost attempt.
                        _stop_now(b"headrace: the lease of this run was taken over; stopping\n")
                    os.utime(self._path)
                last = time.monotonic()
            except OSError:
                # A network file system may fail for a while; past the limit others take us for dead.
                if time.monotonic() - last > self._stale_seconds:
                    _stop_now(b"headrace: the heartbeat of this run cannot be written; stopping\n")

    def _is_stale(self, holder: Holder) -> bool:
        if holder.host == self._me.host:
            return _process_start(holder.pid) != holder.started
        return time.time() - self._path.stat().st_mtime > self._stale_seconds

    def _read(self) -> Holder | None:
        try:
            return Holder(**json.loads(self._path.read_bytes()))
        except FileNotFoundError:
            return None

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        with self._guard.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _stop_now(message: bytes) -> None:
    os.write(2, message)
    os._exit(LOST_LEASE_EXIT)


def _this_host() -> str:
    """Host name and process namespace: containers may share the one and not the other."""
    return f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"


def _process_start(pid: int) -> int | None:
    """Start time of a live process in clock ticks since boot; None where it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])
