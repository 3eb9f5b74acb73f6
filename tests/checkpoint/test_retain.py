"""Retention: what stays, that the last whole one always does, and that nothing is read twice."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from failing_disk import fails_at, operations
from headrace.checkpoint.reader import newest_valid, open_checkpoint, steps
from headrace.checkpoint.retain import retain
from headrace.checkpoint.slices import TABLE
from saved import put


def fill(folder: Path, numbers: range) -> None:
    for step in numbers:
        put(folder, step)


def damage(folder: Path, step: int, name: str = "model-00000.safetensors") -> None:
    """Flip a bit of the last byte."""
    path = folder / f"step-{step:08d}" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("keep", "keep_every", "left"),
    [(1, None, [9]), (2, None, [8, 9]), (2, 4, [4, 8, 9]), (3, 5, [5, 7, 8, 9]), (20, None, list(range(1, 10)))],
)
def test_newest_and_every_nth_stay(tmp_path: Path, keep: int, keep_every: int | None, left: list[int]) -> None:
    fill(tmp_path, range(1, 10))
    deleted = retain(tmp_path, keep, keep_every)
    assert steps(tmp_path) == left
    assert sorted(deleted + left) == list(range(1, 10))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("back_to", "left"),
    [
        ([9], [8, 9]),
        ([7], [7, 8, 9]),
        ([5, 1], [1, 5, 8, 9]),
        ([0], [8, 9]),
        ([5, 0], [5, 8, 9]),
        ([9, 8, 7], [7, 8, 9]),
    ],
)
def test_what_may_have_to_be_gone_back_to_stays(tmp_path: Path, back_to: list[int], left: list[int]) -> None:
    fill(tmp_path, range(1, 10))
    retain(tmp_path, 2, None, back_to=back_to)
    assert steps(tmp_path) == left


def test_a_damaged_one_is_none_to_go_back_to(tmp_path: Path) -> None:
    fill(tmp_path, range(1, 10))
    damage(tmp_path, 5)
    retain(tmp_path, 2, None, back_to=[5])
    assert steps(tmp_path) == [4, 5, 8, 9]


@pytest.mark.parametrize("name", ["model-00000.safetensors", "optimizer-00001.safetensors", TABLE, "state.json"])
def test_damaged_ones_never_push_out_the_last_whole_one(tmp_path: Path, name: str) -> None:
    fill(tmp_path, range(1, 6))
    for step in (3, 4, 5):
        damage(tmp_path, step, name)
    retain(tmp_path, 1, None)
    assert steps(tmp_path) == [2, 3, 4, 5]
    newest = newest_valid(tmp_path)
    assert newest is not None
    assert newest.step == 2


def test_nothing_is_deleted_where_nothing_is_whole(tmp_path: Path) -> None:
    fill(tmp_path, range(1, 4))
    for step in (1, 2, 3):
        damage(tmp_path, step)
    assert retain(tmp_path, 1, None) == []
    assert steps(tmp_path) == [1, 2, 3]


def test_a_run_that_cannot_save_keeps_its_last_good_one(tmp_path: Path) -> None:
    """Save and retention, again and again, on a disk that fills up at any point of the save."""
    fill(tmp_path, range(1, 3))
    count = len(operations(lambda: put(tmp_path / "dry", 3)))
    shutil.rmtree(tmp_path / "dry")
    for number in range(0, count - 1, 3):
        with fails_at(number, errno.ENOSPC), pytest.raises(OSError, match="No space left"):
            put(tmp_path, 3)
        retain(tmp_path, 1, None)
        assert newest_valid(tmp_path).step == 2  # type: ignore[union-attr]
    assert steps(tmp_path) == [2]


def test_what_this_process_knows_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, range(1, 4))
    known = {open_checkpoint(tmp_path / "step-00000003").manifest_hash: True}
    damage(tmp_path, 2)
    assert retain(tmp_path, 2, None, known) == []  # step 1 is the second whole one
    assert sorted(known.values()) == [False, True, True]

    def read(*_: object) -> None:
        raise AssertionError("a file of tensors is read")

    monkeypatch.setattr("headrace.checkpoint.reader.hash_file", read)
    assert retain(tmp_path, 1, None, known) == [2, 1]
    put_back = tmp_path / "step-00000003" / "model-00000.safetensors"
    os.truncate(put_back, 3)  # what is known is still looked at: this one can no longer count
    assert retain(tmp_path, 1, None, known) == []
