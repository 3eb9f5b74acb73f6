"""Numbers that are none, and memory that changes by itself: found, named, and without consequence for the result."""

import json
import math
from pathlib import Path

import pytest

from faults.conftest import Fresh
from faults.product import Product, compared, steps

pytestmark = pytest.mark.faults


def test_a_gradient_that_is_not_finite_on_one_rank_is_applied_on_none(
    fresh: Fresh, undisturbed: Product, tmp_path: Path
) -> None:
    """Inf and NaN in two steps in a row, when they are taken for the first time; later NaN in one step, always."""
    passing = {"at": {"6": "inf", "7": "nan"}, "once": str(tmp_path / "once")}
    product = fresh().with_fault("not_a_number", rank=1, **passing)
    product = product.with_fault("not_a_number", rank=1, at={"14": "nan"})
    stage = product.start()
    stage.until_step(15)
    stage.kill(0)  # the step is taken again, with the same end
    assert stage.wait() == 0, stage.said
    training = json.loads((product.place.artifact / "training.json").read_text())
    assert training["skipped_steps"] == 1
    assert {event["step"] for event in product.events("skipped")} == {6, 7, 14}
    [rollback] = product.events("rollback")
    assert (rollback["step"], rollback["to"], rollback["why"]) == (7, 4, "not finite")
    assert math.isfinite(training["validation_loss"])
    assert steps(product.checkpoints) == steps(undisturbed.checkpoints)
    for step in steps(product.checkpoints):
        name, state = f"step-{step:08d}", json.loads((product.checkpoints / f"step-{step:08d}/state.json").read_text())
        same = compared(product.checkpoints / name, undisturbed.checkpoints / name) == []
        assert same == (step < 14)
        assert state["optimizer"]["updates"] == step - (step >= 14)


def test_bits_that_flip_on_one_rank_are_found_and_undone(fresh: Fresh, undisturbed: Product, tmp_path: Path) -> None:
    product = fresh("launch.verify_every=1").taking_up(undisturbed, 8)
    product = product.with_fault("flip", rank=1, at={"weight": 10, "moment": 15}, once=str(tmp_path / "once"))
    stage = product.run()
    assert stage.code == 0, stage.said
    found = product.events("corruption")
    assert [(event["ranks"], event["step"]) for event in found] == [([1], 10), ([1], 15)]
    assert product.differences(undisturbed) == []
