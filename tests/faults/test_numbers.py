"""Numbers that are none, and memory that changes by itself: found, named, and without consequence for the result."""

import json
import math
from pathlib import Path

import pytest

from faults.conftest import STEPS, Fresh
from faults.product import Product, compared, steps

pytestmark = pytest.mark.faults


def test_a_gradient_with_one_nan_on_one_rank_is_applied_on_none(fresh: Fresh, undisturbed: Product) -> None:
    product = fresh().with_fault("not_a_number", rank=1, step=14)
    stage = product.start()
    stage.until_step(15)
    stage.kill(0)  # the step is taken again, with the same end
    assert stage.wait() == 0, stage.said
    training = json.loads((product.place.artifact / "training.json").read_text())
    assert training["skipped_steps"] == 1
    assert {event["step"] for event in product.events("skipped")} == {14}
    assert math.isfinite(training["validation_loss"])
    for step in steps(product.checkpoints):
        name, state = f"step-{step:08d}", json.loads((product.checkpoints / f"step-{step:08d}/state.json").read_text())
        same = compared(product.checkpoints / name, undisturbed.checkpoints / name) == []
        assert same == (step < 14)
        assert state["optimizer"]["updates"] == step - (step >= 14)
    assert max(steps(product.checkpoints)) == STEPS


def test_bits_that_flip_on_one_rank_are_found_and_undone(fresh: Fresh, undisturbed: Product, tmp_path: Path) -> None:
    product = fresh("launch.verify_every=1").with_fault(
        "flip", rank=1, at={"weight": 10, "moment": 15}, once=str(tmp_path / "once")
    )
    stage = product.run()
    assert stage.code == 0, stage.said
    found = product.events("corruption")
    assert [(event["ranks"], event["step"]) for event in found] == [([1], 10), ([1], 15)]
    assert product.differences(undisturbed) == []
