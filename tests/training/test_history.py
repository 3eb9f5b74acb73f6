"""The log of a run."""

import pytest

from headrace.training.history import History, max_violation, shares, wants_load


def test_max_violation_of_known_loads() -> None:
    assert max_violation([[5, 5, 5, 5], [20, 0, 0, 0], [6, 2, 4, 4]]) == pytest.approx([0.0, 3.0, 0.5])


def test_shares_sum_to_one_per_layer() -> None:
    assert shares([[1, 3], [2, 2]]) == [[0.25, 0.75], [0.5, 0.5]]


def test_state_round_trip_and_rows_by_step() -> None:
    history = History()
    history.add(10, 1000, {"loss": 3.0})
    history.add(10, 1000, {"validation_loss": 3.5})
    history.add(20, 2000, {"loss": 2.0})
    history.add_load(20, [[1, 2]])
    copy = History(history.state())
    assert copy.rows == [
        {"step": 10, "tokens": 1000, "loss": 3.0, "validation_loss": 3.5},
        {"step": 20, "tokens": 2000, "loss": 2.0},
    ]
    assert (copy.load_steps, copy.loads) == ([20], [[[1, 2]]])
    assert (copy.last("validation_loss"), copy.last("other")) == (3.5, None)
    assert copy.recent_mean("loss", 2) == 2.5


@pytest.mark.parametrize("steps", [1, 7, 60, 1464, 235_239])
def test_load_is_kept_at_the_ends_and_about_a_hundred_times(steps: int) -> None:
    kept = [step for step in range(1, steps + 1) if wants_load(step, steps)]
    assert {1, steps} <= set(kept)
    assert len(kept) <= 202
    assert len(kept) >= min(steps, 100)
