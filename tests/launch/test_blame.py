"""Who is to blame: made-up sights of ranks, with the cause and what follows from it in the same moment."""

import json
import signal
from pathlib import Path
from typing import Any

from headrace.launch.blame import Sight, Verdict, failures, stuck
from headrace.launch.wire import PATIENCE_SECONDS, Beat, Mood

NOW, HANG, SILENT = 1000.0, 25.0, 3.0


def sight(rank: int, label: str = "F", age: float = 0.1, mood: Mood = Mood.BUSY, **facts: Any) -> Sight:
    return Sight(rank, Beat(9, label, age, mood), **{"beat_at": NOW - 0.2, **facts})


def report(kind: str = "ValueError", another_left: bool = False, user: bool = False) -> dict[str, Any]:
    return {
        "well": False, "activity": "B", "type": kind, "text": "why", "traceback": "...",
        "user": user, "another_left": another_left,
    }  # fmt: skip


def test_the_killed_comes_before_exceptions_and_these_before_lost_connections() -> None:
    closed = sight(0, report=report("RuntimeError", another_left=True), report_at=NOW - 0.9, exit=1)
    own = sight(1, report=report(), report_at=NOW - 0.5, exit=1, exit_at=NOW - 0.4)
    killed = sight(2, "W", exit=-signal.SIGKILL, exit_at=NOW)
    aborted = sight(3, exit=-signal.SIGABRT, exit_at=NOW - 0.1)
    verdict = failures([closed, own, killed, aborted], NOW, SILENT)
    assert verdict == Verdict(2, "was killed by SIGKILL during W")
    verdict = failures([closed, own, aborted], NOW, SILENT)
    assert verdict == Verdict(1, "failed during B: ValueError: why", traceback="...")
    assert failures([closed, aborted], NOW, SILENT) == Verdict(3, "was killed by SIGABRT during F")
    verdict = failures([closed, sight(4)], NOW, SILENT)
    assert verdict is not None
    assert verdict.rank == 0


def test_the_earliest_of_equals_is_named() -> None:
    late, early = (sight(rank, report=report(), report_at=at) for rank, at in ((0, NOW), (1, NOW - 0.3)))
    verdict = failures([late, early], NOW, SILENT)
    assert verdict is not None
    assert verdict.rank == 1


def test_a_silent_rank_is_to_blame_for_connections_that_others_lost() -> None:
    closed = sight(0, report=report("RuntimeError", another_left=True), report_at=NOW)
    silent, lost = sight(1, beat_at=NOW - 4), sight(2, beat_at=NOW - 4.5, lost="srun ended with exit code 137")
    assert failures([closed, silent], NOW, SILENT) == Verdict(1, "gave no sign of life for 4 s during F")
    assert failures([closed, lost], NOW, SILENT) == Verdict(2, "was lost during F: srun ended with exit code 137")
    own = sight(3, report=report(), report_at=NOW)
    verdict = failures([closed, silent, lost, own], NOW, SILENT)
    assert verdict is not None
    assert verdict.rank == 3


def test_ends_without_a_report_and_users_mistakes() -> None:
    assert failures([sight(0, exit=9)], NOW, SILENT) == Verdict(
        0, "left with exit code 9 and without a report during F"
    )
    assert failures([sight(0, exit=0)], NOW, SILENT) == Verdict(
        0, "left with exit code 0 and without a report during F"
    )
    assert failures([sight(0, report=report(user=True), exit=2)], NOW, SILENT) == Verdict(0, "why", user=True)
    well = {"well": True, "stopped": None}
    assert failures([sight(0, report=well, exit=0), sight(1, report=well, exit=75)], NOW, SILENT) is None
    assert failures([sight(0, report=well, exit=-11)], NOW, SILENT) == Verdict(0, "was killed by SIGSEGV during F")


