"""Smoothing, relative differences and intervals against numbers worked out by hand and against published tables."""

import math

import numpy as np
import pytest

from headrace.evaluation.paired_curves import compare, interval_by_step, mean_interval, smooth
from headrace.evaluation.statistics import student_quantile

NAN = float("nan")


def test_smoothing_by_hand() -> None:
    # weights 1; 1/2, 1; 1/4, 1/2, 1
    assert smooth([4.0, 1.0, 2.0], 0.5, 3).tolist() == [4.0, (2 + 1) / 1.5, (1 + 0.5 + 2) / 1.75]


def test_a_constant_curve_stays_where_it_is_from_its_first_step() -> None:
    assert smooth([3.0] * 50, 0.9, 50) == pytest.approx([3.0] * 50, rel=1e-14)


def test_no_smoothing_gives_the_losses_back() -> None:
    assert smooth([3.0, 1.0, 2.0], 0.0, 3).tolist() == [3.0, 1.0, 2.0]


def test_a_step_that_is_not_finite_is_passed_over_but_ages_the_others() -> None:
    assert smooth([4.0, None, 1.0], 0.5, 3).tolist() == [4.0, 4.0, (1 + 1) / 1.25]
    first_missing = smooth([None, 5.0], 0.9, 2)
    assert math.isnan(first_missing[0])
    assert first_missing[1] == 5.0


def test_a_run_that_ended_early_leaves_no_numbers_behind() -> None:
    curve = smooth([4.0, 2.0], 0.5, 4)
    assert np.isfinite(curve).tolist() == [True, True, False, False]


# 97.5 % points of Student's distribution, as printed in every table of it.
TABLE = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    6: 2.447,
    7: 2.365,
    10: 2.228,
    15: 2.131,
    30: 2.042,
    120: 1.980,
}


@pytest.mark.parametrize(("degrees", "printed"), TABLE.items())
def test_students_quantiles_are_those_of_the_tables(degrees: int, printed: float) -> None:
    assert student_quantile(degrees) == pytest.approx(printed, abs=6e-4)


def test_the_interval_by_hand() -> None:
    # 1, 2, 6: mean 3, variance (4 + 1 + 9) / 2 = 7, half-width 4.3027 * sqrt(7 / 3)
    found = mean_interval(np.array([1.0, 2.0, 6.0]))
    assert found is not None
    assert (found.value, found.units) == (3.0, 3)
    assert found.low == pytest.approx(3 - 4.3026527 * math.sqrt(7 / 3), abs=1e-6)
    assert found.high == pytest.approx(3 + 4.3026527 * math.sqrt(7 / 3), abs=1e-6)


def test_the_interval_covers_in_95_of_100_studies() -> None:
    drawn = np.random.default_rng(0).normal(0.3, 2.0, size=(3, 20_000))
    band = interval_by_step(drawn)
    covered = float(((band.low <= 0.3) & (band.high >= 0.3)).mean())
    assert covered == pytest.approx(0.95, abs=0.005)


def test_a_missing_value_is_no_average_of_the_others() -> None:
    assert mean_interval(np.array([1.0, NAN, 2.0])) is None


def test_two_pairs_by_hand() -> None:
    baseline = np.array([[8.0, 4.0, 2.0, 2.0], [8.0, 5.0, 4.0, 4.0]])
    candidate = np.array([[8.0, 4.0, 2.02, 2.04], [8.0, 5.0, 4.0, 3.96]])
    found = compare(baseline, candidate)
    assert found.each_PS == pytest.approx(np.array([[0, 0, 0.01, 0.02], [0, 0, 0.0, -0.01]]))
    assert found.second_half_each == pytest.approx((0.015, -0.005))
    assert found.end_each == pytest.approx((0.02, -0.01))
    assert found.second_half is not None and found.second_half.high is not None
    assert found.second_half.value == pytest.approx(0.005)
    # two values: standard error is half their distance, and t(1) = 12.706
    assert found.second_half.high - found.second_half.value == pytest.approx(12.7062047 * 0.01, rel=1e-6)
    assert found.band.mean == pytest.approx([0, 0, 0.005, 0.005])
    assert found.largest == pytest.approx(0.005)
    # seeds end at 2 and 4: standard deviation sqrt(2), mean 3
    assert found.spread == pytest.approx(math.sqrt(2) / 3)


def test_equal_runs_differ_by_nothing() -> None:
    curves = np.array([[3.0, 2.0], [3.0, 2.5]])
    found = compare(curves, curves.copy())
    assert found.second_half is not None
    assert (found.second_half.value, found.second_half.low, found.second_half.high) == (0.0, 0.0, 0.0)


def test_a_pair_that_diverged_leaves_the_study_without_a_mean_but_not_without_the_other_pair() -> None:
    baseline = np.array([[3.0, 2.0, 2.0], [3.0, 2.0, 2.0]])
    candidate = np.array([[3.0, NAN, NAN], [3.0, 2.0, 2.1]])
    found = compare(baseline, candidate)
    assert (found.second_half, found.end, found.largest) == (None, None, None)
    assert found.end_each == (None, pytest.approx(0.05))
    assert np.isfinite(found.band.mean).tolist() == [True, False, False]
    assert found.spread == 0.0
