"""The JSONL survives a full disk, torn lines and repeated steps."""

import errno
import json
import os

from headrace.tracking.journal import Journal, read_history, read_lines


def test_lines_are_on_disk_at_once_and_strict_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    journal = Journal(path)
    journal.write(1, 10.0, {"loss": 2.5, "count": 3, "bad": float("nan"), "worse": float("-inf")})
    line = json.loads(path.read_text(), parse_constant=lambda word: (_ for _ in ()).throw(AssertionError(word)))
    assert line == {"step": 1, "time": 10.0, "loss": 2.5, "count": 3, "bad": "NaN", "worse": "-Infinity"}
    assert float(line["worse"]) == float("-inf")
    journal.close()


def test_a_torn_line_costs_only_itself(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "time": 0, "loss": 4.0}\n{"step": 2, "ti')
    journal = Journal(path)
    journal.write(3, 0.0, {"loss": 3.0})
    journal.close()
    assert [(row["step"], row["loss"]) for row in read_history(path)] == [(1, 4.0), (3, 3.0)]


def test_reading_goes_on_from_an_offset_and_leaves_unfinished_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "time": 0}\n{"step": 2, "time": 0}\n{"step": 3')
    first = list(read_lines(path))
    assert [item["step"] for _, item in first] == [1, 2]
    with path.open("ab") as file:
        file.write(b', "time": 0}\n')
    assert [item["step"] for _, item in read_lines(path, first[-1][0])] == [3]


def test_steps_that_are_repeated_after_a_stop_count_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    journal = Journal(path)
    for step, loss in [(1, 5.0), (2, 4.0), (3, 3.0), (2, 4.1), (3, 3.1), (4, 2.1)]:
        journal.write(step, 0.0, {"loss": loss})
    journal.write(4, 0.0, {"validation": 1.0})
    journal.close()
    assert [row["loss"] for row in read_history(path)] == [5.0, 4.1, 3.1, 2.1]
    assert read_history(path)[-1]["validation"] == 1.0


def test_what_a_full_disk_refused_is_written_later_without_tearing(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    journal = Journal(path)
    room, real_write = [20], os.write

    def small_disk(file, data):
        if room[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = real_write(file, data[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", small_disk)
    refused = 0
    for step in range(5):
        try:
            journal.write(step, 0.0, {"loss": float(step)})
        except OSError:
            refused += 1
    assert refused == 5 and path.stat().st_size == 20
    room[0] = 10_000
    journal.flush()
    journal.close()
    assert [row["loss"] for row in read_history(path)] == [0.0, 1.0, 2.0, 3.0, 4.0]