def test_a_text_of_many_lines_becomes_one_of_bounded_length() -> None:
    long = {**report(), "text": "first\nsecond " * 1000}
    verdict = failures([sight(0, report=long)], NOW, SILENT)
    assert verdict is not None
    assert "\n" not in verdict.what
    assert verdict.what.startswith("failed during B: ValueError: first second first")
    assert len(verdict.what) < 600


def judged(*sights: Sight, moved: float = NOW) -> str | None:
    verdict = stuck(sights, NOW, moved, HANG, SILENT)
    return verdict and f"{verdict.rank} {verdict.what}"


def test_the_oldest_activity_that_is_no_wait_is_named() -> None:
    waits = sight(0, "RECV", 40, Mood.WAITING)
    assert judged(waits, sight(1, "B", 26), sight(2, "W", 30), moved=NOW - 26) == "2 hung in W for 30 s"
    assert judged(waits, sight(1, "B", 24), moved=NOW - 24) is None


def test_a_wait_is_no_hang_while_any_rank_moves() -> None:
    long, longer = sight(0, "RECV", 40, Mood.WAITING), sight(1, "SUM", 41, Mood.WAITING)
    assert judged(long, longer, moved=NOW - 24) is None
    assert judged(long, longer, moved=NOW - 26) == "1 has waited for 41 s in SUM, and no rank moves"


def test_a_rank_without_beats_comes_before_those_that_wait_for_it() -> None:
    stopped = sight(1, "B", beat_at=NOW - 24.5)
    waits = sight(0, "RECV", 25, Mood.WAITING)
    assert judged(waits, stopped, moved=NOW - 25.1) == "1 gave no sign of life for 24 s during B"
    assert judged(waits, stopped, moved=NOW - 24) is None
    assert judged(sight(1, "saving", mood=Mood.PATIENT, beat_at=NOW - 26)) is not None


def test_patience_has_an_end() -> None:
    assert judged(sight(0, "saving", PATIENCE_SECONDS - 1, Mood.PATIENT)) is None
    assert judged(sight(0, "saving", PATIENCE_SECONDS + 1, Mood.PATIENT)) == "0 hung in saving for 1801 s"


def test_a_verdict_says_of_what_kind_the_trouble_is_and_since_when() -> None:
    def seen(verdict: Verdict | None) -> tuple[str, float, str | None]:
        assert verdict is not None
        return verdict.cause, verdict.began, verdict.kind

    killed = sight(0, exit=-signal.SIGKILL, exit_at=NOW - 0.4)
    assert seen(failures([killed], NOW, SILENT)) == ("killed", NOW - 0.4, None)
    failed = sight(0, report=report("DivergenceError"), report_at=NOW - 0.6)
    assert seen(failures([failed], NOW, SILENT)) == ("failed", NOW - 0.6, "DivergenceError")
    assert seen(failures([sight(0, exit=9, exit_at=NOW - 0.1)], NOW, SILENT)) == ("failed", NOW - 0.1, None)
    closed = sight(0, report=report("RuntimeError", another_left=True), report_at=NOW)
    assert seen(failures([closed, sight(1, beat_at=NOW - 4)], NOW, SILENT)) == ("lost", NOW - 4, None)
    hung = stuck([sight(0, "W", age=29.8, beat_at=NOW - 0.2)], NOW, NOW, HANG, SILENT)
    assert seen(hung) == ("hung", NOW - 30, None)


def test_the_slate_knows_the_very_last_activity(tmp_path: Path) -> None:
    slate = tmp_path / "slate"
    slate.write_bytes("1B3 of step 17 é".encode().ljust(256))
    assert sight(0, "an older one", slate=slate).activity == "1B3 of step 17 é"
    assert sight(0, "the beat's", slate=tmp_path / "none").activity == "the beat's"
    assert Sight(0).activity == "starting"


def test_beats_travel_as_json() -> None:
    beat = Beat(3, "1B3 of step 17", 0.5, Mood.WAITING)
    assert Beat.parse(json.dumps(beat).encode()) == beat
