"""The precision study as figures and sentences: a section of the report, and a page of its own.

Differences are drawn in percent of the baseline's loss, beside the report's line and what another seed does. What the
figures cannot say alone, whether the mean and its interval lie within the line, is said in one sentence.
"""

from typing import Any

from headrace.reporting.curves import Line, LineChart, Points
from headrace.reporting.facts import Estimate, PrecisionStudy, StudyDifference
from headrace.reporting.figures import Figure, curve, twice
from headrace.reporting.quantities import fixed, interval, plain
from headrace.reporting.whiskers import Row, WhiskerChart, draw_whiskers

MEANING = {
    "no_promotion": "sums stay in Hopper's 14-bit accumulators",
    "per_tensor": "one scale for a whole tensor",
    "block_gradients": "gradients of activations in 128x128 blocks",
}
DIGITS = 2  # decimals of a percentage
_MINUS = "\N{MINUS SIGN}"


def section(study: PrecisionStudy) -> dict[str, Any]:
    """All that the template of the section needs."""
    return {
        "study": study,
        "name": f"{study.candidate} {_MINUS} {study.baseline}",
        "sentence": sentence(study),
        "figures": [
            figure for figure in (difference_figure(study), whisker_figure(study), ablation_figure(study)) if figure
        ],
        "pairs": [(f"pair {pair}", True) for pair in range(study.pairs)],
        "differences": [
            (row.measure, _percent(row), [_share(value) for value in row.each]) for row in study.differences
        ],
        "ablations": [
            (
                row.name,
                MEANING.get(row.name, ""),
                *map(_share, (row.second_half, row.end, row.validation)),
                row.diverged_at,
            )
            for row in study.ablations
        ],
        "spread": _unsigned(study.spread),
        "largest": _unsigned(study.largest),
        "line": f"{fixed(100 * study.line, DIGITS)} %",
    }


def sentence(study: PrecisionStudy) -> str:
    """Whether the study bears the report's claim out."""
    line = f"{fixed(100 * study.line, DIGITS)} %"
    if study.verdict == "diverged":
        stopped = [f"{run.name} at step {run.diverged_at}" for run in study.runs if run.diverged_at is not None]
        return f"No difference can be given: {', '.join(stopped)} diverged."
    value = f"Over {study.pairs} pairs the mean difference is {_percent(study.differences[0])}"
    ends = {
        "within": f"it lies within {line} with its whole interval.",
        "mean within": f"it lies within {line}, but its interval reaches beyond; more pairs narrow it.",
        "beyond": f"it lies beyond {line}.",
    }
    return f"{value}; {ends[study.verdict]}"


def difference_figure(study: PrecisionStudy) -> Figure | None:
    """Relative difference over training: every pair, their mean with its interval, the line."""
    band = [(x, 100 * low, 100 * high) for x, low, high in study.band]
    lines = (
        *(Line("", _scaled(points), 3, faint=True) for points in study.each),
        Line("mean", _scaled(study.mean), 1, band=band),
        *_limits(study, study.mean),
    )
    caption = (
        f"{_about(study)}: {study.pairs} pairs (thin), their mean (strong) with its 95 % t interval (shaded), "
        f"and the report's line of {plain(100 * study.line)} %"
    )
    chart = LineChart("Relative difference of the losses over training tokens", _axis(study), lines, height=330)
    return curve(chart, caption, study.source)


def ablation_figure(study: PrecisionStudy) -> Figure | None:
    """The ablations beside the unchanged candidate, all with the first pair's seeds."""
    if not study.ablations:
        return None
    tones = (2, 3, 4)
    lines = (
        *(Line(row.name, _scaled(row.points), tones[i % 3]) for i, row in enumerate(study.ablations)),
        Line(study.candidate, _scaled(study.each[0]), 1),
        *_limits(study, study.mean, named=False),
    )
    chart = LineChart("Relative difference of the ablations over training tokens", _axis(study), lines, height=330)
    caption = (
        f"{_about(study)}: the ablations and the unchanged {study.candidate}, one run each, all against the same "
        f"{study.baseline} run; a line that ends early diverged"
    )
    return curve(chart, caption, study.source)


def whisker_figure(study: PrecisionStudy) -> Figure | None:
    """The measures that have a mean, with intervals, each pair as a mark, and how far the line reaches."""
    name = f"{study.candidate} {_MINUS} {study.baseline}"
    bounds = (("the line", -100 * study.line), ("the line", 100 * study.line))
    rows = tuple(
        Row(row.measure, _in_percent(row.mean), (*bounds, *(("one pair", 100 * v) for v in row.each if v is not None)))
        for row in study.differences
        if row.mean is not None
    )
    if not rows:
        return None
    chart = WhiskerChart(
        f"{name} by measure",
        _axis(study),
        rows,
        ("the line", "one pair"),
        (4, 0),
        model_name="mean over pairs",
        digits=DIGITS,
    )
    spread = (
        ""
        if study.spread is None
        else (
            f" For scale: {study.baseline} differs from seed to seed by {_unsigned(study.spread)} (standard deviation)."
        )
    )
    caption = f"{name} in percent of {study.baseline}'s loss, with 95 % t intervals over {study.pairs} pairs.{spread}"
    return twice(lambda width: draw_whiskers(chart, width), caption, study.source)


def _about(study: PrecisionStudy) -> str:
    return (
        f"Difference of the training losses relative to {study.baseline}, on curves smoothed by an exponential moving "
        f"average of {plain(study.smoothing)} per step, over training tokens"
    )


def _axis(study: PrecisionStudy) -> str:
    return f"{study.candidate} {_MINUS} {study.baseline}, % of the loss"


def _limits(study: PrecisionStudy, over: Points, *, named: bool = True) -> tuple[Line, ...]:
    """The line on both sides of zero, and zero."""
    if not over:
        return ()
    ends = (over[0][0], over[-1][0])
    line = 100 * study.line

    def level(value: float, label: str, faint: bool) -> Line:
        return Line(label, tuple((x, value) for x in ends), 5, faint=faint)

    label = f"{plain(line)} %" if named else ""
    return (level(line, label, False), level(-line, f"{_MINUS}{label}" if named else "", False), level(0.0, "", True))


def _scaled(points: Points) -> tuple[tuple[float, float], ...]:
    return tuple((x, 100 * y) for x, y in points)


def _in_percent(estimate: Estimate | None) -> Estimate | None:
    if estimate is None or estimate.low is None or estimate.high is None:
        return None
    return Estimate(100 * estimate.value, 100 * estimate.low, 100 * estimate.high)


def _percent(row: StudyDifference) -> str:
    mean = _in_percent(row.mean)
    if mean is None:
        return "none: a run diverged"
    return f"{_signed(mean.value)} % {interval(mean.low, mean.high, DIGITS)}"


def _share(value: float | None) -> str:
    return "none: diverged" if value is None else f"{_signed(100 * value)} %"


def _unsigned(value: float | None) -> str:
    return "none: diverged" if value is None else f"{fixed(100 * value, DIGITS)} %"


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + fixed(value, DIGITS)
