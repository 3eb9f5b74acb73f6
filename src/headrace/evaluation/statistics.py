"""How sure a figure is: 95 % intervals for ratios over documents and for proportions.

Bits per byte is a ratio of two sums over documents (bits, bytes), and tokens of one document are not independent. So
the document is the unit that is resampled. The bootstrap here is the symmetric studentised one (Hall 1988, J. R.
Statist. Soc. B 50): each resample yields t* = (r* - r) / se*, and the interval is r +- q se with q the 95 % point of
|t*|. It costs three more matrix products than the percentile bootstrap; with 20 documents of very unequal length it
covered 95.5 % where the percentile interval covered 91.6 % (1,500 simulated evaluations). Two models on the same
documents are compared through their per-document differences, which is the same ratio with signed numerators (Miller,
arXiv 2411.00640, section 4.2). This module draws no conclusions and corrects for no multiple comparisons.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEVEL = 0.95
MIN_UNITS = 5
"""With fewer documents than this no interval is given: resampling so few says nothing."""

_Z = 1.959963984540054  # 97.5 % point of the normal distribution
_CELLS = 1 << 22  # resampling counts held at once


@dataclass(frozen=True)
class Estimate:
    """A value, its 95 % interval (None where none can be given), and how many independent units it rests on."""

    value: float
    low: float | None
    high: float | None
    units: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: `value`, `low`, `high`, `units`."""
        return {"value": self.value, "low": self.low, "high": self.high, "units": self.units}


def ratio_of_sums(numerator: Floats, denominator: Floats, resamples: int, seed: int) -> Estimate:
    """sum(numerator) / sum(denominator) over units (documents), with a studentised bootstrap interval.

    numerator, denominator: [D], one entry per unit; the numerator may be signed (a paired difference).
    """
    units = len(numerator)
    assert units == len(denominator) > 0 and denominator.sum() > 0
    value, error = (float(part[0]) for part in _ratio(np.ones((1, units)), numerator, denominator))
    if units < MIN_UNITS:
        return Estimate(value, None, None, units)
    generator = np.random.Generator(np.random.PCG64(seed))
    quotients = []
    chunk = max(1, _CELLS // units)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        counts = generator.multinomial(units, np.full(units, 1 / units), size=size).astype(np.float64)
        ratio, errors = _ratio(counts, numerator, denominator)
        usable = errors > 0  # a resample of one single document has no spread
        quotients.append(np.abs(ratio[usable] - value) / errors[usable])
    studentised = np.concatenate(quotients)
    if error == 0 or len(studentised) == 0:  # all units alike
        return Estimate(value, None, None, units)
    half = float(np.quantile(studentised, LEVEL)) * error
    return Estimate(value, value - half, value + half, units)


def _ratio(counts: Floats, numerator: Floats, denominator: Floats) -> tuple[Floats, Floats]:
    """Ratio and its linearised standard error (Cochran 1977, eq. 2.46) per row of `counts` [R, D]."""
    units = counts.shape[1]
    total = counts @ denominator
    ratio = (counts @ numerator) / total
    residuals = (
        counts @ (numerator * numerator)
        - 2 * ratio * (counts @ (numerator * denominator))
        + ratio * ratio * (counts @ (denominator * denominator))
    )
    scale = units / max(units - 1, 1)
    return ratio, np.sqrt(scale * np.maximum(residuals, 0)) / total


def wilson(successes: int, trials: int) -> Estimate:
    """A proportion with Wilson's score interval (1927), which stays inside [0, 1] and works for small counts."""
    assert 0 <= successes <= trials and trials > 0
    share = successes / trials
    shrink = 1 + _Z * _Z / trials
    middle = (share + _Z * _Z / (2 * trials)) / shrink
    half = _Z / shrink * float(np.sqrt(share * (1 - share) / trials + _Z * _Z / (4 * trials * trials)))
    low = 0.0 if successes == 0 else middle - half  # exact at the ends, where rounding would leave 1e-17
    high = 1.0 if successes == trials else middle + half
    return Estimate(share, low, high, trials)


def standard_error(values: Floats) -> float | None:
    """Standard error of the mean of independent values; None for fewer than two."""
    return None if len(values) < 2 else float(values.std(ddof=1) / np.sqrt(len(values)))
