"""Steps that are not finite and losses that spike: what is done about them, and that it is the same however often a run
is stopped."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from headrace.checkpoint.reader import steps
from headrace.config.schema import Config, SpikeConfig
from headrace.training.policies import DivergenceError, Judged, Policies, regular
from headrace.training.rows import Rows
from toy_run import (
    LENGTH,
    Recorder,
    ToyModel,
    assert_same_end,
    frozen,
    poisoned,
    toy_batch,
    toy_config,
    toy_rows,
    toy_trainer,
)

STEPS = 24


def spiky(at: set[int], read: list[int] | None = None) -> Rows:
    """The toy's data, but for rows at some positions, whose cycle runs the other way: nobody could have foretold it."""

    def batch(first: int, sequences: int) -> Tensor:
        if read is not None:
            read.extend(range(first, first + sequences))
        rows = toy_batch(first, sequences)
        return torch.stack([row.flip(0) if first + i in at else row for i, row in enumerate(rows)])

    return toy_rows(batch)


def with_policy(policy: str, factor: float = 1.25, rollback_after: int = 5) -> Config:
    config = toy_config(STEPS)
    spike = SpikeConfig(policy=policy, factor=factor, window=6)  # type: ignore[arg-type]
    return replace(config, train=replace(config.train, loss_spike=spike, rollback_after=rollback_after))


SPIKE = set(range(4 * 17, 4 * 18))  # all rows of step 18


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, recorder, model = toy_config(5), Recorder(2), ToyModel()
    trainer = toy_trainer(config, tmp_path, recorder, model, poisoned({4 * 2 + 1}))
    trainer.run()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recorder.stop_after = 3
    with caplog.at_level(logging.WARNING):
        trainer.run()
    assert "step 3 not applied: loss inf" in caplog.text
    assert [facts["step"] for facts in recorder.of("skipped")] == [3]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert len(model.bias_updates) == 2
    state = frozen(tmp_path)[1]
    assert state["counters"]["judged"]["skipped"] == 1
    assert state["position"] == 12  # the rows are passed over
    assert state["optimizer"] == {"updates": 2}
    recorder.stop_after = None
    assert trainer.run().finished
    assert len(model.bias_updates) == 4


