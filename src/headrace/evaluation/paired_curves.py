"""How far two ways of training are apart, told from their loss curves: smoothing, relative difference, intervals.

DeepSeek-V3's report compares FP8 with BF16 by the relative loss error over training, on curves that an exponential
moving average with coefficient 0.9 has smoothed, and finds it below 0.25 % throughout (arXiv 2412.19437, section 3.3
and appendix B.1). Runs that differ in nothing but the format (same initial weights, same rows) make a pair; a pair's
difference holds less noise than two runs have on their own, and several pairs with seeds of their own say how much is
left. So the unit is the pair: intervals are Student's t over pairs (95 %), at each step and for figures of a whole run.

    smoothed    s_t = sum_i b^(t-i) x_i / sum_i b^(t-i) over the steps i <= t, b the coefficient: the moving average
                with its bias towards the start taken out (the report does not say how its average begins)
    difference  r_t = (candidate's s_t - baseline's s_t) / baseline's s_t
    headline    mean of r_t over the second half of the steps; r_t at the last step is given beside it
    spread      standard deviation over seeds of the baseline's s_t averaged over the same half, relative to their mean:
                what another seed does to the same run

A step whose loss was not finite is passed over by the average, as the trainer passes it over. Past the step at which a
run diverged its curve is NaN, and so is whatever would need it: a missing value is never an average of the others.
Legend: P pairs, S steps. This module draws nothing and corrects for no multiple comparisons.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace.evaluation.statistics import Estimate, student_quantile

Floats = NDArray[np.float64]

LINE = 0.0025
"""The report's bound on the relative loss error."""


@dataclass(frozen=True)
class Band:
    """A mean over pairs and its 95 % interval at every step: three arrays [S]."""

    mean: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True)
class Comparison:
    """Candidate against baseline. Estimates are None where a run of a pair diverged."""

    each_PS: Floats  # relative difference of every pair at every step
    band: Band
    second_half: Estimate | None
    second_half_each: tuple[float | None, ...]
    end: Estimate | None
    end_each: tuple[float | None, ...]
    largest: float | None  # of |mean over pairs| over the second half
    spread: float | None  # of the baseline's runs


def compare(baseline_PS: Floats, candidate_PS: Floats) -> Comparison:
    """Compare smoothed curves, row by row of the same pair; at least two pairs."""
    assert baseline_PS.shape == candidate_PS.shape and len(baseline_PS) >= 2
    each = relative_difference(candidate_PS, baseline_PS)
    band = interval_by_step(each)
    halves, ends = second_half(each), each[:, -1]
    largest = float(np.abs(band.mean[each.shape[1] // 2 :]).max())
    return Comparison(
        each_PS=each,
        band=band,
        second_half=mean_interval(halves),
        second_half_each=tuple(map(finite, halves)),
        end=mean_interval(ends),
        end_each=tuple(map(finite, ends)),
        largest=finite(largest),
        spread=relative_spread(second_half(baseline_PS)),
    )


def smooth(losses: Sequence[float | None], smoothing: float, steps: int) -> Floats:
    """The moving average of a run's losses: [S] with S = `steps`; 0 <= `smoothing` < 1.

    `losses` holds one value per step that the run took, None where it was not finite; a run that ended early
    leaves NaN.
    """
    assert 0 <= smoothing < 1 and len(losses) <= steps
    result = np.full(steps, np.nan)
    total = weight = 0.0
    for step, loss in enumerate(losses):
        total, weight = smoothing * total, smoothing * weight
        if loss is not None:
            total, weight = total + loss, weight + 1.0
        result[step] = total / weight if weight else np.nan
    return result


def relative_difference(candidate: Floats, baseline: Floats) -> Floats:
    """(candidate - baseline) / baseline, elementwise."""
    return (candidate - baseline) / baseline


def second_half(curves_PS: Floats) -> Floats:
    """Mean of each curve over the second half of its steps: [P]."""
    means: Floats = curves_PS[..., curves_PS.shape[-1] // 2 :].mean(axis=-1)
    return means


def relative_spread(values: Floats) -> float | None:
    """Standard deviation over the mean of independent values; None where one of them is missing."""
    return finite(float(values.std(ddof=1) / values.mean()))


def mean_interval(values: Floats) -> Estimate | None:
    """The mean of independent values with its 95 % t interval; None where one of them is missing."""
    if not np.isfinite(values).all():
        return None
    band = interval_by_step(values[:, None])
    return Estimate(float(band.mean[0]), float(band.low[0]), float(band.high[0]), len(values))


def interval_by_step(each_PS: Floats) -> Band:
    """Mean over pairs and its 95 % t interval at every step."""
    pairs = len(each_PS)
    mean = each_PS.mean(axis=0)
    half = student_quantile(pairs - 1) * each_PS.std(axis=0, ddof=1) / math.sqrt(pairs)
    return Band(mean, mean - half, mean + half)


def finite(value: float) -> float | None:
    """A Python float for JSON, or None for what is not a finite number."""
    return float(value) if math.isfinite(value) else None
