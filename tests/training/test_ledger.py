"""The ledger: durable, tolerant of torn lines and full disks; and its figures, on histories worked out by hand."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from headrace.training import ledger
from headrace.training.ledger import Ledger, figures, read


class Clock:
    """A monotonic clock that is set by hand, and starts anywhere."""

    def __init__(self, now: float = 5000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


TOKENS = 10  # of a step in these histories


def history(path: Path, *sittings: list[tuple[float, str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """What a ledger holds after events at given seconds of each sitting; tokens follow from steps."""
    for number, events in enumerate(sittings):
        clock = Clock(1000.0 * number)
        book = Ledger(path, clock)
        for seconds, event, facts in events:
            book.attempt += event == "attempt"
            clock.now = 1000.0 * number + seconds
            tokens = {"tokens": TOKENS * facts["step"]} if "step" in facts else {}
            assert book.write(event, {**tokens, **facts})
    return read(path)


def test_entries_say_who_wrote_them_and_when(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    entries = history(
        path,
        [(0.5, "attempt", {"ranks": 2}), (2, "save", {"step": 3, "stall": 0.25})],
        [(1, "attempt", {"ranks": 1})],
    )
    keys = ("sitting", "attempt", "event", "clock")
    assert [tuple(entry[key] for key in keys) for entry in entries] == [
        (1, 1, "attempt", 0.5),
        (1, 1, "save", 2.0),
        (2, 2, "attempt", 1.0),
    ]
    assert entries[1]["step"] == 3 and entries[1]["stall"] == 0.25


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_last_line_costs_that_line_only(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "ledger.jsonl"
    history(path, [(0, "attempt", {}), (1, "save", {"step": 1}), (2, "save", {"step": 2})])
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert [entry.get("step") for entry in read(path)] == [None, 1] + ([2] if cut == 1 else [])
    Ledger(path).write("finished", {})
    assert [entry["event"] for entry in read(path)][-1] == "finished"
    assert len(read(path)) == (4 if cut == 1 else 3)


def test_numbers_that_json_cannot_hold_become_text(tmp_path: Path) -> None:
    book = Ledger(tmp_path / "ledger.jsonl")
    assert book.write("skipped", {"loss": float("nan"), "parts": [float("inf"), 1.5]})
    [entry] = read(tmp_path / "ledger.jsonl")
    assert (entry["loss"], entry["parts"]) == ("nan", ["inf", 1.5])


def test_a_full_disk_delays_entries_and_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book, real = Ledger(tmp_path / "ledger.jsonl"), os.write

    def refuse(file: int, data: bytes) -> int:
        if len(data) > 20:
            return real(file, data[:20])
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "write", refuse)
    assert not book.write("save", {"step": 1})
    assert not book.write("save", {"step": 2})
    monkeypatch.undo()
    assert book.write("finished", {"step": 3})
    assert [entry["step"] for entry in read(tmp_path / "ledger.jsonl")] == [1, 2, 3]
    assert all(json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines())


def test_each_entry_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    book = Ledger(tmp_path / "ledger.jsonl")
    book.write("save", {})
    book.write("save", {})
    assert len(synced) == 2


def test_an_undisturbed_run(tmp_path: Path) -> None:
    entries = history(
        tmp_path / "l",
        [
            (0, "attempt", {}),
            (4, "resumed", {"step": 0, "load": 1.0}),
            (25, "save", {"step": 20, "stall": 1.0, "reached": 24}),
            (46, "finished", {"step": 40}),
        ],
    )
    found = figures(entries)
    assert found["productive_seconds"] == pytest.approx(20 + 21)
    assert found["wall_seconds"] == 46
    assert found["goodput"] == 1.0
    assert found["stall_seconds"] == 1.0
    assert (found["attempts"], found["sittings"], found["saves"], found["restarts"]) == (1, 1, 1, 0)
    assert found["mttr"] is None


def test_a_fault_costs_the_steps_since_the_save_and_the_recovery(tmp_path: Path) -> None:
    parts = {"detect": 1.0, "restart": 3.0, "load": 1.0, "replay": 10.0}
    entries = history(
        tmp_path / "l",
        [
            (0, "attempt", {}),
            (4, "resumed", {"step": 0, "load": 1.0}),
            (24, "save", {"step": 20, "stall": 0.0}),
            (35, "failure", {"step": 30, "rank": 1, "cause": "killed", "what": "was killed"}),
            (36, "attempt", {}),
            (39, "resumed", {"step": 20, "load": 1.0}),
            (49, "restart", {"step": 30, **parts}),
            (59, "finished", {"step": 40}),
        ],
    )
    found = figures(entries)
    assert found["productive_seconds"] == pytest.approx(20 + 20)  # 0 to 20 once, 20 to 40 by the second attempt
    assert found["ettr"] == pytest.approx(40 / 59)
    assert found["tokens_computed"] == TOKENS * (30 + 20)
    assert found["goodput"] == pytest.approx(40 / 50)
    assert found["mttr"] == {**parts, "total": 15.0}
    assert found["failures"] == [{"step": 30, "rank": 1, "cause": "killed", "what": "was killed"}]


def test_a_save_that_turned_out_damaged_is_no_progress(tmp_path: Path) -> None:
    entries = history(
        tmp_path / "l",
        [
            (0, "attempt", {}),
            (0, "resumed", {"step": 0, "load": 0.0}),
            (10, "save", {"step": 10, "stall": 0.0}),
            (30, "save", {"step": 30, "stall": 0.0}),
            (31, "attempt", {}),
            (32, "resumed", {"step": 20, "load": 0.0}),  # whose own mark is missing: half of 10 to 30
            (42, "finished", {"step": 30}),
        ],
    )
    found = figures(entries)
    assert found["productive_seconds"] == pytest.approx(10 + 10 + 10)
    assert found["goodput"] == pytest.approx(30 / 40)


def test_steps_that_were_not_applied_reach_no_weights(tmp_path: Path) -> None:
    entries = history(
        tmp_path / "l",
        [
            (0, "attempt", {}),
            (0, "resumed", {"step": 0, "load": 0.0}),
            (5, "skipped", {"step": 5, "step_tokens": TOKENS}),
            (8, "save", {"step": 8, "stall": 0.0}),
            (9, "skipped", {"step": 9, "step_tokens": TOKENS}),
            (10, "rollback", {"step": 10, "to": 8, "to_tokens": 8 * TOKENS}),
            (22, "finished", {"step": 20}),
        ],
    )
    found = figures(entries)
    assert found["tokens_computed"] == TOKENS * (10 + 12)
    assert found["tokens_useful"] == TOKENS * (20 - 1)
    assert found["productive_seconds"] == pytest.approx(8 + 12)
    assert (found["skipped_steps"], found["rollbacks"]) == (2, 1)


def test_time_between_two_processes_of_the_stage_does_not_count(tmp_path: Path) -> None:
    entries = history(
        tmp_path / "l",
        [(0, "attempt", {}), (2, "resumed", {"step": 0, "load": 0.0}), (12, "save", {"step": 10, "stall": 0.0})],
        [(0, "attempt", {}), (3, "resumed", {"step": 10, "load": 0.0}), (13, "finished", {"step": 20})],
    )
    found = figures(entries)
    assert found["wall_seconds"] == 12 + 13
    assert found["ettr"] == pytest.approx(20 / 25)
    assert found["sittings"] == found["attempts"] == 2


def test_nothing_happened_yet(tmp_path: Path) -> None:
    found = figures(read(tmp_path / ledger.NAME))
    assert found["ettr"] is None and found["goodput"] is None
