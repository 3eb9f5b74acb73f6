"""The loop on ranks: bitwise resume in the product's own mode, and the same run whatever layout takes it up."""

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from headrace.config.compose import load
from headrace.config.schema import Config, SpikeConfig
from headrace.training.learner import build_engine
from headrace.training.place import Place, Watchers
from headrace.training.rows import Rows
from headrace.training.trainer import Trainer
from ranks import run_ranks
from toy_run import Recorder, frozen

pytestmark = pytest.mark.alone

HERE = "training/test_training_ranks.py"
STEPS, LENGTH, ROWS = 18, 32, 8
SPIKE, SKIPPED = 13, 6  # steps, counted from 1


def configured(words: list[str]) -> Config:
    """`experiment=tiny`'s pico model, 18 steps of 8 x 32 tokens in microbatches of 1."""
    plain = ["recipe.batch_ramp=null", "recipe.extensions=[]", "tracking.log_every=1", "parallel.microbatch=1"]
    base = load(["experiment=tiny", *plain, "checkpoint.interval=5", *words])
    recipe = replace(base.recipe, tokens=STEPS * ROWS * LENGTH, sequence_length=LENGTH, batch_sequences=ROWS)
    spike = SpikeConfig("rollback", factor=1.3, window=4)
    return replace(base, recipe=recipe, train=replace(base.train, loss_spike=spike, validate_every=9))


def repetitive(first: int, sequences: int) -> Tensor:
    """Rows of one cycle of 20 tokens, each begun at another place."""
    return (torch.arange(first, first + sequences)[:, None] * 3 + torch.arange(LENGTH + 2)) % 20 + 6


def surprising(first: int, sequences: int) -> Tensor:
    """The same, but for the rows of step `SPIKE`."""
    rows = repetitive(first, sequences)
    inside = [ROWS * (SPIKE - 1) <= row < ROWS * SPIKE for row in range(first, first + sequences)]
    rows[inside] = (rows[inside] * 37 + torch.arange(LENGTH + 2) ** 2) % 900 + 30
    return rows


def life(words: list[str], folder: str, rank: int, stop_after: int | None, surprises: bool) -> dict[str, Any]:
    """Train until a process has taken `stop_after` steps; what it read, by step, and what was told."""
    config, read = configured(words), list[list[int]]()
    engine = build_engine(config, torch.device("cpu"), rank)
    data = surprising if surprises else repetitive

    def batch(first: int, sequences: int) -> Tensor:
        read.append(list(range(first, first + sequences)))
        return data(first, sequences)

    if surprises:
        _spoil(engine, SKIPPED)
    recorder = Recorder(stop_after)
    watchers = Watchers(recorder, logging.getLogger("headrace.test"), recorder, recorder, recorder.event)
    rows = Rows(batch, 1000, repetitive(7, 3), repetitive(9, 2)[:, : LENGTH + 1])
    Trainer(config, engine, rows, Place(Path(folder), "0" * 12, 1e6, None), watchers).run()
    engine.close()
    losses = [[step, metrics["loss"]] for step, metrics in recorder.logged if "loss" in metrics]
    return {"read": read, "losses": losses, "events": recorder.events}


def _spoil(engine: Any, step: int) -> None:
    """Make the gradient's norm infinite at a step."""
    take, norm, label = engine.step, engine.reduction.norm, [""]

    def noted(*given: Any) -> Any:
        label[0] = given[-1]
        return take(*given)

    engine.step = noted
    engine.reduction.norm = lambda: norm() * (math.inf if label[0] == f"step {step}" else 1.0)


def lives(rank: int, world: int, plans: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Several lives, one after the other."""
    return [life(rank=rank, **plan) for plan in plans]


def plan(words: list[str], folder: Path, stop_after: int | None = None, surprises: bool = False) -> dict[str, Any]:
    return {"words": words, "folder": str(folder), "stop_after": stop_after, "surprises": surprises}


FP8 = ["precision=fp8", "parallel.pipeline=2", "parallel.schedule=dualpipe", "launch.verify_every=4"]


def test_fp8_on_dualpipe_is_bitwise_equal_however_often_it_stops(tmp_path: Path) -> None:
    """With a step that is not finite, a spike that leads back, the average of the weights, and stops between them."""
    stops = (SKIPPED, 8, 1, None)  # the second after it went back, before a checkpoint tells of it
    plans = [plan(FP8, tmp_path / "straight", surprises=True)]
    plans += [plan(FP8, tmp_path / "broken", stop, surprises=True) for stop in stops]
    straight, *broken = run_ranks(2, HERE, "lives", seconds=400, plans=plans)[0]
    facts = [[name, facts["step"]] for name, facts in straight["events"] if name in ("skipped", "rollback")]
    assert facts == [["skipped", SKIPPED], ["skipped", SPIKE], ["rollback", SPIKE]]
    assert not any(name == "corruption" for one in (straight, *broken) for name, _ in one["events"])
    (ours, state), (theirs, other_state) = frozen(tmp_path / "broken"), frozen(tmp_path / "straight")
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("ema ") for name in ours)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert json.dumps(state) == json.dumps(other_state)
    assert state["counters"]["passed"] == [[10, ROWS * (SPIKE - 10)]]


FP32 = ["precision=fp32"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("alone")
    return life(FP32, str(folder), 0, None, False), folder


def test_any_layout_goes_on_with_the_same_rows_and_losses(alone: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    """Data parallelism 1, 2, 4, 1; and from the first checkpoint a pipeline of 2 with experts apart."""
    chain, branch = tmp_path / "chain", tmp_path / "branch"
    two, four = ([*FP32, f"parallel.data={n}"] for n in (2, 4))
    cross = [*FP32, "parallel.pipeline=2", "parallel.data=2", "parallel.expert=2", "parallel.schedule=dualpipe"]
    lived = [[life(FP32, str(folder), 0, 4, False)] for folder in (chain, branch)]
    by_rank = run_ranks(2, HERE, "lives", seconds=200, plans=[plan(two, chain, 5)])
    lived.append([one[0] for one in by_rank])
    by_rank = run_ranks(4, HERE, "lives", seconds=400, plans=[plan(four, chain, 4), plan(cross, branch)])
    lived += [[one[index] for one in by_rank] for index in (0, 1)]
    lived.append([life(FP32, str(chain), 0, None, False)])
    chained, branched = [lived[0], lived[2], lived[3], lived[5]], [lived[1], lived[4]]
    for lives_of in (chained, branched):
        assert stream(lives_of) == [list(range(ROWS * step, ROWS * step + ROWS)) for step in range(STEPS)]
        losses = [loss for ranks in lives_of for _, loss in ranks[0]["losses"]]
        assert losses == pytest.approx([loss for _, loss in alone[0]["losses"]], rel=1e-5)
    ours, theirs = frozen(chain)[0], frozen(alone[1])[0]
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if "exp_avg_sq" not in name:
            assert (ours[name] - tensor).norm() <= 1e-3 * tensor.norm() + 1e-7, name


def stream(lives_of: list[list[dict[str, Any]]]) -> list[list[int]]:
    """The rows of each step over all ranks of each life, every one of them counted once."""
    steps = []
    for ranks in lives_of:
        for parts in zip(*(rank["read"] for rank in ranks), strict=True):
            steps.append(sorted({row for part in parts for row in part}))
    return steps
