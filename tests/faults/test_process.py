"""Processes that stop, hang, slow down, crash again and again, run out of memory or files, or are started twice."""

import json
import re
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from faults.conftest import STEPS, Fresh
from faults.kills import check_nothing_is_left
from faults.product import Product, Stage, compared, steps, wait_for

pytestmark = [pytest.mark.faults, pytest.mark.alone]

DETECTION_SECONDS = 30.0
MEMORY, TASKS = (Path(f"/sys/fs/cgroup/{kind}/headrace-faults") for kind in ("memory", "pids"))


def ends_like(product: Product, stage: Stage, undisturbed: Product) -> None:
    assert stage.wait() == 0, stage.said
    assert product.differences(undisturbed) == []
    check_nothing_is_left(product)


def test_sigterm_saves_where_it_is_and_asks_to_be_run_again(fresh: Fresh, undisturbed: Product) -> None:
    product, saved = fresh("checkpoint.interval=1000"), 0  # nothing but the signal saves
    for everybody in (False, True):  # Slurm signals every process of a job
        stage = product.start()
        stage.until_step(saved + 6)
        assert not saved or stage.rows()[0][1]["step"] == saved + 1
        for process in [*(stage.both_ranks().values() if everybody else ()), stage.process]:
            process.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        assert stage.wait(60) == 75
        assert time.monotonic() - asked < 20
        before, saved = saved, max(steps(product.checkpoints))
        assert saved >= before + 6
        assert f"SIGTERM, saved at step {saved}; run it again" in stage.said
        check_nothing_is_left(product)
    ends_like(product, product.start(), undisturbed)


def test_ranks_that_are_stopped_or_hang_are_found_and_the_run_goes_on(
    fresh: Fresh, undisturbed: Product, tmp_path: Path
) -> None:
    """Two runs beside each other, which mostly wait: in one rank 1 is stopped, in the other it hangs."""
    once = tmp_path / "once"
    stopped, hanging = fresh().taking_up(undisturbed, 8), fresh().taking_up(undisturbed, 8)
    stages = stopped.start(), hanging.with_fault("hang", rank=1, step=9, once=str(once)).start()
    stages[0].until_step(9)
    ranks = stages[0].both_ranks()
    ranks[1].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    _, alive = psutil.wait_procs(ranks.values(), timeout=60)
    assert alive == [], stages[0].said
    assert time.monotonic() - began < DETECTION_SECONDS
    for product, stage in zip((stopped, hanging), stages, strict=True):
        ends_like(product, stage, undisturbed)
    (silent,), (hung,) = stopped.events("failure"), hanging.events("failure")
    assert silent["rank"] == hung["rank"] == 1
    assert "gave no sign of life" in silent["what"]
    assert "hung in" in hung["what"]
    assert "of step 9" in hung["what"]
    assert hung["time"] - once.stat().st_mtime < DETECTION_SECONDS  # it is written once no rank is left
    assert [has_stack(log) for log in (*silent["stacks"], hung["stacks"][1])] == [True] * 3


def has_stack(log: str) -> bool:
    """Whether a rank's log holds what faulthandler writes."""
    return "most recent call first" in Path(log).read_text(errors="replace")


ACTIVITIES = [
    r"connecting to the other ranks", r"loading the checkpoint", r"0F2 of step 10", r"1RECV_F1 of step 11, for rank 0",
    r"1B0 of step 12", r"\(1F1;0B2\)OVERLAP_F_B of step 13", r"0I3 of step 14", r"0W3 of step 15",
    r"1REDUCE_GRAD of step 17", r"the last sends of step 18", r"the gradients of step 19",
    r"the rows of step 20", r"the update of step 21", r"the weights of step 22", r"saving step 24",
]  # fmt: skip
"""Everything that rank 1 is at in a run, in steps of their own."""
END_SECONDS = 5.0


@pytest.mark.timeout(600)
def test_a_rank_killed_in_any_phase_is_named_with_it_and_ends_all_ranks(
    fresh: Fresh, undisturbed: Product, tmp_path: Path
) -> None:
    once = tmp_path / "once"
    once.mkdir()
    product = fresh("checkpoint.interval=2").taking_up(undisturbed, 4)  # early enough to draw a step before the kills
    product = product.with_fault("kill", rank=1, at=ACTIVITIES, once=str(once))
    ends_like(product, product.start(), undisturbed)
    failures = product.events("failure")
    assert [failure["rank"] for failure in failures] == [1] * len(ACTIVITIES)
    for number, (activity, failure) in enumerate(zip(ACTIVITIES, failures, strict=True)):
        assert re.fullmatch(f"was killed by SIGKILL during {activity}", failure["what"])
        # The entry is written once no rank is left.
        assert failure["time"] - float((once / str(number)).read_text()) < END_SECONDS, activity


def test_a_microbatch_of_another_shape_is_refused_at_once_with_its_rank_and_action(
    fresh: Fresh, undisturbed: Product, tmp_path: Path
) -> None:
    product = fresh().taking_up(undisturbed, 12).with_fault("shape", rank=1, step=14, once=str(tmp_path / "once"))
    ends_like(product, product.start(), undisturbed)
    (failure,) = product.events("failure")
    assert failure["rank"] == 1
    assert "failed during 0F2 of step 14: ShapeError: 0F2 of step 14: hidden states of [1, 15, " in failure["what"]
    assert failure["time"] - (tmp_path / "once").stat().st_mtime < END_SECONDS


