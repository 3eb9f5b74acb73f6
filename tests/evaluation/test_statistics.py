"""Intervals cover the truth in simulated evaluations where naive ones do not; the rest against scipy and by hand."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from headrace.evaluation.statistics import (
    MIN_UNITS,
    Estimate,
    clustered_mean,
    holm,
    mean_difference,
    minimum_detectable_effect,
    proportion,
    ratio_difference,
    ratio_of_sums,
    standard_error,
    wilson,
)

SIMULATIONS = 1000
COVERED = range(930, 971)
"""93 to 97 % of 1,000 simulated evaluations."""

Generator = np.random.Generator
Simulated = tuple[Estimate, Estimate, float]
"""An interval of ours, the naive one, and the truth."""


def covers(estimate: Estimate, truth: float) -> bool:
    assert estimate.low is not None and estimate.high is not None
    return estimate.low <= truth <= estimate.high


def naive_mean(values: np.ndarray) -> Estimate:
    """What every item for itself would give: mean +- 1.96 sd / sqrt(n)."""
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    return Estimate(values.mean(), values.mean() - half, values.mean() + half, len(values))


def naive_ratio(numerator: np.ndarray, denominator: np.ndarray) -> Estimate:
    """Every row for itself: the delta method's standard error of a ratio of means of independent pairs."""
    value = numerator.sum() / denominator.sum()
    spread = (numerator - value * denominator).std(ddof=1)
    half = 1.96 * spread / denominator.mean() / math.sqrt(len(numerator))
    return Estimate(value, value - half, value + half, len(numerator))


def passages(generator: Generator, count: int) -> np.ndarray:
    """The passage of every item: `count` passages with 1 to 10 questions each."""
    return np.repeat(np.arange(count), generator.integers(1, 11, count))


def scores_by_passage(generator: Generator, _: int) -> Simulated:
    """Scores with a passage's difficulty in them; the mean over passages and questions is 3."""
    owner = passages(generator, 40)
    values = 3 + generator.normal(0, 1, 40)[owner] + generator.normal(0, 1, len(owner))
    return clustered_mean(values, owner.tolist()), naive_mean(values), 3.0


def answers_by_passage(generator: Generator, _: int) -> Simulated:
    """Right and wrong answers at chance level of four choices, whole passages being easy or hard."""
    owner = passages(generator, 40)
    hits = generator.random(len(owner)) < generator.beta(0.5, 1.5, 40)[owner]
    return proportion(hits.astype(int).tolist(), owner.tolist()), wilson(int(hits.sum()), len(hits)), 0.25


def rare_answers(generator: Generator, _: int) -> Simulated:
    """Few right answers to independent questions, where the textbook's p +- 1.96 sqrt(p q / n) is much too sure."""
    truth = float(generator.uniform(0.02, 0.1))
    hits = (generator.random(60) < truth).astype(int)
    return proportion(hits.tolist()), naive_mean(hits.astype(float)), truth


