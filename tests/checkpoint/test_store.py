"""Checkpoints under crashes at every file operation, and under every kind of damage."""

import builtins
import errno
import io
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.artifacts.tensors import load_tensors
from headrace.checkpoint import retain as retention
from headrace.checkpoint import store
from headrace.errors import UserError

OPERATIONS = ["fsync", "rename", "replace", "mkdir", "rmdir", "unlink", "open"]


class Crash(BaseException):
    """Stands for the process dying: no `except Exception` may catch it."""


def put(folder: Path, step: int, value: float | None = None) -> Path:
    value = float(step) if value is None else value
    tensors = {"model.weight": torch.full((3, 4), value), "model.bias": torch.tensor(value)}
    moments = {"model.weight/exp_avg": torch.full((3, 4), value, dtype=torch.bfloat16)}
    return store.save(folder, step, tensors, moments, {"fingerprint": "ab12", "value": value, "history": [1.5, 2.5]})


def value_of(checkpoint: store.Checkpoint) -> float:
    """The one number that all files of a checkpoint must agree on."""
    model, optimizer = load_tensors(checkpoint.model_file), load_tensors(checkpoint.optimizer_file)
    values = {
        checkpoint.state["value"],
        *model["model.weight"].flatten().tolist(),
        model["model.bias"].item(),
        *optimizer["model.weight/exp_avg"].float().flatten().tolist(),
    }
    assert len(values) == 1, "a mix of two checkpoints"
    return float(values.pop())


@contextmanager
def crash_at(count: int, operations: list[str]) -> Iterator[list[str]]:
    """Raise `Crash` instead of the `count`-th file operation, and refuse all later ones as a dead process would."""
    done: list[str] = []

    def wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            mode = args[1] if len(args) > 1 else kwargs.get("mode", "r")
            if name != "open" or "w" in str(mode):
                done.append(name)
                if len(done) > count:
                    raise Crash
            return original(*args, **kwargs)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for name in operations:
            target = (builtins, io) if name == "open" else (os,)
            for module in target:
                patch.setattr(module, name, wrap(name, getattr(module, name)))
        yield done


def count_operations(act: Callable[[], object]) -> int:
    with crash_at(10**9, OPERATIONS) as done:
        act()
    assert {"fsync", "rename", "replace", "mkdir"} <= set(done), "the shim does not see the writes"
    return len(done)


def test_crash_at_every_operation_of_a_save_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    put(tmp_path / "dry", 1)
    total = count_operations(lambda: put(tmp_path / "dry", 2))
    assert total > 12
    seen = set()
    for count in range(total):
        folder = tmp_path / str(count)
        put(folder, 1)
        with pytest.raises(Crash), crash_at(count, OPERATIONS):
            put(folder, 2)
        newest = store.newest_valid(folder)
        assert newest is not None
        assert value_of(newest) == newest.step
        seen.add(newest.step)
        put(folder, 2)  # the same save goes through afterwards and leaves nothing of the dead one
        assert store.steps(folder) == [1, 2]
        assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000002"]
    assert seen == {1, 2}


def test_crash_at_every_operation_of_a_retention_keeps_the_newest_whole(tmp_path: Path) -> None:
    def prepare(folder: Path) -> None:
        for step in (1, 2, 3):
            put(folder, step)

    prepare(tmp_path / "dry")
    with crash_at(10**9, OPERATIONS) as done:
        retention.retain(tmp_path / "dry", 1, None)
    assert len(done) >= 10
    for count in range(len(done)):
        folder = tmp_path / str(count)
        prepare(folder)
        with pytest.raises(Crash), crash_at(count, OPERATIONS):
            retention.retain(folder, 1, None)
        newest = store.newest_valid(folder)
        assert newest is not None
        assert value_of(newest) == newest.step == 3
        for step in store.steps(folder):
            store.load(folder / f"step-{step:08d}")  # what is listed is whole


