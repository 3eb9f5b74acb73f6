"""`metrics.jsonl`: one JSON object per line, appended and flushed at once, never rewritten.

A line is {"step": ..., "time": seconds since 1970, metric: value, ...}. A metric that is not a finite number is written
as the string "NaN", "Infinity" or "-Infinity", which `float()` understands and strict JSON readers accept.
A disk that is full costs nothing but memory: what could not be written waits, up to a megabyte, and is written later,
from the very byte where it stopped. A run that is killed and goes on from a checkpoint logs some steps twice; the file
keeps both, and `read_history` takes the later.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_MAX_WAITING = 1 << 20  # bytes


class Journal:
    """An append-only file of metrics; `write` raises `OSError` when the disk refuses, and loses nothing by it."""

    def __init__(self, path: Path) -> None:
        self._waiting = b"\n" if _ends_torn(path) else b""
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def write(self, step: int, time: float, metrics: Mapping[str, float]) -> None:
        """Append one line. Values become Python floats (or ints)."""
        line = {"step": step, "time": round(time, 3)} | {name: _number(value) for name, value in metrics.items()}
        if len(self._waiting) < _MAX_WAITING:
            self._waiting += json.dumps(line, ensure_ascii=False).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Hand everything that waits to the operating system."""
        while self._waiting:
            written = os.write(self._file, self._waiting)
            self._waiting = self._waiting[written:]

    def close(self) -> None:
        """Close the file; what still waits is lost."""
        os.close(self._file)


def read_lines(path: Path, offset: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (offset behind it, object) of every complete line from byte `offset` on; torn lines are skipped."""
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return  # still being written
            offset += len(line)
            try:
                item = json.loads(line)
            except ValueError:
                continue  # torn by a crash
            if isinstance(item, dict) and isinstance(item.get("step"), int):
                yield offset, item


def read_history(path: Path) -> list[dict[str, Any]]:
    """The run's metrics, one row per step, in order of steps; what was logged later for a step replaces the earlier."""
    rows: dict[int, dict[str, Any]] = {}
    for _, item in read_lines(path):
        rows.setdefault(item["step"], {}).update(item)
    return [rows[step] for step in sorted(rows)]


def _number(value: float) -> float | int | str:
    if isinstance(value, int):
        return int(value)
    number = float(value)
    if math.isnan(number):
        return "NaN"
    return number if math.isfinite(number) else ("Infinity" if number > 0 else "-Infinity")


def _ends_torn(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
