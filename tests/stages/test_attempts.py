"""The guard against attempts that lead nowhere."""

from pathlib import Path

from headrace.stages.attempts import Ledger


def attempt(ledger: Ledger, progress: int, code: int | None) -> str | None:
    stuck = ledger.start(progress)
    if stuck is None and code is not None:
        ledger.end(code, "")
    return stuck


def test_three_attempts_without_progress_stop_the_fourth_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert [attempt(ledger, 7, code) for code in (75, None, 75)] == [None] * 3
    assert "without progress" in str(attempt(ledger, 7, 75))
    assert attempt(ledger, 7, 75) is None, "a person who runs it again starts afresh"


def test_progress_keeps_it_going(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert [attempt(ledger, progress, 75) for progress in (0, 0, 1, 1, 2, 2, 3, 3, 4)] == [None] * 9


def test_errors_are_no_reason_to_stop_a_person(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert [attempt(ledger, 0, code) for code in (2, 2, 1, 1, 75, 75, 2, 75, 75)] == [None] * 9


def test_a_line_cut_by_a_kill_is_passed_over(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    attempt(ledger, 0, 75)
    with (tmp_path / "attempts.jsonl").open("a") as file:
        file.write('{"event": "sta')
    assert len(ledger.entries()) == 2
    attempt(ledger, 1, 0)
    assert len(ledger.entries()) == 4, "what comes after the torn line is not lost with it"
