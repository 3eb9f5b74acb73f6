"""The pieces of schedules at and around their ends, against what their names say."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.recipe.curves import Chain, Constant, Cosine, Exponential, Linear, Switch, steps_up


def test_each_piece_begins_and_ends_where_it_says() -> None:
    assert [Constant(3.0)(seen) for seen in (0, 10**15)] == [3.0, 3.0]
    assert [Linear(2, 10, 8)(seen) for seen in (0, 1, 4, 8, 9)] == [2, 3, 6, 10, 10]
    assert [Exponential(1, 16, 4)(seen) for seen in (0, 1, 2, 4, 9)] == [1, 2, 4, 16, 16]
    assert [Switch(0.3, 0.1, 5)(seen) for seen in (0, 4, 5)] == [0.3, 0.3, 0.1]
    cosine = Cosine(1.0, 0.1, 300)
    assert [cosine(seen) for seen in (0, 150, 300, 301)] == [1.0, pytest.approx(0.55), 0.1, 0.1]
    assert cosine(100) == pytest.approx(0.1 + 0.9 * 0.75)  # cos(60 degrees) = 1/2


def test_a_boundary_of_a_chain_belongs_to_what_follows() -> None:
    chain = Chain((10, Constant(1.0)), (0, Constant(2.0)), (5, Linear(3, 8, 5)), last=Constant(9.0))
    assert [chain(seen) for seen in (0, 9, 10, 11, 14, 15, 99)] == [1, 1, 3, 4, 7, 9, 9]
    assert chain.ends == (10, 10, 15)
    assert Chain(last=Linear(0, 10, 10))(4) == 4


@given(
    st.integers(1, 50), st.integers(1, 50), st.integers(1, 10**13), st.integers(1, 300),
    st.sampled_from([Linear, Exponential]),
)  # fmt: skip
def test_a_rising_curve_reaches_each_step_at_the_first_token_that_it_can(
    first: int, more: int, tokens: int, multiple: int, shape: type[Linear | Exponential]
) -> None:
    low, high = first * multiple, (first + more) * multiple
    curve = shape(low, high, tokens)
    found = list(steps_up(curve, low, high, multiple))
    assert [value for _, value in found] == list(range(low, high + 1, multiple))
    assert (found[0][0], found[-1][0]) == (0, tokens)
    for seen, value in found:
        if shape is Linear:
            assert _line(low, high, tokens, seen) >= value
            assert seen == 0 or _line(low, high, tokens, seen - 1) < value
        else:
            assert curve(seen) > value * (1 - 1e-9)
            assert math.log(value / low) / math.log(high / low) * tokens > seen - 1 - 1e-3


def _line(low: int, high: int, tokens: int, seen: int) -> Fraction:
    return low + Fraction(high - low) * seen / tokens
