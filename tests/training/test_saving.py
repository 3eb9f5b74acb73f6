"""Saves beside training: it waits for the copy alone, a failed save costs nothing but itself, the last must succeed."""

import errno
import logging
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from headrace.checkpoint import writer
from headrace.checkpoint.reader import newest_valid, steps
from headrace.config.schema import Config
from headrace.errors import UserError
from headrace.planning.reliability import auto_interval
from headrace.training.saving import FIRST_SAVE, Rhythm, SaveFailed
from toy_run import Recorder, assert_same_end, toy_config, toy_trainer


def saving(config: Config, **settings: Any) -> Config:
    return replace(config, checkpoint=replace(config.checkpoint, **settings))


@pytest.fixture
def straight(tmp_path: Path) -> Path:
    toy_trainer(toy_config(), tmp_path / "straight").run()
    return tmp_path / "straight"


class Held(Recorder):
    """Lets the held save go at a step."""

    def __init__(self, gate: threading.Event, release_at: int) -> None:
        super().__init__()
        self.gate, self.release_at = gate, release_at

    def update(self, step: int, *rest: Any) -> None:
        super().update(step, *rest)
        if step == self.release_at:
            self.gate.set()


def test_training_goes_on_while_a_save_is_written(
    tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, real = threading.Event(), writer.write_verified

    def slow(path: Path, *rest: Any) -> str:
        assert gate.wait(30)
        return real(path, *rest)

    monkeypatch.setattr(writer, "write_verified", slow)
    recorder = Held(gate, release_at=7)
    assert toy_trainer(toy_config(), tmp_path / "ours", recorder).run().finished
    names = [(name, facts["step"]) for name, facts in recorder.events if name in ("save", "published")]
    assert names == [("save", 4), ("published", 4), ("save", 8), ("published", 8), ("save", 12), ("published", 12)]
    published = recorder.of("published")
    assert published[0]["seconds"] > recorder.of("save")[0]["stall"]  # type: ignore[operator]
    assert published[0]["bytes"] > 2 * 4 * (2 * 16 * 8 + 4 * 8 + 4 * 8 * 8)  # type: ignore[operator]
    # The save of step 4 holds the state of step 4, whatever became of the weights while it was written.
    assert_same_end(tmp_path / "ours", straight)


def test_a_run_that_fails_beside_a_save_ends_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, real = threading.Event(), writer.write_verified

    def slow(path: Path, *rest: Any) -> str:
        assert gate.wait(30)
        return real(path, *rest)

    class Failing(Held):
        def update(self, step: int, *rest: Any) -> None:
            super().update(step, *rest)
            if step == self.release_at:
                raise RuntimeError("a fault of ours")

    monkeypatch.setattr(writer, "write_verified", slow)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        toy_trainer(toy_config(), tmp_path, Failing(gate, release_at=6)).run()
    assert steps(tmp_path) == [4] and [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_the_next_save_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    active, most, real = [0], [0], writer.write_verified

    def counted(*rest: Any) -> str:
        active[0] += 1
        most[0] = max(most[0], active[0])
        found = real(*rest)
        active[0] -= 1
        return found

    monkeypatch.setattr(writer, "write_verified", counted)
    toy_trainer(saving(toy_config(), interval=1), tmp_path).run()
    assert most == [1]
    assert steps(tmp_path)[-1] == 12


def failing(monkeypatch: pytest.MonkeyPatch, file: str, step: int, number: int = errno.ENOSPC) -> None:
    """Make the disk full, or fail otherwise, while a file is written in the save of a step."""
    real = writer.write_verified

    def fail(path: Path, *rest: Any) -> str:
        if f"{writer.LEFTOVER}{step}-" in str(path) and path.name == file:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *rest)

    monkeypatch.setattr(writer, "write_verified", fail)


FILES = ["model-00000.safetensors", "optimizer-00000.safetensors", "state.json"]  # of a rank, and of publication


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("file", FILES)
def test_a_full_disk_costs_a_save_and_nothing_else(
    file: str, asynchronous: bool, tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    failing(monkeypatch, file, 8)
    recorder = Recorder()
    with caplog.at_level(logging.WARNING):
        config = saving(toy_config(), asynchronous=asynchronous)
        assert toy_trainer(config, tmp_path / "ours", recorder).run().finished
    assert [facts["step"] for facts in recorder.of("save_failed")] == [8]
    assert "No space left on device" in recorder.of("save_failed")[0]["error"]  # type: ignore[operator]
    assert "the checkpoint of step 8 could not be saved: rank 0: OSError" in caplog.text
    assert steps(tmp_path / "ours") == [4, 12]
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == ["step-00000004", "step-00000012"]
    assert_same_end(tmp_path / "ours", straight)


@pytest.mark.parametrize(("number", "expected"), [(errno.ENOSPC, UserError), (errno.EROFS, SaveFailed)])
@pytest.mark.parametrize("file", FILES)
def test_the_last_save_must_succeed(
    file: str, number: int, expected: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, file, 12, number)
    with pytest.raises(expected, match="the checkpoint of step 12 could not be saved") as raised:
        toy_trainer(toy_config(), tmp_path).run()
    assert ("the disk is full; free some space" in str(raised.value)) == (number == errno.ENOSPC)
    found = newest_valid(tmp_path)
    assert found is not None
    assert found.step == 8
    monkeypatch.undo()
    assert toy_trainer(toy_config(), tmp_path).run().finished


def test_what_a_killed_attempt_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / f"{writer.LEFTOVER}4-abc"
    left.mkdir()
    (left / "model-00000.safetensors").write_bytes(b"half")
    toy_trainer(toy_config(), tmp_path).run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000008", "step-00000012"]


def test_the_rhythm_follows_measured_times() -> None:
    settings = replace(toy_config().checkpoint, interval="auto", faults_per_day=100.0)
    rhythm = Rhythm(settings, toy_config().parallel)
    for _ in range(40):
        rhythm.took(0.5)
    assert [step for step in range(40) if rhythm.due(step, 0.0)] == list(range(FIRST_SAVE, 40))
    rhythm.saved(10)
    every = auto_interval(0.5, 0.1, 1, 100.0)
    assert every == 26  # sqrt(2 * 0.1 s * 864 s) / 0.5 s
    assert [step for step in range(10, 60) if rhythm.due(step, 0.1)] == list(range(10 + every, 60))
    fixed = Rhythm(toy_config().checkpoint, toy_config().parallel)
    assert [step for step in range(1, 14) if fixed.due(step, 0.1)] == [4, 8, 12]
    fixed.saved(8)
    assert [step for step in range(1, 14) if fixed.due(step, 0.1)] == [4, 12]


def test_an_automatic_interval_saves_without_being_told_how_often(tmp_path: Path, straight: Path) -> None:
    recorder = Recorder()
    config = saving(toy_config(), interval="auto", faults_per_day=1e-3)
    assert toy_trainer(config, tmp_path / "ours", recorder).run().finished
    assert [facts["step"] for facts in recorder.of("save")] == [FIRST_SAVE, 12]
    assert_same_end(tmp_path / "ours", straight)
