"""The order is a bijection of every epoch, differs between epochs and seeds, and mixes."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.tokens.order import row_at


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**40), st.integers(1, 700), st.integers(0, 10**9))
def test_every_epoch_meets_every_row_once(seed: int, rows: int, epoch: int) -> None:
    met = [row_at(seed, epoch * rows + index, rows) for index in range(rows)]
    assert sorted(met) == list(range(rows))


def test_every_small_number_of_rows() -> None:
    for rows in range(1, 130):
        assert sorted(row_at(3, index, rows) for index in range(rows)) == list(range(rows))


def test_epochs_and_seeds_differ() -> None:
    orders = [[row_at(seed, epoch * 500 + i, 500) for i in range(500)] for seed in (0, 1) for epoch in (0, 1)]
    for number, one in enumerate(orders):
        for other in orders[number + 1 :]:
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 10  # one is expected by chance


def test_positions_are_uncorrelated_with_rows() -> None:
    rows = 20_000
    order = [row_at(7, index, rows) for index in range(rows)]
    distance = sum(abs(row - index) for index, row in enumerate(order)) / rows**2
    assert abs(distance - 1 / 3) < 0.01  # the mean of |x - y| for independent uniform x, y
    steps = sum((a - b) ** 2 for a, b in itertools.pairwise(order)) / rows**3
    assert abs(steps - 1 / 6) < 0.01


def test_a_run_of_trillions_of_tokens_needs_no_more_than_an_integer() -> None:
    rows = 3_613_000_000  # 14.8T tokens in rows of 4,096
    seen = {row_at(1, 3_000_000_000 + index, rows) for index in range(2000)}
    assert len(seen) == 2000 and max(seen) < rows


def test_the_order_of_a_published_run_never_changes() -> None:
    assert [row_at(1234, position, 1000) for position in (0, 1, 2, 999, 1000, 123_456_789)] == [
        913,
        98,
        418,
        48,
        189,
        365,
    ]
