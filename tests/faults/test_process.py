"""Processes that stop, hang, slow down, crash again and again, run out of memory or files, or are started twice."""

import json
import resource
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from faults.conftest import STEPS, Fresh
from faults.kills import check_nothing_is_left
from faults.product import Product, Stage, compared, steps, wait_for

pytestmark = pytest.mark.faults

DETECTION_SECONDS = 30.0


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


def test_a_stopped_rank_is_found_its_stack_is_written_down_and_the_run_goes_on(
    fresh: Fresh, undisturbed: Product
) -> None:
    product = fresh()
    stage = product.start()
    stage.until_step(9)
    ranks = stage.both_ranks()
    ranks[1].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    _, alive = psutil.wait_procs(ranks.values(), timeout=60)
    assert alive == [], stage.said
    assert time.monotonic() - stopped < DETECTION_SECONDS
    ends_like(product, stage, undisturbed)
    [failure] = product.events("failure")
    assert failure["rank"] == 1
    assert "gave no sign of life" in failure["what"]
    for rank in range(2):
        assert has_stack(product.folder / "ranks", rank), f"no stack of rank {rank}"


def has_stack(folder: Path, rank: int) -> bool:
    """Whether a log of the rank holds what faulthandler writes."""
    logs = folder.glob(f"**/*rank-{rank}*")
    return any("most recent call first" in log.read_text(errors="replace") for log in logs if log.is_file())


def test_a_rank_that_hangs_is_found_and_the_run_goes_on(fresh: Fresh, undisturbed: Product, tmp_path: Path) -> None:
    product = fresh("launch.hang_seconds=15").with_fault("hang", rank=1, step=14, once=str(tmp_path / "once"))
    ends_like(product, product.start(), undisturbed)
    [failure] = product.events("failure")
    assert failure["rank"] == 1
    assert "hung in" in failure["what"]
    assert "of step 14" in failure["what"]
    assert has_stack(product.folder / "ranks", 1)


def test_a_slow_rank_is_named_and_nothing_else_happens(fresh: Fresh, undisturbed: Product) -> None:
    product = fresh().with_fault("slow", rank=1, from_step=12)
    ends_like(product, product.start(), undisturbed)
    [slow] = product.events("slow_rank")
    assert slow["rank"] == 1
    assert 12 < slow["step"] <= STEPS
    assert product.events("failure") == []
    assert len(product.events("attempt")) == 1


def test_a_step_that_fails_three_times_ends_the_run_with_a_diagnosis(fresh: Fresh, undisturbed: Product) -> None:
    product = fresh().with_fault("crash", rank=1, step=14)
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


def test_a_rank_that_the_kernel_ends_for_lack_of_memory_is_restarted_and_the_cause_said(
    fresh: Fresh, undisturbed: Product, tmp_path: Path
) -> None:
    group = Path("/sys/fs/cgroup/memory/headrace-faults")
    try:
        group.mkdir(exist_ok=True)
    except OSError:
        pytest.skip("needs a memory cgroup (v1) of its own, for which one must be root")
    product = fresh().with_fault("memory", rank=1, step=10, group=str(group), once=str(tmp_path / "once"))
    try:
        (group / "memory.limit_in_bytes").write_text(str(1 << 20))
        ends_like(product, product.start(), undisturbed)
    finally:
        group.rmdir()
    [failure] = product.events("failure")
    assert failure["rank"] == 1
    assert "the kernel ended a process for lack of memory" in failure["what"]


def test_a_second_start_follows_the_first(fresh: Fresh, undisturbed: Product) -> None:
    product = fresh()
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
