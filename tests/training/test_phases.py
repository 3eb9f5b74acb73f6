"""A ramp of the batch and context extension: one trainer for each phase, which hands over through a checkpoint."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from headrace.checkpoint.reader import steps
from headrace.config.recipe import BatchRampConfig, ExtensionConfig, RopeScaling
from headrace.config.schema import Config
from headrace.recipe.schedule import Schedule
from headrace.training.rows import Rows
from headrace.training.trainer import Trainer
from toy_run import LENGTH, Recorder, assert_same_end, frozen, toy_batch, toy_config, toy_trainer

YARN = RopeScaling("yarn", 2.0, 32.0, 1.0, 1.0, 1.0, 8)
LONG = 3 * LENGTH


@pytest.fixture
def config() -> Config:
    """Batches of 1 to 4 over 40 tokens, then 4 for the rest of 320 tokens, then 3 steps of 2 rows thrice as long."""
    base = toy_config(10)
    extension = ExtensionConfig(
        "long", 3, sequence_length=LONG, batch_sequences=2, learning_rate=1e-3, rope_scaling=YARN
    )
    ramp = BatchRampConfig(from_sequences=1, tokens=40, shape="linear", multiple=1)
    return replace(base, recipe=replace(base.recipe, batch_ramp=ramp, extensions=(extension,), ema_decay=0.9))


class Reading:
    """The rows that are read, by sequence length."""

    def __init__(self) -> None:
        self.read: dict[int, list[int]] = {LENGTH: [], LONG: []}

    def rows(self, phase: str) -> Rows:
        length = LONG if phase == "long" else LENGTH

        def batch(first: int, sequences: int) -> Tensor:
            self.read[length].extend(range(first, first + sequences))
            short = toy_batch(first, sequences)
            return torch.cat([short, *[short[:, 1:]] * (length // LENGTH - 1)], dim=1)

        return Rows(batch, 1000, batch(5000, 3), toy_batch(6000, 2))


def run(config: Config, folder: Path, stop_after: int | None = None, reading: Reading | None = None) -> Trainer | None:
    """All phases, or until a process has taken `stop_after` steps; None where it stopped."""
    recorder, phase = Recorder(stop_after), "ramp"
    reading = reading or Reading()
    while True:
        rows = reading.rows(phase)
        for read in reading.read.values():
            read[:] = [row for row in read if row < 5000]
        trainer = toy_trainer(config, folder, recorder, rows=rows, phase=phase)
        outcome = trainer.run()
        if outcome.reason:
            return None
        if outcome.finished:
            return trainer
        assert outcome.next_phase is not None
        phase = outcome.next_phase


def test_each_phase_reads_its_own_rows_once_and_hands_over(config: Config, tmp_path: Path) -> None:
    schedule, reading = Schedule(config.recipe), Reading()
    ramp, main, long = schedule.phases
    assert (ramp.name, main.name, long.name) == ("ramp", "main", "long")
    assert [schedule.at(step).sequences for step in range(ramp.end)] == [1, 1, 2, 3][: ramp.end]
    trainer = run(config, tmp_path, reading=reading)
    assert trainer is not None
    assert {ramp.end, main.end, long.end} & set(steps(tmp_path)) == {main.end, long.end}  # the newest two are kept
    before = sum(schedule.at(step).sequences for step in range(main.end))
    assert reading.read == {LENGTH: list(range(before)), LONG: list(range(6))}
    summary = trainer.summary()
    assert (summary["position"], summary["steps"]) == (before, schedule.steps)
    assert summary["tokens"] == before * LENGTH + 6 * LONG
    assert [name for name, *_ in summary["phases"]] == ["ramp", "main", "long"]
    rows = frozen(tmp_path)[1]["history"]["rows"]
    assert [row["step"] for row in rows] == list(range(1, schedule.steps + 1))
    assert [row["sequences"] for row in rows] == [schedule.at(step).sequences for step in range(schedule.steps)]
    assert [row["tokens"] for row in rows] == [schedule.tokens_after(step + 1) for step in range(schedule.steps)]
    assert rows[-1]["learning_rate"] == pytest.approx(1e-3)


def test_stopped_after_any_number_of_steps_it_is_bitwise_equal(config: Config, tmp_path: Path) -> None:
    run(config, tmp_path / "straight")
    for stop in range(1, Schedule(config.recipe).steps):
        folder = tmp_path / str(stop)
        assert run(config, folder, stop) is None
        assert run(config, folder) is not None
        assert_same_end(folder, tmp_path / "straight")


def test_a_checkpoint_of_another_phase_is_left_to_it(config: Config, tmp_path: Path) -> None:
    first = toy_trainer(config, tmp_path, rows=Reading().rows("main"), phase="main").run()
    assert (first.finished, first.step, first.next_phase) == (False, 0, "ramp")
    assert steps(tmp_path) == []
    run(config, tmp_path, 2)
    recorder = Recorder()
    back = toy_trainer(config, tmp_path, recorder, rows=Reading().rows("long"), phase="long").run()
    assert (back.finished, back.step, back.next_phase) == (False, 2, "ramp")
    assert recorder.shown == []