def test_a_streak_is_replayed_once_and_then_ends_the_run_with_a_diagnosis(tmp_path: Path) -> None:
    recorder = Recorder()
    bad = range(4 * 5, 4 * 40)
    with pytest.raises(DivergenceError) as raised:
        toy_trainer(toy_config(), tmp_path, recorder, rows=poisoned(bad)).run()
    text = str(raised.value)
    assert "5 steps in a row, up to step 10, were not applied (not finite), and again after they were replayed" in text
    assert "all weights are finite, gradients that are not finite: " in text
    assert "embed_tokens.weight (rank 0)" in text
    assert "recipe.learning_rate.peak" in text
    assert [(facts["step"], facts["to"]) for facts in recorder.of("rollback")] == [(10, 4)]
    skipped = [facts["step"] for facts in recorder.of("skipped")]
    assert skipped == [6, 7, 8, 9, 10, 6, 7, 8, 9]  # the run ends at the last
    assert recorder.shown == [1, 2, 3, 4, 5, 6, 7, 8, 9, 5, 6, 7, 8, 9]
    assert steps(tmp_path) == [4, 8]
    # Four bad steps between good ones are survived, again and again.
    patchy = {4 * step for step in range(20) if step % 5}
    trainer = toy_trainer(toy_config(20), tmp_path / "patchy", rows=poisoned(patchy))
    assert trainer.run().finished
    assert trainer.summary()["skipped_steps"] == 16


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize("first", [1, 3, 7])
def test_a_passing_fault_of_the_machine_leaves_no_trace_in_the_result(
    tmp_path: Path, first: int, interval: int, keep: int
) -> None:
    """Steps `first` to `first` + 2 are not finite when they are taken for the first time, and may be saved."""
    config = toy_config()
    config = replace(config, checkpoint=replace(config.checkpoint, interval=interval, keep=keep))
    toy_trainer(config, tmp_path / "straight").run()
    bad = set(range(4 * (first - 1), 4 * (first + 2)))

    class Once(set):  # type: ignore[type-arg]
        def __contains__(self, position: object) -> bool:
            found = position in bad
            bad.discard(position)  # type: ignore[arg-type]
            return found

    config, recorder = replace(config, train=replace(config.train, rollback_after=3)), Recorder()
    assert toy_trainer(config, tmp_path / "hit", recorder, rows=poisoned(Once())).run().finished
    assert [facts["to"] for facts in recorder.of("rollback")] == [(first - 1) // interval * interval]
    assert_same_end(tmp_path / "hit", tmp_path / "straight")


def test_going_on_applies_a_spike_and_writes_it_down(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder, model = Recorder(), ToyModel()
    with caplog.at_level(logging.WARNING):
        toy_trainer(with_policy("go_on"), tmp_path, recorder, model, spiky(SPIKE)).run()
    (found,) = recorder.of("spike")
    assert (found["step"], found["policy"]) == (18, "go_on")
    losses = {step: metrics["loss"] for step, metrics in recorder.logged}
    assert found["mean"] == pytest.approx(sum(losses[step] for step in range(12, 18)) / 6)
    assert losses[18] > 1.25 * found["mean"]  # type: ignore[operator]
    assert "step 18 applied all the same" in caplog.text
    assert recorder.of("skipped") == recorder.of("rollback") == []
    assert len(model.bias_updates) == STEPS


def test_skipping_leaves_a_spike_out(tmp_path: Path) -> None:
    """As if its rows were not finite: both are passed over, and nothing else happens."""
    recorder = Recorder()
    toy_trainer(with_policy("skip"), tmp_path / "spike", recorder, rows=spiky(SPIKE)).run()
    toy_trainer(with_policy("skip"), tmp_path / "infinite", rows=poisoned(SPIKE)).run()
    assert [(facts["step"], facts["why"]) for facts in recorder.of("skipped")] == [(18, "spike")]
    ours, theirs = (frozen(tmp_path / name)[0] for name in ("spike", "infinite"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_rolling_back_goes_on_with_other_rows(tmp_path: Path) -> None:
    read: list[int] = []
    recorder = Recorder()
    trainer = toy_trainer(with_policy("rollback"), tmp_path, recorder, rows=spiky(SPIKE, read))
    assert trainer.run().finished
    assert [(facts["step"], facts["to"], facts["rows_passed"]) for facts in recorder.of("rollback")] == [(18, 16, 8)]
    # Steps 1 to 18, then step 17 to the end with the rows behind those of step 18.
    assert read == [*range(4 * 18), *range(4 * 18, 4 * 18 + 4 * (STEPS - 16))]
    assert trainer.summary()["position"] == 4 * (STEPS + 2)
    assert trainer.summary()["skipped_steps"] == 0
    assert frozen(tmp_path)[1]["tokens"] == STEPS * 4 * LENGTH


Making = Callable[[], Rows]
WAYS: dict[str, tuple[Config, Making]] = {
    "not finite": (with_policy("go_on"), lambda: poisoned({4 * 6, 4 * 9, 4 * 10 + 3})),
    "skip": (with_policy("skip"), lambda: spiky(SPIKE)),
    "rollback": (with_policy("rollback"), lambda: spiky(SPIKE)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stops", [(17,), (18,), (3, 14, 1), (16, 1, 1, 1), (9, 9, 1, 2)])
def test_stopped_and_resumed_it_is_decided_as_if_it_had_not_been(tmp_path: Path, way: str, stops: tuple[int]) -> None:
    """`stops`: steps that each process takes. One checkpoint is kept, beside those that a policy may lead back to."""
    config, rows = WAYS[way]
    config = replace(config, recipe=replace(config.recipe, ema_decay=0.95))
    config = replace(config, checkpoint=replace(config.checkpoint, keep=1))
    toy_trainer(config, tmp_path / "straight", rows=rows()).run()
    for stop in stops:
        assert not toy_trainer(config, tmp_path / "broken", Recorder(stop), rows=rows()).run().finished
    assert toy_trainer(config, tmp_path / "broken", rows=rows()).run().finished
    assert_same_end(tmp_path / "broken", tmp_path / "straight")


def test_spikes_whatever_is_read_end_the_run(tmp_path: Path) -> None:
    recorder, rows = Recorder(), spiky(set(range(4 * 17, 4 * 100)))
    with pytest.raises(DivergenceError, match=r"3 times training went back to step 16.*train\.loss_spike\.factor"):
        toy_trainer(with_policy("rollback"), tmp_path, recorder, rows=rows).run()
    assert [facts["to"] for facts in recorder.of("rollback")] == [16] * 3


def test_too_many_spikes_in_a_row_are_as_steps_that_are_not_finite(tmp_path: Path) -> None:
    recorder, rows = Recorder(), spiky(set(range(4 * 17, 4 * 100)))
    with pytest.raises(DivergenceError, match=r"3 steps in a row, up to step 20, were not applied \(spike\)"):
        toy_trainer(with_policy("skip", rollback_after=3), tmp_path, recorder, rows=rows).run()
    assert [(facts["step"], facts["to"]) for facts in recorder.of("rollback")] == [(20, 16)]


def verdicts(losses: list[float], config: Config) -> list[Any]:
    policies, judged = Policies(config.train), Judged()
    return [policies.judge(judged, n, loss, True, lambda: "") for n, loss in enumerate(losses, 1)]


def test_a_spike_is_measured_against_a_full_window_of_applied_steps() -> None:
    config = with_policy("skip", factor=2.0)
    assert all(v.apply for v in verdicts([1.0, 9.0, 1.0, 1.0, 1.0, 9.0], config))  # the window of 6 is not full
    found = verdicts([1.0] * 6 + [2.0, 2.4, 2.2, 1.0], config)
    # 2.0 is no more than twice the mean; then the mean is 7/6, of which 2.4 is more than twice, and which it leaves.
    assert [v.apply for v in found[6:]] == [True, False, True, True]
    assert found[7].mean == pytest.approx(7 / 6)


def test_where_a_spike_leads_back_to() -> None:
    assert regular(10, step=27, first=0, newest=25) == 20
    assert regular(10, step=27, first=24, newest=25) == 24  # not behind the beginning of its phase
    assert regular(10, step=30, first=0, newest=30) == 30
    assert regular("auto", step=27, first=0, newest=25) == 25
