"""Runs compared: each other run against the first, paired item by item; a section of shown reports, and a page alone.

The figures are those of compare.json. Here they are only laid out: a chart per run and metric, since metrics share no
axis, and everything in full beside it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from headrace.artifacts.files import read_json
from headrace.reporting.facts import ComparedDifference, ComparedRow, Comparison, Estimate
from headrace.reporting.figures import Figure, twice
from headrace.reporting.quantities import fixed, interval, percent
from headrace.reporting.whiskers import Row, WhiskerChart, draw_whiskers

COMPARED = "compare.json"
NO_DIFFERENCE = "no difference"
DIGITS = 4
_CLEAR = 0.001
"""Below it a p-value is told as that it is."""


@dataclass(frozen=True)
class OtherRun:
    """The table of one run against the first, as words."""

    name: str
    differs: str  # in which settings
    rows: tuple[tuple[str, ...], ...]  # task, metric, difference, its interval, p, detectable, found


def read_comparisons(results: Path, evaluate: str) -> tuple[Comparison, ...]:
    """Every finished comparison under `results` that the run of evaluate with this fingerprint takes part in."""
    found = (read_comparison(path, results) for path in sorted((results / "compare").glob(f"*/{COMPARED}")))
    return tuple(comparison for comparison in found if evaluate in comparison.runs)


def read_comparison(path: Path, results: Path) -> Comparison:
    """One compare.json; the page names it by its path under `results`."""
    facts = read_json(path)
    return Comparison(
        first=facts["first"],
        runs={run["name"]: tuple(run["differs"]) for run in facts["runs"]},
        rows=tuple(_row(entry) for entry in facts["rows"]),
        adjusted=facts["adjusted"],
        power=facts["power"],
        left_out=tuple(facts["left_out"]),
        source=str(path.relative_to(results)),
    )


def section(found: Comparison) -> dict[str, Any]:
    """All that the template of one comparison needs."""
    names = list(found.runs)
    command = f"snakemake compare --config runs=[{','.join(names)}]"
    return {
        "found": found,
        "command": command,
        "figures": [
            replace(_figure(found, name, metric), made_by=command)
            for name in names[1:]
            for metric in dict.fromkeys(row.metric for row in found.rows)
        ],
        "columns": [("task", False), ("metric", False), ("items", True), ("units", True)]
        + [(name, True) for name in names],
        "rows": [(row, [_estimate(row.values[name]) for name in names]) for row in found.rows],
        "others": [_other(found, name) for name in names[1:]],
        "power": percent(found.power),
    }


def _row(entry: Mapping[str, Any]) -> ComparedRow:
    return ComparedRow(
        **{key: entry[key] for key in ("task", "metric", "higher_is_better", "items", "units")},
        values={name: _read(each) for name, each in entry["values"].items()},
        differences={
            name: ComparedDifference(_read(each), each["p_holm"], each["detectable"], each["found"])
            for name, each in entry["differences"].items()
        },
    )


def _read(entry: Mapping[str, Any]) -> Estimate:
    return Estimate(entry["value"], entry["low"], entry["high"])


def _figure(found: Comparison, name: str, metric: str) -> Figure:
    """One run's differences by one metric, and where none would be."""
    rows = [row for row in found.rows if row.metric == metric]
    better = "above" if rows[0].higher_is_better else "below"
    chart = WhiskerChart(
        label=f"Differences of {metric}, {name} minus {found.first}",
        axis_title=f"difference of {metric}, {better} 0 is better",
        rows=tuple(Row(row.task, row.differences[name].difference, ((NO_DIFFERENCE, 0.0),)) for row in rows),
        names=(NO_DIFFERENCE,),
        shapes=(4,),
        model_name="difference",
    )
    caption = (
        f"{name} minus {found.first} by {metric}: differences on the same items with their 95 % intervals. "
        "One that leaves out 0 is not yet better or worse: the p of the table is adjusted for all that were looked at."
    )
    return twice(lambda width: draw_whiskers(chart, width), caption, found.source)


def _other(found: Comparison, name: str) -> OtherRun:
    return OtherRun(
        name,
        ", ".join(found.runs[name]) or "no setting",
        tuple(_words(row, row.differences[name]) for row in found.rows),
    )


def _words(row: ComparedRow, each: ComparedDifference) -> tuple[str, ...]:
    gap = each.difference
    p = "none" if each.p is None else f"< {_CLEAR}" if each.p < _CLEAR else fixed(each.p)
    detectable = "none" if each.detectable is None else fixed(each.detectable, DIGITS)
    bounds = interval(gap.low, gap.high, DIGITS) or "not computed"
    return row.task, row.metric, fixed(gap.value, DIGITS), bounds, p, detectable, each.found or "nothing"


def _estimate(value: Estimate) -> str:
    return f"{fixed(value.value)} {interval(value.low, value.high)}".strip()
