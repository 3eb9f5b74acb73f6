import math

import numpy as np
import pytest
from scipy import stats

from headrace.evaluation.statistics import MIN_UNITS, ratio_of_sums, standard_error, wilson

SIMULATIONS = 400


def simulated_document_bits(generator: np.random.Generator, documents: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents of very unequal length whose bits per byte have mean 2 and do not depend on length."""
    size = generator.lognormal(6, 0.8, documents)
    return size * generator.normal(2, 0.4, documents), size


@pytest.mark.parametrize("documents", [25, 120])
def test_intervals_cover_the_truth_in_95_percent_of_simulated_evaluations(documents: int) -> None:
    generator = np.random.default_rng(7)
    hits = 0
    for seed in range(SIMULATIONS):
        bits, size = simulated_document_bits(generator, documents)
        estimate = ratio_of_sums(bits, size, 400, seed)
        hits += estimate.low <= 2 <= estimate.high
    # 93 to 97 % of the time, give or take what so many simulations can tell (a binomial 99.9 % margin)
    low, high = stats.binom.ppf(0.001, SIMULATIONS, 0.93), stats.binom.ppf(0.999, SIMULATIONS, 0.97)
    assert low <= hits <= high
    assert hits < SIMULATIONS  # intervals that always cover would be too wide


def test_paired_difference_is_far_more_certain_than_two_separate_figures() -> None:
    generator = np.random.default_rng(3)
    size = generator.lognormal(6, 0.8, 80)
    hard = generator.normal(2, 0.5, 80)
    better, worse = size * hard, size * (hard + generator.normal(0.05, 0.02, 80))
    paired = ratio_of_sums(better - worse, size, 500, 1)
    alone = ratio_of_sums(better, size, 500, 1)
    assert paired.high < 0 and (paired.high - paired.low) < 0.1 * (alone.high - alone.low)
    assert paired.value == pytest.approx(better.sum() / size.sum() - worse.sum() / size.sum())


def test_standard_error_behind_the_interval_agrees_with_scipy_where_all_documents_are_equally_long() -> None:
    values = np.random.default_rng(1).normal(3, 1, 400)
    estimate = ratio_of_sums(values, np.ones(400), 2000, 0)
    expected = stats.bootstrap((values,), np.mean, n_resamples=2000, method="BCa", rng=0).confidence_interval
    assert estimate.low == pytest.approx(expected.low, abs=0.02) and estimate.high == pytest.approx(
        expected.high, abs=0.02
    )


def test_bootstrap_repeats_with_its_seed_and_not_with_another() -> None:
    bits, size = simulated_document_bits(np.random.default_rng(0), 30)
    assert ratio_of_sums(bits, size, 300, 5) == ratio_of_sums(bits, size, 300, 5)
    assert ratio_of_sums(bits, size, 300, 5) != ratio_of_sums(bits, size, 300, 6)


def test_chunks_of_resamples_change_nothing_but_the_order_of_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    bits, size = simulated_document_bits(np.random.default_rng(0), 30)
    whole = ratio_of_sums(bits, size, 5000, 5)
    monkeypatch.setattr("headrace.evaluation.statistics._CELLS", 300)
    pieces = ratio_of_sums(bits, size, 5000, 5)
    assert pieces.low == pytest.approx(whole.low, rel=0.02) and pieces.value == whole.value


def test_too_few_documents_give_a_figure_without_interval() -> None:
    estimate = ratio_of_sums(np.array([2.0, 4.0]), np.array([1.0, 1.0]), 100, 0)
    assert (estimate.value, estimate.low, estimate.high, estimate.units) == (3.0, None, None, 2)
    alike = ratio_of_sums(np.full(MIN_UNITS, 2.0), np.ones(MIN_UNITS), 100, 0)
    assert (alike.value, alike.low, alike.high) == (2.0, None, None), "no spread seen is no certainty"


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 10), (81, 263), (10, 10), (50, 200)])
def test_wilson_equals_scipy(successes: int, trials: int) -> None:
    expected = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    estimate = wilson(successes, trials)
    assert estimate.low == pytest.approx(expected.low, abs=1e-12)
    assert estimate.high == pytest.approx(expected.high, abs=1e-12)


def test_standard_error_is_that_of_the_mean() -> None:
    values = np.array([1.0, 2.0, 4.0, 9.0])
    assert standard_error(values) == pytest.approx(float(stats.sem(values)))
    assert standard_error(values[:1]) is None
    assert not math.isnan(standard_error(values[:2]) or 0.0)