def documents(generator: Generator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The document of every row, rows per document very unequal; bits and bytes of each row, 2 bits per byte."""
    owner = np.repeat(np.arange(count), np.ceil(generator.lognormal(1.5, 0.8, count)).astype(int))
    size = generator.uniform(200, 300, len(owner))
    rate = generator.normal(2, 0.4, count)[owner] + generator.normal(0, 0.2, len(owner))
    return owner, size * rate, size


def bits_of_documents(count: int) -> Callable[[Generator, int], Simulated]:
    def simulate(generator: Generator, seed: int) -> Simulated:
        owner, bits, size = documents(generator, count)
        own = ratio_of_sums(np.bincount(owner, bits), np.bincount(owner, size), 400, seed)
        return own, naive_ratio(bits, size), 2.0

    return simulate


def paired_answers(generator: Generator, _: int) -> Simulated:
    """Two models on the same questions; how much better the second is depends on the passage, 5 points on average."""
    owner = passages(generator, 50)
    easy, gain = generator.uniform(0.2, 0.6, 50)[owner], generator.choice([-0.2, 0.3], 50)[owner]
    luck = generator.random(len(owner))  # what makes a question hard for one makes it hard for the other
    first, second = (luck < easy).astype(float), (luck < easy + gain).astype(float)
    own = mean_difference(second - first, owner.tolist()).estimate
    return own, naive_mean(second - first), 0.05


def paired_bits(generator: Generator, seed: int) -> Simulated:
    """Two models on the same documents, the second 0.05 bits per byte better on average, by document more or less."""
    owner, _, size = documents(generator, 30)
    change = size * (generator.normal(-0.05, 0.1, 30)[owner] + generator.normal(0, 0.05, len(owner)))
    own = ratio_difference(np.bincount(owner, change), np.bincount(owner, size), 400, seed).estimate
    return own, naive_ratio(change, size), -0.05


KINDS: dict[str, tuple[Callable[[Generator, int], Simulated], float]] = {
    "mean, clustered by passage": (scores_by_passage, 0.80),
    "proportion, clustered by passage": (answers_by_passage, 0.85),
    "proportion, independent and rare": (rare_answers, 0.92),
    "bits per byte, 25 documents": (bits_of_documents(25), 0.75),
    "bits per byte, 120 documents": (bits_of_documents(120), 0.75),
    "paired difference of scores": (paired_answers, 0.85),
    "paired difference of bits per byte": (paired_bits, 0.75),
}
"""A simulated evaluation of each kind, and the share of them in which the naive interval covers the truth at most."""


@pytest.mark.parametrize("kind", KINDS)
def test_intervals_cover_the_truth_in_95_percent_of_evaluations_and_naive_ones_do_not(kind: str) -> None:
    simulate, naive_at_most = KINDS[kind]
    generator, ours, naive = np.random.default_rng(20412), 0, 0
    for seed in range(SIMULATIONS):
        own, other, truth = simulate(generator, seed)
        ours += covers(own, truth)
        naive += covers(other, truth)
    assert ours in COVERED
    assert naive <= naive_at_most * SIMULATIONS


def test_clustered_standard_error_is_millers_sum_over_pairs_of_a_cluster() -> None:
    """arXiv 2411.00640, eq. 4, written out, with the factor for few clusters that the formula of the book has."""
    generator = np.random.default_rng(1)
    owner = passages(generator, 12)
    values = generator.normal(0, 1, len(owner)) + owner
    centred = values - values.mean()
    pairs = sum(centred[i] * centred[j] for i in range(len(owner)) for j in range(len(owner)) if owner[i] == owner[j])
    error = math.sqrt(pairs * 12 / 11) / len(owner)
    estimate = clustered_mean(values, owner.tolist())
    assert estimate.units == 12 and estimate.value == pytest.approx(values.mean())
    sizes = np.bincount(owner).astype(float)
    effective = 12 / (1 + (sizes**2).var() / (sizes**2).mean() ** 2)  # Carter et al. 2017: G / (1 + CV^2)
    assert 5 < effective < 12
    assert estimate.high - estimate.value == pytest.approx(stats.t.ppf(0.975, int(effective) - 1) * error)


def test_without_clusters_mean_and_paired_difference_are_students() -> None:
    generator = np.random.default_rng(2)
    first, second = generator.normal(0, 1, 30), generator.normal(0.4, 1, 30)
    found, expected = mean_difference(second - first), stats.ttest_rel(second, first)
    low, high = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.estimate.low, found.estimate.high) == (pytest.approx(low), pytest.approx(high))


def test_an_effect_of_the_detectable_size_is_found_in_80_percent_of_evaluations() -> None:
    generator, found = np.random.default_rng(3), 0
    effect = minimum_detectable_effect(1 / math.sqrt(200))
    for _ in range(SIMULATIONS):
        difference = mean_difference(generator.normal(effect, 1, 200))
        assert difference.p is not None
        found += difference.p < 0.05
    assert stats.binom.ppf(0.001, SIMULATIONS, 0.8) <= found <= stats.binom.ppf(0.999, SIMULATIONS, 0.8)


def test_969_items_detect_three_points_as_the_paper_says() -> None:
    """arXiv 2411.00640, section 5: variance 1/9 of the conditional means, no noise of sampling."""
    assert minimum_detectable_effect(math.sqrt(1 / 9 / 969)) == pytest.approx(0.03, rel=1e-3)


def test_holm_is_the_closed_test_of_bonferroni() -> None:
    """The adjusted p-value of a hypothesis is the largest Bonferroni p-value of all sets that it is in."""
    generator = np.random.default_rng(4)
    for count in (1, 2, 5):
        p = generator.random(count) ** 3
        sets = [s for size in range(1, count + 1) for s in itertools.combinations(range(count), size)]
        closed = [max(min(1, len(s) * min(p[list(s)])) for s in sets if i in s) for i in range(count)]
        assert holm(p.tolist()) == pytest.approx(closed)
    assert holm([]) == []


def test_with_holm_one_table_in_twenty_errs_and_without_one_in_three() -> None:
    """Eight tasks on which two models do not differ, their p-values from clustered items."""
    generator, any_holm, any_plain = np.random.default_rng(5), 0, 0
    for _ in range(SIMULATIONS):
        p = []
        for _task in range(8):
            owner = passages(generator, 30)
            found = mean_difference(
                generator.normal(0, 1, 30)[owner] + generator.normal(0, 1, len(owner)), owner.tolist()
            )
            assert found.p is not None
            p.append(found.p)
        any_holm += min(holm(p)) < 0.05
        any_plain += min(p) < 0.05
    assert any_holm <= stats.binom.ppf(0.999, SIMULATIONS, 0.05)
    assert any_plain >= 250


def test_the_bootstraps_p_value_is_below_5_percent_where_its_interval_leaves_out_zero() -> None:
    generator, out = np.random.default_rng(6), 0
    for seed in range(200):
        size = generator.lognormal(6, 0.8, 30)
        found = ratio_difference(size * generator.normal(0.03, 0.1, 30), size, 999, seed)
        assert found.p is not None and found.estimate.low is not None and found.estimate.high is not None
        out += (outside := found.estimate.low > 0 or found.estimate.high < 0)
        assert outside == (found.p < 0.05) or abs(found.p - 0.05) < 0.003
    assert 20 < out < 180


def test_no_spread_gives_no_p_value() -> None:
    for found in (mean_difference(np.zeros(40)), ratio_difference(np.zeros(40), np.ones(40), 100, 0)):
        assert (found.estimate.value, found.estimate.low, found.p, found.detectable) == (0.0, None, None, None)


def test_passages_that_fall_as_one_count_as_one_item_each() -> None:
    hits = [1] * 50 + [0] * 150  # 40 passages of five questions
    owner = [place // 5 for place in range(200)]
    clustered, alike = proportion(hits, owner), proportion([0] * 200, owner)
    assert clustered.units == 40 and clustered.value == 0.25
    forty = stats.binomtest(10, 40).proportion_ci(0.95, method="wilson")
    assert clustered.high - clustered.low == pytest.approx(forty.high - forty.low, rel=0.06)
    assert alike.low == 0 and alike.high == pytest.approx(
        stats.binomtest(0, 40).proportion_ci(0.95, method="wilson").high, rel=0.1
    )
    assert proportion(hits) == wilson(50, 200)


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


def simulated_document_bits(generator: Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    owner, bits, size = documents(generator, count)
    return np.bincount(owner, bits), np.bincount(owner, size)


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
    few = proportion([1, 0, 1, 1], ["a", "a", "b", "b"])
    assert (few.value, few.low, few.high, few.units) == (0.75, None, None, 2)


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
