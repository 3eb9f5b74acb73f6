"""Retention: what stays, and that the last whole checkpoint always does."""

from pathlib import Path

import pytest
import torch

from headrace.checkpoint import store
from headrace.checkpoint.retain import retain


def fill(folder: Path, steps: range) -> None:
    for step in steps:
        store.save(folder, step, {"weight": torch.tensor([step])}, {}, {})


@pytest.mark.parametrize(
    ("keep", "keep_every", "left"),
    [(1, None, [9]), (2, None, [8, 9]), (2, 4, [4, 8, 9]), (3, 5, [5, 7, 8, 9]), (20, None, list(range(1, 10)))],
)
def test_newest_and_every_nth_stay(tmp_path: Path, keep: int, keep_every: int | None, left: list[int]) -> None:
    fill(tmp_path, range(1, 10))
    deleted = retain(tmp_path, keep, keep_every)
    assert store.steps(tmp_path) == left
    assert sorted(deleted + left) == list(range(1, 10))
    assert not list(tmp_path.glob(".*"))


def test_damaged_ones_never_push_out_the_last_whole_one(tmp_path: Path) -> None:
    fill(tmp_path, range(1, 6))
    for step in (3, 4, 5):
        (tmp_path / f"step-{step:08d}" / store.MODEL).write_bytes(b"x")
    retain(tmp_path, 1, None)
    assert store.steps(tmp_path) == [2, 3, 4, 5]
    newest = store.newest_valid(tmp_path)
    assert newest is not None
    assert newest.step == 2
