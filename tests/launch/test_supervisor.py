"""Supervised ranks: what they tell arrives in order, and whatever happens to one ends all, with its name."""

import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from headrace.errors import UserError
from headrace.launch import supervisor
from headrace.launch.blame import RankFailure
from headrace.launch.start import started
from headrace.launch.supervisor import Ended, ended_for_memory, supervise

pytestmark = pytest.mark.alone

PROGRAM = Path(__file__).with_name("supervised.py")
END_SECONDS = 5.0


@dataclass
class Watched:
    """Supervises a case, keeps what was told, and asks the ranks to stop once `stop_after` messages came."""

    logs: Path
    told: list[tuple[int, str, Any]] = field(default_factory=list)
    stop_after: int | None = None

    def reason(self) -> str | None:
        enough = self.stop_after is not None and len(self.told) >= self.stop_after
        return "SIGTERM" if enough else None

    def run(self, *words: str, world: int = 2, hang_seconds: float = 20, start: str = "local") -> Ended:
        with started([str(PROGRAM), *words], world, start, self.logs) as ranks:
            try:
                return supervise(ranks, lambda *message: self.told.append(message), self, hang_seconds)
            finally:
                assert psutil.Process().children(recursive=True) == []

    def fails(self, *words: str, **settings: Any) -> tuple[str, float]:
        """The failure's line, and how many seconds after the fault it came."""
        with pytest.raises(RankFailure) as caught:
            self.run(*words, **settings)
        line = str(caught.value)
        assert "\n" not in line
        assert line.endswith(f"; all ranks were stopped, logs in {self.logs}")
        at = [payload[0] for _, kind, payload in self.told if kind == "now"]
        return line.split(";")[0], time.time() - max(at)


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path / "logs")


def test_messages_arrive_in_order_collectives_work_and_nothing_listens_beyond_this_machine(watched: Watched) -> None:
    assert watched.run("sums", world=4) == Ended(None)
    [(_, _, addresses)] = [told for told in watched.told if told[1] == "addresses"]
    assert addresses
    assert {address.removeprefix("::ffff:") for address in addresses} <= {"127.0.0.1", "::1"}
    for rank in range(4):
        mine = [payload for number, kind, payload in watched.told if number == rank and kind == "sum"]
        assert mine == [{"step": step, "total": 6.0 + 4 * step} for step in range(40)]


def test_a_rank_killed_at_work_is_named_with_its_very_action(watched: Watched) -> None:
    line, seconds = watched.fails("pair", "kill")
    assert line == "rank 1 was killed by SIGKILL during 1F3 of step 5"
    assert seconds < END_SECONDS


