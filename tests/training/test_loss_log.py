"""Every step's loss on disk, once, whatever happened on the way."""

import logging
from pathlib import Path

import pytest
import torch

from headrace.errors import UserError
from headrace.training.loss_log import LossLog, read_losses
from headrace.training.trainer import Place, Trainer, Watchers
from toy_run import Recorder, ToyLearner, ToyModel, toy_batch, toy_config, toy_rows


def log(path: Path, losses: dict[int, float]) -> Recorder:
    shown = Recorder()
    journal = LossLog(path, shown)
    for step, loss in losses.items():
        journal.update(step, 9, step * 10, {"loss": loss, "tokens_per_second": 1.0})
    journal.close()
    return shown


def test_losses_are_exact_and_what_is_shown_goes_on(tmp_path: Path) -> None:
    shown = log(tmp_path / "runs" / "losses.jsonl", {1: 0.1 + 0.2, 2: 1 / 3})
    assert read_losses(tmp_path / "runs" / "losses.jsonl", 2) == [0.1 + 0.2, 1 / 3]
    assert (shown.shown, shown.closed) == ([1, 2], True)


def test_steps_that_were_done_again_count_once(tmp_path: Path) -> None:
    path = tmp_path / "losses.jsonl"
    log(path, {1: 4.0, 2: 3.0, 3: 9.0})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # torn by a kill
    log(path, {2: 3.0, 3: 2.0})
    assert read_losses(path, 3) == [4.0, 3.0, 2.0]


def test_a_loss_that_is_not_finite_is_none(tmp_path: Path) -> None:
    log(tmp_path / "losses.jsonl", {1: 4.0, 2: float("inf"), 3: float("nan"), 4: 2.0})
    assert read_losses(tmp_path / "losses.jsonl", 4) == [4.0, None, None, 2.0]


def test_a_step_that_is_missing_is_named(tmp_path: Path) -> None:
    log(tmp_path / "losses.jsonl", {1: 4.0, 3: 2.0})
    with pytest.raises(UserError, match="lacks step 2; remove the folder"):
        read_losses(tmp_path / "losses.jsonl", 3)


def test_the_trainer_tells_of_every_step_even_of_one_that_it_skips(tmp_path: Path) -> None:
    def batch(first: int, sequences: int) -> torch.Tensor:
        rows = toy_batch(first, sequences)
        if first == 8:  # the third step
            rows[0, 0] = 0  # an infinite loss
        return rows

    recorder = Recorder()
    place = Place(tmp_path / "checkpoints", "0123456789ab", 1e4, None)
    shown = LossLog(tmp_path / "losses.jsonl", recorder)
    watchers = Watchers(recorder, logging.getLogger("headrace.test"), recorder, shown)
    config = toy_config(6)
    Trainer(config, ToyLearner(ToyModel(), config), toy_rows(batch), place, watchers).run()
    losses = read_losses(tmp_path / "losses.jsonl", 6)
    assert [loss is None for loss in losses] == [False, False, True, False, False, False]
    logged = {step: metrics["loss"] for step, metrics in recorder.logged if "loss" in metrics}
    assert [logged[step] for step in (1, 2, 4, 5, 6)] == [loss for loss in losses if loss is not None]