def test_everything_is_synced_before_the_rename_publishes(tmp_path: Path) -> None:
    synced: set[str] = set()

    def fsync(descriptor: int) -> None:
        synced.add(Path(f"/proc/self/fd/{descriptor}").readlink().name)

    with pytest.MonkeyPatch.context() as patch:
        rename = os.rename
        patch.setattr(os, "fsync", fsync)
        at_rename: list[set[str]] = []
        patch.setattr(os, "rename", lambda *names: (at_rename.append(set(synced)), rename(*names)))
        put(tmp_path, 1)
    (before,) = at_rename
    for name in (store.MODEL, store.OPTIMIZER, store.STATE):
        assert any(name in path for path in before), name
    assert any("manifest.json" in path for path in before)
    assert ".unfinished-step-00000001" in before
    assert tmp_path.name in synced


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    put(folder, 1)
    put(folder, 2)
    return folder


FILES = [store.MODEL, store.OPTIMIZER, store.STATE, "manifest.json"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FILES), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_in_any_file_is_detected(pair: Path, name: str, place: float, bit: int) -> None:
    path = pair / "step-00000002" / name
    sound = path.read_bytes()
    damaged = bytearray(sound)
    damaged[int(place * len(sound))] ^= 1 << bit
    path.write_bytes(damaged)
    try:
        with pytest.raises(UserError, match="step-00000002"):
            store.load(path.parent)
        newest = store.newest_valid(pair)
        assert newest is not None
        assert newest.step == 1
    finally:
        path.write_bytes(sound)
    assert store.load(path.parent).step == 2


@pytest.mark.parametrize("name", FILES)
def test_truncation_and_absence_are_detected(tmp_path: Path, name: str) -> None:
    path = put(tmp_path, 2) / name
    sound = path.read_bytes()
    for length in {0, 1, len(sound) // 2, len(sound) - 1}:
        path.write_bytes(sound[:length])
        if name == "manifest.json" and length == len(sound) - 1:
            continue  # only the final newline is gone: the content is whole
        with pytest.raises(UserError, match=name):
            store.load(path.parent)
    path.unlink()
    with pytest.raises(UserError, match=name):
        store.load(path.parent)


@pytest.mark.parametrize("name", FILES)
def test_a_file_swapped_in_from_another_step_is_detected(tmp_path: Path, name: str) -> None:
    first, second = put(tmp_path, 1), put(tmp_path, 2)
    shutil.copy(first / name, second / name)
    with pytest.raises(UserError, match="step-00000002"):
        store.load(second)


def test_a_whole_folder_under_another_steps_name_is_detected(tmp_path: Path) -> None:
    put(tmp_path, 1).rename(tmp_path / "step-00000009")
    with pytest.raises(UserError, match="another step"):
        store.load(tmp_path / "step-00000009")


def test_fall_back_is_loud_and_names_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, 1)
    (put(tmp_path, 2) / store.OPTIMIZER).write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        newest = store.newest_valid(tmp_path)
    assert newest is not None
    assert newest.step == 1
    assert "step-00000002/optimizer.safetensors" in caplog.text


def test_no_whole_checkpoint_is_none_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert store.newest_valid(tmp_path / "absent") is None
    assert not caplog.records
    (put(tmp_path, 1) / store.STATE).unlink()
    assert store.newest_valid(tmp_path) is None
    assert "none of 1 checkpoints is whole" in caplog.text


def test_saving_again_keeps_a_whole_one_and_replaces_a_damaged_one(tmp_path: Path) -> None:
    path = put(tmp_path, 3, 3.0)
    put(tmp_path, 3, 4.0)
    assert value_of(store.load(path)) == 3.0
    (path / store.MODEL).write_bytes(b"damaged")
    put(tmp_path, 3, 4.0)
    assert value_of(store.load(path)) == 4.0


def test_at_step_names_the_steps_that_there_are(tmp_path: Path) -> None:
    put(tmp_path, 4)
    assert store.at_step(tmp_path, 4).step == 4
    with pytest.raises(UserError, match="no checkpoint of step 5; kept steps: 4"):
        store.at_step(tmp_path, 5)


@pytest.mark.parametrize("operation", ["fsync", "replace", "rename"])
def test_a_full_disk_keeps_the_old_checkpoint_and_no_part_of_the_new(tmp_path: Path, operation: str) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    put(tmp_path, 1)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, operation, refuse)
        put(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert value_of(store.load(tmp_path / "step-00000001")) == 1.0