def test_a_slow_rank_is_named_and_nothing_else_happens(fresh: Fresh, undisturbed: Product) -> None:
    product = fresh().with_fault("slow", rank=1, from_step=12)
    ends_like(product, product.start(), undisturbed)
    [slow] = product.events("slow_rank")
    assert slow["rank"] == 1
    assert 12 < slow["step"] <= STEPS
    assert product.events("failure") == []
    assert len(product.events("attempt")) == 1


def test_a_step_that_fails_three_times_ends_the_run_with_a_diagnosis(fresh: Fresh, undisturbed: Product) -> None:
    product = fresh().taking_up(undisturbed, 8, 12).with_fault("crash", rank=1, step=14)
    stage = product.run()
    assert stage.code == 1, stage.said
    last = stage.said.strip().splitlines()[-1]
    assert "step 14 failed 3 times" in last
    assert "rank 1 failed during" in last
    assert "ArithmeticError: this step cannot be computed" in last
    assert len(product.events("attempt")) == 3
    check_nothing_is_left(product)
    assert max(steps(product.checkpoints)) == 12
    for step in steps(product.checkpoints):
        name = f"step-{step:08d}"
        assert compared(product.checkpoints / name, undisturbed.checkpoints / name) == []
    ends_like(product, product.but(environment={}).start(), undisturbed)


def open_files(rank: psutil.Process) -> None:
    here = rank.num_fds()
    resource.prlimit(rank.pid, resource.RLIMIT_NOFILE, (here, here))


def size_of_files(rank: psutil.Process) -> None:
    resource.prlimit(rank.pid, resource.RLIMIT_FSIZE, (1000, 1000))


def memory(rank: psutil.Process) -> None:
    resource.prlimit(rank.pid, resource.RLIMIT_AS, (1 << 20, 1 << 20))  # whatever it asks for, it does not get


def test_a_rank_at_a_limit_says_which_and_costs_no_checkpoint(fresh: Fresh, undisturbed: Product) -> None:
    product, seen = fresh("launch.hang_seconds=15"), 0
    stage = product.start()
    for limit, cause in ((open_files, "Too many open files"), (size_of_files, "File too large"), (memory, "memory")):
        stage.until_trained(time.time())
        before = steps(product.checkpoints)
        limit(stage.both_ranks()[1])
        found = wait_for(lambda n=seen, c=cause: about(c, troubles(product)[n:]), 60, stage)
        assert before <= steps(product.checkpoints)
        assert "\n" not in found.get("what", found.get("error"))
        if found["event"] == "save_failed":  # it goes on, and would never be able to save
            stage.kill(1)
            wait_for(lambda: True if stage.both_ranks() else None, 60, stage)
        seen = len(troubles(product))
    ends_like(product, stage, undisturbed)


def troubles(product: Product) -> list[dict[str, Any]]:
    """Everything that the ledger says to have gone wrong."""
    return [event for event in product.events() if event["event"] in ("save_failed", "failure")]


def about(cause: str, events: list[dict[str, Any]]) -> dict[str, Any] | None:
    return next((event for event in events if cause in json.dumps(event)), None)


@pytest.fixture
def groups() -> Iterator[None]:
    """Control groups, empty, in which a rank may have 1 MiB of memory, or no thread more."""
    limits = {MEMORY / "memory.limit_in_bytes": 1 << 20, TASKS / "pids.max": 1}
    try:
        for limit in limits:
            limit.parent.mkdir(exist_ok=True)
    except OSError:
        pytest.skip("needs cgroups (v1) of its own, for which one must be root")
    try:
        for limit, value in limits.items():
            limit.write_text(str(value))
        yield
    finally:
        for limit in limits:
            limit.parent.rmdir()


def test_a_rank_that_gets_no_thread_or_too_little_memory_is_restarted_and_the_cause_said(
    fresh: Fresh, undisturbed: Product, tmp_path: Path, groups: None
) -> None:
    """RLIMIT_NPROC, the usual limit of threads, does not hold for root; a control group's does."""
    product = fresh().taking_up(undisturbed, 8)
    product = product.with_fault("memory", rank=1, step=18, group=str(MEMORY), once=str(tmp_path / "once"))
    stage = product.start()
    stage.until_step(9)
    (TASKS / "cgroup.procs").write_text(str(stage.both_ranks()[1].pid))
    ends_like(product, stage, undisturbed)
    no_thread, no_memory = product.events("failure")
    assert no_thread["rank"] == no_memory["rank"] == 1
    assert "can't start new thread: no memory is left, or no process" in no_thread["what"]
    assert "the kernel ended a process for lack of memory" in no_memory["what"]
    assert "\n" not in no_thread["what"] + no_memory["what"]


def test_a_second_start_follows_the_first_late_messages_change_no_bit_and_errors_of_the_disk_are_tried_again(
    fresh: Fresh, undisturbed: Product
) -> None:
    """What costs no restart, in one run."""
    product = fresh().with_fault("late").with_fault("sync_error", rank=1, times={"4": 2, "12": 60})
    first = product.start()
    first.until_step(3)
    second = product.start()
    assert first.wait() == 0, first.said
    assert second.wait(60) == 0, second.said
    assert f"following process {first.process.pid}" in second.said
    starts = [line for line in (product.folder / "attempts.jsonl").read_text().splitlines() if '"start"' in line]
    assert len(starts) == 1
    assert max(row["step"] for _, row in first.rows()) == STEPS
    assert product.differences(undisturbed) == []
    failed = product.events("save_failed")
    assert {event["step"] for event in failed} == {12}  # that of step 4 came about in the end
    assert all("Input/output error" in event["error"] for event in failed)
    assert 4 in steps(product.checkpoints)
    assert len(product.events("attempt")) == 1
    assert product.events("failure") == []