def test_a_kill_for_lack_of_memory_is_told_apart(
    watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = tmp_path / "memory.events"
    monkeypatch.setattr(supervisor, "_COUNTED", (events, tmp_path / "none"))
    assert ended_for_memory() == 0
    events.write_text("low 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 0\n")
    assert ended_for_memory() == 2
    numbers = iter((2, 3))
    monkeypatch.setattr(supervisor, "ended_for_memory", lambda: next(numbers))
    line, _ = watched.fails("pair", "kill")
    assert line == (
        "rank 1 was killed by SIGKILL during 1F3 of step 5, and the kernel ended a process for lack of memory"
    )


def test_a_rank_of_four_killed_in_a_collective_is_named(watched: Watched) -> None:
    line, seconds = watched.fails("ring", world=4)
    assert line == "rank 3 was killed by SIGKILL during 0REDUCE_GRAD of step 3"
    assert seconds < END_SECONDS


def test_a_stopped_rank_is_named_not_the_one_that_waits_for_it(watched: Watched) -> None:
    line, seconds = watched.fails("pair", "stop", hang_seconds=2)
    assert line.startswith("rank 1 gave no sign of life for ")
    assert line.endswith("during 1F3 of step 5")
    assert 1.5 < seconds < 2 + END_SECONDS
    log = (watched.logs / "rank-0.log").read_text()
    assert "recv" in log  # the stack of the one that waited
    assert "received 2" in log
    assert "received 3" not in log  # nobody goes on while stacks are written, not even who was stopped


def test_an_endless_loop_is_named(watched: Watched) -> None:
    line, seconds = watched.fails("pair", "loop", hang_seconds=3)
    assert line.startswith("rank 1 hung in 1F3 of step 5 for ")
    assert 2.5 < seconds < 3 + END_SECONDS
    assert "in loop" in (watched.logs / "rank-1.log").read_text()


def test_where_all_wait_the_longest_waiting_is_named(watched: Watched) -> None:
    line, seconds = watched.fails("deadlock", hang_seconds=2)
    assert line.startswith("rank 1 has waited for ")
    assert line.endswith(" in 1RECV_B0 of step 0, and no rank moves")
    assert seconds < 0.6 + 2 + END_SECONDS


def test_an_exception_is_told_with_its_traceback_and_not_what_followed_from_it(watched: Watched) -> None:
    with pytest.raises(RankFailure) as caught:
        watched.run("pair", "raise")
    line, [note] = str(caught.value), caught.value.__notes__
    assert line.startswith("rank 1 failed during 1F3 of step 5: RuntimeError: microbatch 3 is broken; ")
    assert "shapes [2, 3] and [3, 2] disagree" in note
    assert "in raise_chained" in note


def test_a_users_mistake_is_raised_as_such(watched: Watched) -> None:
    with pytest.raises(UserError, match=r"^recipe\.tokens=3: give it more$"):
        watched.run("pair", "user")


def test_a_long_save_is_no_hang_neither_for_who_saves_nor_for_who_waits(watched: Watched) -> None:
    assert watched.run("patience", hang_seconds=1) == Ended(None)


def test_a_rank_that_has_done_all_and_does_not_end_is_ended(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "EXIT_SECONDS", 1.0)
    began = time.monotonic()
    assert watched.run("linger") == Ended(None)
    assert time.monotonic() - began < 50
    assert "most recent call first" in (watched.logs / "rank-1.log").read_text()  # and its stack is kept


def test_ranks_stop_where_they_are_asked_to(watched: Watched) -> None:
    watched.stop_after = 5
    ended = watched.run("polite")
    steps = [payload for rank, _, payload in watched.told if rank == 0]
    assert steps == list(range(len(steps)))
    assert ended == Ended(f"SIGTERM, saved at step {len(steps)}")


def test_ranks_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    parent = (
        "import sys; from pathlib import Path; from headrace.launch.start import started\n"
        "from headrace.launch.supervisor import supervise\n"
        "from headrace.launch.deadline import Deadline\n"
        f"with started([{str(PROGRAM)!r}, 'forever'], 2, 'local', Path({str(tmp_path)!r})) as ranks:\n"
        "    supervise(ranks, lambda rank, kind, pid: print(pid, flush=True), Deadline(None), 60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    ranks = [psutil.Process(int(process.stdout.readline())) for _ in range(2)]
    process.kill()
    process.wait()
    process.stdout.close()
    _, alive = psutil.wait_procs(ranks, timeout=END_SECONDS)
    assert alive == []


@pytest.mark.parametrize("fault", ["kill", pytest.param("stop", marks=pytest.mark.faults)])
def test_torchrun_starts_ranks_and_a_lost_one_is_named(watched: Watched, fault: str) -> None:
    line, seconds = watched.fails("pair", fault, start="torchrun", hang_seconds=2)
    assert re.match(r"rank 1 (was lost|gave no sign of life for \d+ s) during 1F3 of step 5", line)
    assert seconds < 2 + 2 * END_SECONDS
    [pid] = [payload[1] for _, kind, payload in watched.told if kind == "now"]
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE  # an orphan is init's
