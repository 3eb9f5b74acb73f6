"""Numbers that are none or far too high, and bits that change by themselves: found, named, dealt with as is said."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from faults.conftest import STEPS, Fresh
from faults.product import Product, compared, spike, steps

pytestmark = pytest.mark.faults


def state(product: Product, step: int) -> dict[str, Any]:
    """What is no tensor of a checkpoint."""
    found: dict[str, Any] = json.loads((product.checkpoints / f"step-{step:08d}/state.json").read_text())
    return found


def test_a_gradient_that_is_not_finite_on_one_rank_is_applied_on_none_and_a_spike_is_rolled_back(
    fresh: Fresh, undisturbed: Product, tmp_path: Path
) -> None:
    """Inf and NaN in two steps in a row, when they are taken for the first time; later NaN in one step, always.

    Then one rank's loss is ten times as high, once: back to the last checkpoint, and on with other rows.
    """
    passing = {"at": {"6": "inf", "7": "nan"}, "once": str(tmp_path / "once")}
    product = fresh().with_fault("not_a_number", rank=1, **passing)
    product = product.with_fault("not_a_number", rank=1, at={"14": "nan"})
    product = product.with_fault("spike", rank=1, step=22, once=str(tmp_path / "spike"))
    stage = product.start()
    stage.until_step(15)
    stage.kill(0)  # the step is taken again, with the same end
    assert stage.wait() == 0, stage.said
    training = json.loads((product.place.artifact / "training.json").read_text())
    assert training["skipped_steps"] == 1
    assert {event["step"] for event in product.events("skipped")} == {6, 7, 14, 22}
    rollbacks = [tuple(event[key] for key in ("step", "to", "why")) for event in product.events("rollback")]
    assert rollbacks == [(7, 4, "not finite"), (22, 20, "spike")]
    assert spike(product) == (22, "rollback")
    assert training["position"] == (STEPS + 2) * 4
    assert math.isfinite(training["validation_loss"])
    assert steps(product.checkpoints) == steps(undisturbed.checkpoints)
    for step in steps(product.checkpoints):
        name = f"step-{step:08d}"
        same = compared(product.checkpoints / name, undisturbed.checkpoints / name) == []
        assert same == (step < 14)
        assert state(product, step)["optimizer"]["updates"] == step - (step >= 14)


def test_a_spike_is_skipped_where_the_policy_says_so(fresh: Fresh, undisturbed: Product, tmp_path: Path) -> None:
    """From a checkpoint under the other policy; that a spike is gone on from is in `test_resume.py`."""
    product = fresh("train.loss_spike.policy=skip", "checkpoint.accept_other=true").taking_up(undisturbed, 20)
    stage = product.with_fault("spike", rank=1, step=22, once=str(tmp_path / "spike")).run()
    assert stage.code == 0, stage.said
    assert spike(product) == (22, "skip")
    assert [(event["step"], event["why"]) for event in product.events("skipped")] == [(22, "spike")]
    assert product.events("rollback") == []
    assert state(product, STEPS)["optimizer"]["updates"] == STEPS - 1


FLIPS = {"weight": 10, "copy": 10, "activation": 14, "moment": 15, "gradient": 18, "arrived": 20}
"""Of two steps one is computed twice, and 14 and 18 are drawn. Copies are compared before the next update."""


def test_bits_that_flip_on_one_rank_are_found_and_undone(fresh: Fresh, undisturbed: Product, tmp_path: Path) -> None:
    product = fresh("launch.verify_every=1", "launch.recompute_every=2").taking_up(undisturbed, 8)
    stage = product.with_fault("flip", rank=1, at=FLIPS, once=str(tmp_path / "once")).run()
    assert stage.code == 0, stage.said
    where = {what: (tmp_path / f"once.{what}").read_text() for what in FLIPS}
    found = product.events("corruption")
    assert [(event["ranks"], event["step"], event["check"]) for event in found] == [
        ([1], 10, "memory"), ([1], 14, "recomputation"), ([1], 15, "memory"), ([1], 18, "recomputation"),
        ([0, 1], 21, "replicas"),
    ]  # fmt: skip
    memory, activation, moment, gradient, copies = (event["what"] for event in found)
    assert where["weight"] in memory
    assert where["copy"] in memory
    assert activation.startswith("rank 1: experts of ")
    assert where["moment"] in moment
    assert gradient.startswith(f"rank 1: weight gradients of {where['gradient']} came out different")
    assert copies.endswith(f"without a majority, hold different values of {where['arrived']}")
    assert (
        product.events("resumed")[-1]["step"] == 16
    )  # not from step 20, which may have been saved with the wrong copy
    assert product.differences(undisturbed) == []
