"""The ledger of attempts of one run directory, and the guard against attempts that lead nowhere.

Exit 75 means "run me again", and a killed process is run again too; a stage that never gets further must not be run for
ever. When three attempts in a row started from the same progress and ended with 75 or by a kill, the next stops with
the reason. The stop is itself an entry, so that a person who has mended the cause starts afresh.
"""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

LIMIT = 3
RUN_AGAIN = 75


class Ledger:
    """`attempts.jsonl`: one line when an attempt starts and one when it ends; a start without an end was killed."""

    def __init__(self, folder: Path, name: str = "attempts") -> None:
        self._path = folder / f"{name}.jsonl"

    def start(self, progress: int) -> str | None:
        """Record an attempt that starts from `progress`; returns why it must not run, where it must not."""
        recent = self._unfinished_starts()[-LIMIT:]
        if len(recent) == LIMIT and all(start == progress for start in recent):
            reason = f"{LIMIT} attempts in a row ended without progress; see {self._path} and the log beside it"
            self._append({"event": "stopped", "reason": reason})
            return reason
        self._append({"event": "start", "progress": progress, "pid": os.getpid(), "host": socket.gethostname()})
        return None

    def end(self, code: int, reason: str) -> None:
        """Record how the attempt ended."""
        self._append({"event": "end", "exit": code, "reason": reason})

    def has_finished(self) -> bool:
        """Whether an attempt has ever come to its end: a result that is gone was then taken away by a person."""
        return any(entry.get("exit") == 0 for entry in self.entries())

    def entries(self) -> list[dict[str, Any]]:
        """All entries, oldest first; a line cut short by a kill is left out."""
        if not self._path.exists():
            return []
        found = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def _unfinished_starts(self) -> list[int]:
        """Where the latest attempts started that ended with 75 or a kill, since any other end or stop."""
        starts: list[int] = []
        for entry in self.entries():
            if entry["event"] == "start":
                starts.append(int(entry["progress"]))
            elif entry["event"] == "stopped" or entry["exit"] != RUN_AGAIN:
                starts.clear()
        return starts

    def _append(self, entry: dict[str, Any]) -> None:
        line = json.dumps({"time": round(time.time(), 3), **entry}, sort_keys=True) + "\n"
        torn = self._path.exists() and not self._path.read_bytes().endswith(b"\n")
        with self._path.open("a", encoding="utf-8") as file:
            file.write("\n" if torn else "")
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
