"""Disks that lie, fill up, fail or become read-only, and clocks that are wrong: checkpoints are whole or not listed."""

import errno
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from faults.conftest import Fresh
from faults.kills import check_nothing_is_left
from faults.product import Product, Stage, compared, steps, wait_for
from saved import flips_that_pass, use

pytestmark = pytest.mark.faults

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a tmpfs")
MIB = 1 << 20
FLIPS = 10_000


def ends_like(product: Product, stage: Stage, undisturbed: Product) -> None:
    assert stage.wait() == 0, stage.said
    assert product.differences(undisturbed) == []
    check_nothing_is_left(product)


def killed_after(product: Product, step: int) -> None:
    """Everything of the run is killed once so many steps are done, and a checkpoint of about then is there."""
    stage = product.start()
    stage.until_step(step)
    wait_for(lambda: True if max(steps(product.checkpoints), default=0) >= step - 4 else None, 30, stage)
    stage.end()


def flip(path: Path) -> None:
    """One bit, in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def newest(product: Product, back: int) -> Path:
    return product.checkpoints / f"step-{sorted(steps(product.checkpoints))[-1 - back]:08d}"


def test_every_flipped_bit_of_a_checkpoint_is_detected(undisturbed: Product, tmp_path: Path) -> None:
    name = newest(undisturbed, 0).name
    copy = shutil.copytree(undisturbed.checkpoints / name, tmp_path / name)
    assert flips_that_pass(copy, FLIPS) == []
    use(copy)


def test_damaged_checkpoints_are_passed_over_loudly(fresh: Fresh, undisturbed: Product) -> None:
    product = fresh().taking_up(undisturbed, *steps(undisturbed.checkpoints))
    damaged = [newest(product, back) for back in range(4)]
    good = newest(product, 4)
    flip(max(damaged[0].glob("optimizer-00001*")))
    truncated = next(iter(damaged[1].glob("model-00000*")))
    os.truncate(truncated, truncated.stat().st_size - 4096)
    flip(damaged[2] / "state.json")
    for path in damaged[3].iterdir():  # the content of another step under this step's name
        path.write_bytes((good / path.name).read_bytes())
    stage = product.run()
    assert stage.code == 0, stage.said
    log = (product.folder / "log.txt").read_text()
    for folder in damaged:
        assert any(folder.name in line and "WARNING" in line for line in log.splitlines()), f"nothing of {folder.name}"
    assert product.events("resumed")[-1]["step"] == int(good.name.removeprefix("step-"))
    assert product.differences(undisturbed) == []


@pytest.fixture
def small_disk(fresh: Fresh) -> Product:
    """A run whose folder, checkpoints and all, lies on a disk of its own of 16 MiB."""
    product = fresh("checkpoint.keep=2", "checkpoint.interval=2")
    mount(product.folder)
    return product


def mount(folder: Path) -> None:
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], check=True)


def failed_saves(stage: Stage) -> list[str]:
    """What the stage said of saves that failed: its ledger may be on the very disk that is full."""
    return [line for line in stage.said.splitlines() if "could not be saved" in line]


def until_another_save_fails(stage: Stage, seconds: float = 60) -> None:
    before = len(failed_saves(stage))
    wait_for(lambda: True if len(failed_saves(stage)) > before else None, seconds, stage)


def nothing_partial_is_listed(product: Product, undisturbed: Product) -> None:
    """All that is listed is whole, and what it should be."""
    for step in steps(product.checkpoints) & steps(undisturbed.checkpoints):
        name, differ = f"step-{step:08d}", ["it went"]
        with suppress(FileNotFoundError):
            differ = compared(product.checkpoints / name, undisturbed.checkpoints / name)
        assert not differ or step not in steps(product.checkpoints), differ  # retention may have removed it meanwhile


def fill(folder: Path, left: int) -> Path:
    """A file that leaves so many bytes of the disk."""
    ballast = folder / "ballast"
    while True:
        disk = os.statvfs(folder)
        with ballast.open("wb") as file, suppress(OSError):  # a save was quicker
            os.posix_fallocate(file.fileno(), 0, max(1, disk.f_bavail * disk.f_frsize - left))
            return ballast


@as_root
def test_a_full_disk_stops_no_training_and_lists_no_part(small_disk: Product, undisturbed: Product) -> None:
    # Nothing is removed as it goes: what retention frees would be room for the next save.
    product = small_disk.but("checkpoint.keep=1000", "checkpoint.interval=3")
    stage = product.start()
    stage.until_step(5)
    # Less and less room, so that saves fail in different files, and at last in the very first one.
    for left in (600_000, 20_000, 0):
        ballast = fill(product.folder, left)
        until_another_save_fails(stage)
        ballast.unlink()
        nothing_partial_is_listed(product, undisturbed)
        assert steps(product.checkpoints), "the last good one stays"
    ends_like(product, stage, undisturbed)
    assert len(product.events("attempt")) == 1, "a save that fails costs no restart"
    assert all("No space left" in event["error"] for event in product.events("save_failed"))
    assert len(product.events("save_failed")) >= 3, "what could not be written into the ledger was written later"
    assert all(path.name.startswith("step-") for path in product.checkpoints.iterdir())


@as_root
def test_where_the_last_save_finds_no_room_the_run_stops_cleanly(small_disk: Product, undisturbed: Product) -> None:
    product = small_disk.taking_up(undisturbed, 12)
    stage = product.start()
    stage.until_step(17)  # the fifth, of which the timeline is written
    ballast = fill(product.folder, 0)
    assert stage.wait() == 2, stage.said
    assert "disk is full" in stage.said.strip().splitlines()[-1]
    nothing_partial_is_listed(product, undisturbed)
    assert not list(product.checkpoints.glob(".unfinished-*")), stage.said
    check_nothing_is_left(product)
    ballast.unlink()
    ends_like(product, product.start(), undisturbed)


@as_root
def test_a_disk_that_becomes_read_only_stops_no_training(fresh: Fresh, undisturbed: Product) -> None:
    product = fresh("checkpoint.keep=2")
    mount(product.checkpoints)
    stage = product.start()
    stage.until_step(5)
    before = steps(product.checkpoints)

    def remount(mode: str) -> bool | None:
        command = ["mount", "-o", f"remount,{mode}", str(product.checkpoints)]
        return True if subprocess.run(command, capture_output=True).returncode == 0 else None

    wait_for(lambda: remount("ro"), 30, stage)  # refused while a file is open for writing
    until_another_save_fails(stage)
    assert before <= steps(product.checkpoints)
    nothing_partial_is_listed(product, undisturbed)
    wait_for(lambda: remount("rw"), 30, stage)
    ends_like(product, stage, undisturbed)
    assert os.strerror(errno.EROFS) in json.dumps(product.events("save_failed"))


def test_wrong_clocks_and_times_of_files_change_nothing(fresh: Fresh, undisturbed: Product) -> None:
    product = fresh().taking_up(undisturbed, 4, 8)
    shuffle_times(product, lambda step: 2_000_000_000 - 86_400 * step)
    back = product.with_fault("clock", seconds=-3600)
    killed_after(back, 14)
    assert back.events("resumed")[-1]["step"] >= 8
    shuffle_times(product, lambda step: 86_400 * (step % 3))
    forward = product.with_fault("clock", seconds=366 * 86_400)
    began = time.monotonic()
    ends_like(forward, forward.start(), undisturbed)
    assert time.monotonic() - began < 120
    assert forward.events("resumed")[-1]["step"] >= 12


def shuffle_times(product: Product, of: Callable[[int], int]) -> None:
    """Give files and folders of checkpoints times that say nothing, or the opposite."""
    for step in steps(product.checkpoints):
        folder = product.checkpoints / f"step-{step:08d}"
        for path in (*folder.iterdir(), folder):
            os.utime(path, (of(step), of(step)))
