"""How numbers read: counts, sizes, durations and intervals in the words of the report and of the closing table."""

import math

_THOUSANDS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
MINUS = "\N{MINUS SIGN}"


def exact(number: float) -> str:
    """12,345 in full."""
    return f"{number:,.0f}"


def short(number: float) -> str:
    """Three digits and a letter: 7.71M, 671B, 950."""
    return _scaled(number, _THOUSANDS, "")


def tick(number: float) -> str:
    """`short` for axes: 1M, 1.5M, 500k."""
    words = short(number)
    return f"{_trim(words[:-1])}{words[-1]}" if words[-1].isalpha() else words


def size(number: float) -> str:
    """A number of bytes in decimal units: 12.3 MB."""
    return _scaled(number, _BYTES, " ") if number >= 1000 else f"{number:.0f} bytes"


def plain(value: float, digits: int = 3) -> str:
    """So many significant digits, without an exponent between 1e-4 and 1e6, trailing zeros kept out."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -4 or magnitude >= 6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        text = f"{_trim(mantissa)}e{int(exponent)}"
    else:
        text = _trim(f"{value:.{max(0, digits - 1 - magnitude)}f}")
    return text.replace("-", MINUS)


def percent(share: float) -> str:
    """0.314 -> 31.4 %."""
    return f"{plain(100 * share)} %"


def duration(seconds: float) -> str:
    """0.8 s, 42 s, 4 min 12 s, 2 h 05 min, 3 d 04 h."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 2880:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60:02d} h"


def interval(low: float | None, high: float | None, digits: int = 3) -> str:
    """[2.39, 2.44] with fixed decimals, or nothing where there is no interval."""
    if low is None or high is None:
        return ""
    return f"[{fixed(low, digits)}, {fixed(high, digits)}]"


def fixed(value: float, digits: int = 3) -> str:
    """So many decimals, so that columns align."""
    return f"{value:.{digits}f}".replace("-", MINUS)


def _scaled(number: float, units: tuple[tuple[float, str], ...], gap: str) -> str:
    for scale, unit in units:
        if abs(number) >= 0.9995 * scale:
            value = number / scale
            return f"{value:.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f}{gap}{unit}"
    return plain(number)


def _trim(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text
